"""How a base writes thoughts and tool calls, found in what comes with its tokenizer.

In this order: the tokenizer's own ``response_template``; ``<think>`` and ``<tool_call>`` where the chat template holds them; for
other templates with tools the one that TRL knows; and for all else those same marks, which most open models were trained on.
"""

import copy
import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from langchain_cope.engine.grammar.schema import CALL_BEGIN, CALL_END

THOUGHT, CALLS, ANSWER = "thought", "calls", "answer"
"""Fields of `ReplyFormat.template`."""
_THOUGHT_NAMES = ("reasoning_content", "reasoning", "thinking")
_THOUGHT: dict[str, Any] = {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"}
_CALLS: dict[str, Any] = {"open": CALL_BEGIN, "close": CALL_END, "repeats": True, "content": "text"}
_ANSWER: dict[str, Any] = {"content": "text"}
_ENDS = ("open", "open_pattern", "close", "close_pattern")
_OTHER_CALLS = ("<function=", "<arg_key>")  # XML in calls: marked in the same way, but no JSON


@dataclass(frozen=True)
class ReplyFormat:
    """What transformers' ``ResponseParser`` needs to take a reply apart."""

    template: dict[str, Any]
    """A response template of the fields `THOUGHT`, `CALLS` and `ANSWER`, calls as the text between their marks."""
    native_tools: bool
    """The chat template itself presents tools and calls, the latter as JSON between ``<tool_call>`` and ``</tool_call>``."""

    def uses(self, mark: str) -> bool:
        """Whether ``mark`` is part of what opens or closes a field."""
        ends = [field.get(key, "") for field in self.template["fields"].values() for key in _ENDS]
        texts = [text for end in ends for text in ([end] if isinstance(end, str) else end)]
        return any(mark in text or re.escape(mark) in text for text in texts)


def reply_format_of(tokenizer: PreTrainedTokenizerBase) -> ReplyFormat:
    """The format of the model that ``tokenizer`` belongs to."""
    known = getattr(tokenizer, "response_template", None) or _known_to_trl(tokenizer)
    if known is None:
        common = {THOUGHT: _THOUGHT, CALLS: _CALLS, ANSWER: _ANSWER}
        return ReplyFormat({"start_anchor": "\0", "fields": common}, _presents_calls(tokenizer))
    given = known["fields"]
    thought = next((given[name] for name in _THOUGHT_NAMES if name in given), _THOUGHT)
    fields: dict[str, dict[str, Any]] = {
        THOUGHT: thought,
        CALLS: _CALLS,
        ANSWER: given.get("content", _ANSWER),
    }
    calls = given.get("tool_calls", {})
    native = calls.get("open") == CALL_BEGIN and calls.get("content") == "json"
    for name in (THOUGHT, ANSWER):  # where they begin and end, and no parsing that could fail
        field = fields[name]
        fields[name] = {**{key: field[key] for key in _ENDS if key in field}, "content": "text"}
    anchors = {key: known[key] for key in ("start_anchor", "start_anchor_pattern") if key in known}
    return ReplyFormat({**anchors, "fields": fields}, native)


def only_answer() -> dict[str, Any]:
    """A template for replies that are nothing but an answer, whatever marks they hold."""
    return {"start_anchor": "\0", "fields": {ANSWER: _ANSWER}}


def _known_to_trl(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    text = tokenizer.chat_template
    if not isinstance(text, str) or "tools" not in text or CALL_BEGIN in text or "<think>" in text:
        return None  # nothing to learn, which spares the seconds that TRL takes to import
    from trl.chat_template_utils import add_response_schema

    try:
        changed: Any = add_response_schema(copy.copy(tokenizer))
    except ValueError:  # a template that it does not know
        return None
    found: dict[str, Any] | None = getattr(changed, "response_template", None)
    return found


def _presents_calls(tokenizer: PreTrainedTokenizerBase) -> bool:
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else str(template)
    return CALL_BEGIN in text and "tools" in text and not any(mark in text for mark in _OTHER_CALLS)
