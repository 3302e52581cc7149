"""LangChain's messages as a chat template takes them.

`template_messages` turns messages into a template's turns: instructions go to the end of the system
turn, and for templates without tools calls and results become text. What a template refuses beyond
that, a system turn for example, the engine merges (`engine/base/chat_template.py`).
"""

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

# Blocks that a message's own fields repeat, and thoughts, which templates take apart from the text.
_SKIPPED_BLOCKS = {
    "tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "function_call", "tool_result",
    "reasoning", "thinking", "redacted_thinking",
}  # fmt: skip
_ROLES = ((SystemMessage, "system"), (HumanMessage, "user"), (AIMessage, "assistant"))


def template_messages(
    messages: Sequence[BaseMessage],
    instructions: Sequence[str] = (),
    *,
    native_tools: bool = True,
    thought_names: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return the conversation in the form that chat templates take.

    Args:
        messages: the conversation, one message at least.
        instructions: texts for the end of the system turn, which is added where there is none.
        native_tools: False for templates without tools: calls and results become text, and
            results the user's turns.
        thought_names: fields in which the template looks for a turn's thought. The turns after the
            last human one have theirs: the model is still at work on its answer.

    Raises:
        InputError: there are no messages, or one holds what no text model can read.
    """
    if not messages:
        raise InputError("no messages were given: at least one is needed")
    groups = [_turns(message) for message in messages]
    asked = [any(turn["role"] == "user" for turn in group) for group in groups]
    for message, group in reversed(list(zip(messages, groups, strict=True))):
        if asked.pop():
            break
        if thought := _thought(message):
            group[-1].update(dict.fromkeys(thought_names, thought))
    turns = [turn for group in groups for turn in group]
    if instructions:
        turns = _with_system(turns, instructions)
    return turns if native_tools else _without_tool_roles(turns)


def _turns(message: BaseMessage) -> list[dict[str, Any]]:
    """Return the turns of a message: one for each tool result in it, and one for the rest."""
    if isinstance(message, ToolMessage):
        failed = message.status == "error"
        return [_tool_turn(_text(message), message.tool_call_id, message.name, failed)]
    results = [_result_turn(block) for block in _blocks(message) if _is_result(block)]
    turn: dict[str, Any] = {"role": _role(message), "content": _text(message)}
    if isinstance(message, AIMessage) and message.tool_calls:
        turn["tool_calls"] = [_call(call) for call in message.tool_calls]
    if results and not turn["content"]:
        return results
    return [*results, turn]


def _thought(message: BaseMessage) -> str:
    """Return what the model thought before the text of an AI message."""
    if not isinstance(message, AIMessage):
        return ""
    thought = message.additional_kwargs.get("reasoning_content")
    if isinstance(thought, str):
        return thought
    kinds = ("reasoning", "thinking")
    blocks = [block for block in _blocks(message) if block.get("type") in kinds]
    return "".join(str(block.get(block["type"]) or "") for block in blocks)


def _blocks(message: BaseMessage) -> list[dict[str, Any]]:
    if isinstance(message.content, str):
        return []
    return [block for block in message.content if isinstance(block, dict)]


def _is_result(block: dict[str, Any]) -> bool:
    return block.get("type") == "tool_result"


def _result_turn(block: dict[str, Any]) -> dict[str, Any]:
    text = _joined(block.get("content", ""))
    return _tool_turn(text, str(block.get("tool_use_id", "")), None, bool(block.get("is_error")))


def _tool_turn(text: str, call_id: str, name: str | None, failed: bool) -> dict[str, Any]:
    turn = {
        "role": "tool",
        "content": f"Error: {text}" if failed else text,
        "tool_call_id": call_id,
    }
    if name:
        turn["name"] = name
    return turn


def _call(call: Any) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": call["args"]}
    return {"type": "function", "id": call["id"] or "", "function": function}


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    for kind, role in _ROLES:
        if isinstance(message, kind):
            return role
    raise InputError(
        "ChatCoPe takes system, human, AI, tool and chat messages, "
        f"not a {type(message).__name__}: convert it or leave it out"
    )


def _text(message: BaseMessage) -> str:
    """Return the text of a message, without the blocks that stand elsewhere in it."""
    if isinstance(message.content, str):
        return message.content
    blocks = []
    for block in message.content:
        if isinstance(block, str) or block.get("type") not in _SKIPPED_BLOCKS:
            blocks.append(block)
    return _joined(blocks)


def _joined(content: Any) -> str:
    """Return the text of content blocks."""
    if isinstance(content, str):
        return content
    return "".join(_block_text(block) for block in content or ())


def _block_text(block: Any) -> str:
    if isinstance(block, str):
        return block
    kind = block.get("type")
    if kind == "text":
        return str(block.get("text", ""))
    if kind in ("json", "non_standard"):
        value = block.get("json", block.get("value"))
        return json.dumps(value, ensure_ascii=False, default=str)
    raise InputError(f"a message holds {kind!s} content; the base reads text only: leave it out")


def _with_system(turns: Sequence[dict[str, Any]], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return `turns` with `texts` at the end of the system turn."""
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": "\n\n".join(texts)}, *turns]
    system, *others = turns
    return [{**system, "content": "\n\n".join([system["content"], *texts])}, *others]


def _without_tool_roles(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return `turns` with calls and results as text; results in a row are one user turn."""
    plain: list[dict[str, Any]] = []
    after_result = False
    for turn in turns:
        is_result = turn["role"] == "tool"
        if not is_result:
            others = {key: value for key, value in turn.items() if key != "tool_calls"}
            plain.append({**others, "content": _text_with_calls(turn)})
        elif after_result:
            plain[-1]["content"] += f"\n{_result_text(turn)}"
        else:
            plain.append({"role": "user", "content": _result_text(turn)})
        after_result = is_result
    return plain


def _text_with_calls(turn: dict[str, Any]) -> str:
    texts = [turn["content"]] if turn["content"] else []
    for call in turn.get("tool_calls", ()):
        function = json.dumps(call["function"], ensure_ascii=False)
        texts.append(f"<tool_call>\n{function}\n</tool_call>")
    return "\n".join(texts)


def _result_text(turn: dict[str, Any]) -> str:
    return f"<tool_response>\n{turn['content']}\n</tool_response>"
