"""The ways in which people write down a message, each read as `{"role", "content", "weight"}`.

Calls of tools and what answers them keep their own fields: `tool_calls`, `tool_call_id`, `name`.

    {"role": "user", "content": …, "weight": 1}             OpenAI
    {"from": "human", "value": …}                           ShareGPT
    {"type": "human", "data": {"content": …}}               LangChain's messages_to_dict
    {"type": "human", "content": …}                         LangChain's message.model_dump()
    {"lc": 1, "type": "constructor", "kwargs": {…}}         LangChain's dumpd, which LangSmith shows

LangChain's message objects are read too. Anything else is returned as it is: the reader of the
messages says where it stands and what is wrong with it.
"""

import json
from collections.abc import Mapping
from typing import Any, TypeGuard

from pydantic import BaseModel

from langchain_cope.history.items import Item
from langchain_cope.history.rows import Located

OTHER_SIDE = {"user": "assistant", "assistant": "user"}
"""The two sides of a conversation, each with the other."""
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
"""The roles that a message may have, and what each is read as."""

_LANGCHAIN_ROLES = {
    "human": "user",
    "ai": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
}
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "observation": "tool",
}
_TOOL_FIELDS = ("tool_calls", "tool_call_id", "name")
# A tuple, not a set: a type in a file may be a value that cannot be hashed.
_TEXT_PARTS = ("text", "input_text", "output_text", "text-plain", "refusal")


def plain_messages(messages: Any) -> Any:
    """Return a list of messages with each as `{"role", "content"}`; anything else as it is."""
    if not isinstance(messages, list | tuple):
        return messages
    return [plain_message(message) for message in messages]


def plain_message(message: Any) -> Any:
    """Return a message as `{"role", "content"}`, with its `weight` where it has one."""
    if isinstance(message, BaseModel):
        message = message.model_dump()
    if not isinstance(message, Mapping) or "role" in message:
        return message
    if "from" in message:
        return _from_sharegpt(message)
    if _langchain_type(message) is not None:
        return _from_langchain(message)
    return message


def is_message(value: Any) -> bool:
    """Tell whether a value looks like one message, in any of the ways above."""
    if isinstance(value, BaseModel):
        return not isinstance(value, Item) and hasattr(value, "content")
    if not isinstance(value, Mapping):
        return False
    is_openai = "role" in value and "content" in value
    is_sharegpt = "from" in value and "value" in value
    return is_openai or is_sharegpt or is_langchain([value])


def is_conversation(value: Any) -> bool:
    """Tell whether a value is a list of messages, as LangChain's `messages_to_dict` returns one."""
    return isinstance(value, list) and bool(value) and is_message(value[0])


def is_langchain(messages: Any) -> bool:
    """Tell whether messages are LangChain's: its objects, or any of the three ways to dump them."""
    if not isinstance(messages, list | tuple) or not messages:
        return False
    first = messages[0]
    if isinstance(first, BaseModel):
        return True
    return isinstance(first, Mapping) and "role" not in first and _langchain_type(first) is not None


def is_role(role: Any) -> TypeGuard[str]:
    """Tell whether a message may have that role."""
    return isinstance(role, str) and role in ROLES


def content_text(content: Located) -> tuple[str, int]:
    """Return the text of a message's content as a chat reads it, and how many parts are not text.

    Such parts are images, thoughts and calls. A turn that only calls tools has the content None.
    """
    if content.value is None:
        return "", 0
    if not isinstance(content.value, list):
        return content.text(), 0
    texts = []
    for part in content.entries():
        if isinstance(part.value, str):
            texts.append(part.text())
            continue
        row = part.row()
        kind = row.get("type", "text" if "text" in row else None)
        if kind in _TEXT_PARTS and (kind != "text-plain" or "text" in row):  # it may be a file
            texts.append(row.field("refusal" if kind == "refusal" else "text").text())
    return "".join(texts), len(content.value) - len(texts)


def calls_of(message: Located) -> list[dict[str, Any]]:
    """Return the calls of tools in an assistant's message, as chat templates take them.

    Those without a name are left out. Raises HistoryError for text that cannot be encoded.
    """
    row = message.row()
    written = row.get("tool_calls")
    calls = written if isinstance(written, list | tuple) else [row.get("function_call")]
    read = [_call(call) for call in calls if isinstance(call, Mapping)]
    named = [call for call in read if call is not None]
    for call in named:
        message.with_value(json.dumps(call, ensure_ascii=False, default=str)).text()
    return named


def _call(call: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a call of OpenAI's (the newer or the older form) or of LangChain's."""
    function = call.get("function", call)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        return None
    arguments = _parsed(function.get("arguments", function.get("args")))
    return {
        "type": "function",
        "id": str(call.get("id") or ""),
        "function": {"name": name, "arguments": {} if arguments is None else arguments},
    }


def _parsed(value: Any) -> Any:
    """Return the object that JSON text holds; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, dict) else value


def _from_sharegpt(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["from"] == "function_call":  # what the assistant asked of a tool
        call = _parsed(message.get("value"))
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    plain = {
        "role": _role(message["from"], _SHAREGPT_ROLES),
        "content": message.get("value"),
    }
    if "weight" in message:
        plain["weight"] = message["weight"]
    return plain


def _from_langchain(message: Mapping[str, Any]) -> dict[str, Any]:
    inner = _inner(message)
    role = _role(_langchain_type(message), _LANGCHAIN_ROLES)
    if role == "chat":
        role = inner.get("role")
    content = inner.get("content")
    if role == "tool" and inner.get("status") == "error":  # as a chat's prompt says it
        content = ["Error: ", *(content if isinstance(content, list) else [content or ""])]
    plain = {"role": role, "content": content}
    return plain | {key: inner[key] for key in _TOOL_FIELDS if inner.get(key)}


def _langchain_type(message: Mapping[str, Any]) -> str | None:
    """Return LangChain's name of the speaker, None where the mapping is not one of its messages."""
    inner = _inner(message)
    if not isinstance(inner, Mapping) or "content" not in inner:
        return None
    kind = message.get("type")
    if kind == "constructor":
        kind = inner.get("type")
    return kind.removesuffix("MessageChunk").lower() if isinstance(kind, str) else None


def _inner(message: Mapping[str, Any]) -> Any:
    return message.get("data", message.get("kwargs", message))


def _role(speaker: Any, roles: Mapping[str, str]) -> Any:
    """Return the speaker's role; a speaker without one as it is, for the reader to refuse."""
    return roles.get(speaker, speaker) if isinstance(speaker, str) else speaker
