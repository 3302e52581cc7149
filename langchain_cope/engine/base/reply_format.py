"""How a base writes thoughts and tool calls, read from what comes with its tokenizer.

In this order: the tokenizer's own `response_template`; `<think>` and `<tool_call>` where the chat
template holds them; for other templates with tools the one that TRL knows; for everything else
those same marks, which most open models were trained on.
"""

import copy
import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from langchain_cope.engine.grammar.schema import CALL_BEGIN, CALL_END

THOUGHT, CALLS, ANSWER = "thought", "calls", "answer"
"""Fields of `ReplyFormat.template`."""
THINK = "<think>"
"""What begins a thought where a base says nothing else."""
_THOUGHT_NAMES = ("reasoning_content", "reasoning", "thinking")
_THOUGHT: dict[str, Any] = {"open": THINK, "close_pattern": r"</think>\s*", "content": "text"}
_CALLS: dict[str, Any] = {"open": CALL_BEGIN, "close": CALL_END, "repeats": True, "content": "text"}
_ANSWER: dict[str, Any] = {"content": "text"}
_MARKS = ("open", "open_pattern", "close", "close_pattern")
_OTHER_CALLS = ("<function=", "<arg_key>")  # XML in calls: marked in the same way, but no JSON


@dataclass(frozen=True)
class ReplyFormat:
    """What transformers' `ResponseParser` needs to take a reply apart."""

    template: dict[str, Any]
    """A response template of the fields `THOUGHT`, `CALLS` and `ANSWER`.

    The parser gives a call as the text between its marks.
    """
    native_tools: bool
    """Whether the chat template itself presents tools and calls.

    It then writes calls as JSON between `<tool_call>` and `</tool_call>`.
    """
    thought_names: tuple[str, ...] = ()
    """The fields of a turn in which the chat template looks for its thought."""

    def uses(self, mark: str) -> bool:
        """Return whether `mark` is part of what opens or closes a field."""
        for field in self.template["fields"].values():
            for key in _MARKS:
                texts = field.get(key, "")
                for text in [texts] if isinstance(texts, str) else texts:
                    if mark in text or re.escape(mark) in text:
                        return True
        return False


def reply_format_of(tokenizer: PreTrainedTokenizerBase) -> ReplyFormat:
    """Return the reply format of the model that `tokenizer` belongs to."""
    template = getattr(tokenizer, "response_template", None) or _known_to_trl(tokenizer)
    chat_template = str(tokenizer.chat_template)
    names = tuple(name for name in _THOUGHT_NAMES if re.search(rf"\b{name}\b", chat_template))
    if template is None:
        common = {THOUGHT: _THOUGHT, CALLS: _CALLS, ANSWER: _ANSWER}
        common_template = {"start_anchor": "\0", "fields": common}
        return ReplyFormat(common_template, _presents_calls(tokenizer), names)
    theirs = template["fields"]
    thoughts = [theirs[name] for name in _THOUGHT_NAMES if name in theirs]
    fields = {
        THOUGHT: _as_text(thoughts[0] if thoughts else _THOUGHT),
        CALLS: _CALLS,
        ANSWER: _as_text(theirs.get("content", _ANSWER)),
    }
    anchor_names = ("start_anchor", "start_anchor_pattern")
    anchors = {name: template[name] for name in anchor_names if name in template}
    calls = theirs.get("tool_calls", {})
    native = calls.get("open") == CALL_BEGIN and calls.get("content") == "json"
    return ReplyFormat({**anchors, "fields": fields}, native, names)


def _as_text(field: dict[str, Any]) -> dict[str, Any]:
    """Return where the field begins and ends, and none of its parsing, which could fail."""
    marks = {key: field[key] for key in _MARKS if key in field}
    return {**marks, "content": "text"}


def _known_to_trl(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    text = tokenizer.chat_template
    if not isinstance(text, str) or "tools" not in text or CALL_BEGIN in text or THINK in text:
        return None  # nothing to learn, which saves the seconds that TRL takes to import
    from trl.chat_template_utils import add_response_schema

    try:
        extended: Any = add_response_schema(copy.copy(tokenizer))
    except ValueError:  # a template that it does not know
        return None
    template: dict[str, Any] | None = getattr(extended, "response_template", None)
    return template


def _presents_calls(tokenizer: PreTrainedTokenizerBase) -> bool:
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else str(template)
    return CALL_BEGIN in text and "tools" in text and not any(mark in text for mark in _OTHER_CALLS)
