"""LangChain's messages as a chat template takes them."""

import json
from collections.abc import Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from langchain_cope.errors import InputError

_READ_ELSEWHERE = {  # what a message's own fields say as well, or what nobody is shown twice
    "tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "function_call",
    "reasoning", "thinking", "redacted_thinking",
}  # fmt: skip


def template_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """The conversation in the form that chat templates with tools know.

    Raises ``InputError`` for what no text model can read, by name.
    """
    if not messages:
        raise InputError("no messages were given: at least one is needed")
    return [turn for message in messages for turn in _turns(message)]


def without_tool_roles(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation for templates that know no tools: calls and results are text, results the user's."""
    plain: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if plain and plain[-1].get("results"):
                plain[-1]["content"] += f"\n{text}"
            else:
                plain.append({"role": "user", "content": text, "results": True})
            continue
        calls = [
            f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
            for call in message.get("tool_calls", ())
        ]
        text = "\n".join([part for part in [message["content"]] if part] + calls)
        plain.append({"role": message["role"], "content": text})
    return [{"role": message["role"], "content": message["content"]} for message in plain]


def _turns(message: BaseMessage) -> list[dict[str, Any]]:
    if isinstance(message, ToolMessage):
        return [_tool_turn(_text(message), message.tool_call_id, message.name, message.status)]
    results = [block for block in _blocks(message) if block.get("type") == "tool_result"]
    turns = [
        _tool_turn(
            _joined(block.get("content", "")),
            str(block.get("tool_use_id", "")),
            None,
            "error" if block.get("is_error") else "success",
        )
        for block in results
    ]
    turn: dict[str, Any] = {"role": _role(message), "content": _text(message)}
    if isinstance(message, AIMessage):
        calls = [
            {
                "type": "function",
                "id": call["id"] or "",
                "function": {"name": call["name"], "arguments": call["args"]},
            }
            for call in message.tool_calls
        ]
        if calls:
            turn["tool_calls"] = calls
    return turns if results and not turn["content"] else [*turns, turn]


def _tool_turn(text: str, call_id: str, name: str | None, status: str) -> dict[str, Any]:
    content = f"Error: {text}" if status == "error" else text
    return {
        "role": "tool",
        "content": content,
        "tool_call_id": call_id,
        **({"name": name} if name else {}),
    }


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    for kind, role in ((SystemMessage, "system"), (HumanMessage, "user"), (AIMessage, "assistant")):
        if isinstance(message, kind):
            return role
    raise InputError(
        f"ChatCoPe takes system, human, AI, tool and chat messages, not a {type(message).__name__}"
    )


def _text(message: BaseMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    kept = [
        block
        for block in message.content
        if isinstance(block, str) or block.get("type") not in {*_READ_ELSEWHERE, "tool_result"}
    ]
    return _joined(kept)


def _joined(content: Any) -> str:
    """The text of content blocks."""
    if isinstance(content, str):
        return content
    texts = []
    for block in content or ():
        if isinstance(block, str):
            texts.append(block)
        elif block.get("type") == "text":
            texts.append(str(block.get("text", "")))
        elif block.get("type") in ("json", "non_standard"):
            texts.append(
                json.dumps(block.get("json", block.get("value")), ensure_ascii=False, default=str)
            )
        else:
            raise InputError(
                f"a message holds {block.get('type')!s} content; the base reads text only"
            )
    return "".join(texts)


def _blocks(message: BaseMessage) -> list[dict[str, Any]]:
    return (
        []
        if isinstance(message.content, str)
        else [block for block in message.content if isinstance(block, dict)]
    )
