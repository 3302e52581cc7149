"""LangChain's messages as a chat template takes them.

`template_messages` turns messages into a template's turns: instructions go to the end of the system
turn. What a template does not take, a system turn or tools for example, the engine puts in another
form (`engine/base/forms.py`).
"""

import json
import re
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

# Blocks that a message's own fields repeat, thoughts, which templates take apart from the text, and
# calls that another model's provider carried out itself.
_REPEATED = re.compile(
    "reasoning|thinking|^tool_result$|(call|call_chunk|tool_use|delta)$|^mcp_(list_tools|approval)"
)
_TEXT_BLOCKS = ("text", "input_text", "output_text", "text-plain", "refusal")
_TEXT_FIELDS = ("text", "refusal", "transcript")
_ROLES = ((SystemMessage, "system"), (HumanMessage, "user"), (AIMessage, "assistant"))


def template_messages(
    messages: Sequence[BaseMessage],
    instructions: Sequence[str] = (),
    *,
    thought_names: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return the conversation in the form that chat templates take.

    Args:
        messages: the conversation, one message at least.
        instructions: texts for the end of the system turn, which is added where there is none.
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
    return turns


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
    text = _joined(block.get("content"), by_others=True)
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
    by_others = isinstance(message, (AIMessage, ToolMessage)) or _role(message) == "assistant"
    return _joined(message.content, by_others=by_others)


def _joined(content: Any, *, by_others: bool) -> str:
    """Return the text of content blocks, which may be those of any provider."""
    if isinstance(content, list):
        return "".join(_joined(block, by_others=by_others) for block in content)
    if isinstance(content, dict):
        return _block_text(content, by_others)
    return "" if content is None else str(content)


def _block_text(block: dict[str, Any], by_others: bool) -> str:
    """Return a block as text, or a mark for what a model or a tool wrote that is no text.

    What the people write who ask the model has to be read, so what is no text is refused there.
    """
    kind = str(block.get("type") or next(iter(block), "empty"))
    if _REPEATED.search(kind):
        return ""
    if kind == "non_standard" and by_others:
        return _joined(block.get("value"), by_others=True)
    if kind in ("json", "non_standard"):
        value = block.get("json", block.get("value"))
        return json.dumps(value, ensure_ascii=False, default=str)
    texts = [str(block[name]) for name in _TEXT_FIELDS if block.get(name)]
    if kind in _TEXT_BLOCKS or (texts and by_others):
        return "".join(texts[:1])
    if by_others:
        return f"[{kind.removeprefix('input_').removeprefix('output_').removesuffix('_url')}]"
    raise InputError(f"a message holds {kind} content; the base reads text only: leave it out")


def _with_system(turns: Sequence[dict[str, Any]], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return `turns` with `texts` at the end of the system turn."""
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": "\n\n".join(texts)}, *turns]
    system, *others = turns
    return [{**system, "content": "\n\n".join([system["content"], *texts])}, *others]
