"""The ways in which people write down a message, as ``{"role", "content", "weight"}``.

    {"role": "user", "content": …, "weight": 1}             OpenAI
    {"from": "human", "value": …}                           ShareGPT
    {"type": "human", "data": {"content": …}}               LangChain's messages_to_dict
    {"type": "human", "content": …}                         LangChain's message.model_dump(), and the message itself
    {"lc": 1, "type": "constructor", "kwargs": {…}}         LangChain's dumpd, which LangSmith shows

What is none of these is returned as it is: the reader of the messages says where it stands and what is wrong with it.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from langchain_cope.history.items import Item

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


def plain_messages(messages: Any) -> Any:
    """Return a list of messages with each as ``{"role", "content"}``; anything else as it is."""
    return (
        [plain_message(message) for message in messages]
        if isinstance(messages, list | tuple)
        else messages
    )


def plain_message(message: Any) -> Any:
    """Return a message as ``{"role", "content"}`` and its ``weight``, where it has one."""
    if isinstance(message, BaseModel):
        message = message.model_dump()
    if not isinstance(message, Mapping) or "role" in message:
        return message
    if "from" in message:
        speaker, content = message["from"], message.get("value")
        if speaker == "function_call":  # what the assistant asked of a tool
            return {"role": "assistant", "content": None}
        return {"role": _known(speaker, _SHAREGPT_ROLES), "content": content, **_weight(message)}
    if _type(message) is None:
        return message
    inner = message.get("data", message.get("kwargs", message))
    if not isinstance(inner, Mapping):
        return message
    role = _known(_type(message), _LANGCHAIN_ROLES)
    return {"role": inner.get("role") if role == "chat" else role, "content": inner.get("content")}


def is_message(value: Any) -> bool:
    """Whether a value looks like one message, in any of the ways above."""
    if isinstance(value, BaseModel):
        return not isinstance(value, Item) and hasattr(value, "content")
    if not isinstance(value, Mapping):
        return False
    return (
        ("role" in value and "content" in value)
        or ("from" in value and "value" in value)
        or is_langchain([value])
    )


def is_langchain(messages: Any) -> bool:
    """Whether messages are LangChain's: objects, or written by ``messages_to_dict`` or ``model_dump``."""
    if not isinstance(messages, list | tuple) or not messages:
        return False
    first = messages[0]
    if isinstance(first, BaseModel):
        return True
    return isinstance(first, Mapping) and "role" not in first and _type(first) is not None


def _type(message: Mapping[str, Any]) -> str | None:
    """LangChain's name for who speaks; None where the mapping is none of its messages."""
    inner = message.get("data", message.get("kwargs", message))
    kind = message.get("type")
    if kind == "constructor" and isinstance(inner, Mapping):
        kind = inner.get("type")
    if not isinstance(kind, str) or not isinstance(inner, Mapping) or "content" not in inner:
        return None
    return kind.removesuffix("MessageChunk").lower()


def _known(name: Any, roles: Mapping[str, str]) -> Any:
    return roles.get(name, name) if isinstance(name, str) else name


def _weight(message: Mapping[str, Any]) -> dict[str, Any]:
    return {"weight": message["weight"]} if "weight" in message else {}
