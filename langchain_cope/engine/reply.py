"""A reply taken apart while it comes: thoughts, answer and tool calls.

Stop strings act on the answer alone. A call that repeats an earlier one of the same reply ends it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_parsing import ResponseParser

from langchain_cope.engine.base.reply_format import ANSWER, CALLS, THOUGHT
from langchain_cope.engine.call_text import Called, CallPart, CallText
from langchain_cope.engine.decoding.text import StopStrings, overlap
from langchain_cope.engine.grammar.schema import CALL_BEGIN, CALL_END


@dataclass(frozen=True)
class ReplyParts:
    """What a reply may hold beside the answer."""

    thoughts: bool = True
    """Whether it may hold thoughts; otherwise their marks are text."""
    calls: bool = False
    """Whether it may hold calls; otherwise their marks are text."""
    text: bool = True
    """Whether the answer may be any text; otherwise it is calls or JSON."""
    opened: str = ""
    """The end of the prompt that belongs to the reply: the mark of a thought, else nothing."""


@dataclass(frozen=True)
class TextPart:
    """New text of the answer or of a thought."""

    field: str
    """`ANSWER` or `THOUGHT`."""
    text: str


Part = TextPart | CallPart


class ReplyReader:
    """Takes one reply apart."""

    def __init__(
        self, template: dict[str, Any], parts: ReplyParts | None, stops: Sequence[str] = ()
    ) -> None:
        """Prepare to take a reply apart.

        Args:
            template: `ReplyFormat.template` of the base.
            parts: what the reply may hold; None: all of it is the answer.
            stops: the first of these in the answer ends the reply, and is dropped.
        """
        self._parser = None if parts is None else _parser(template, parts)
        self._stops = StopStrings(stops)
        self._in_thought = parts is not None and parts.opened != ""
        self._is_text = parts is None or parts.text
        """Whether the beginning of a mark may be text, as it is once an answer has begun."""
        self._call: CallText | None = None
        """The call that the text so far leaves open."""
        self._past_mark = ""
        """Text after an end mark that stands in a string of the call, and so did not end it."""
        self._after_call = False
        self._called: list[Called] = []
        """The calls so far, those included that are none."""
        self.num_calls = 0
        """How many calls are whole."""
        self.ended = False
        """Whether the reply is over; what follows is dropped."""

    @property
    def in_answer(self) -> bool:
        """Whether the text so far ends in the answer."""
        return self._call is None and not self._in_thought

    def push(self, text: str) -> list[Part]:
        """Return the parts that the next piece of text makes known."""
        if self.ended or not text:
            return []
        if self._parser is None:
            return self._answer(text)
        parts: list[Part] = []
        for event in self._parser.feed(text):
            parts += [] if self.ended else self._read(event)
        return parts

    def finish(self, *, cut: bool) -> list[Part]:
        """Return what was held back, once no more text comes.

        A call that is still open is invalid where the reply was `cut`, in its mark too.
        """
        if self.ended:
            return []
        parts: list[Part] = []
        if self._parser is not None:
            _, events = self._parser.finalize()
            for event in events:
                if event["type"] == "region_close" or self.ended:  # of all that is open
                    continue
                in_mark = event["type"] == "region_chunk" and not self._is_text and cut
                parts += self._open(CALLS) if in_mark and self.in_answer else self._read(event)
        return parts if self.ended else [*parts, *self._held(), *self._end_call(cut=cut)]

    def _read(self, event: dict[str, Any]) -> list[Part]:
        """Return the parts for an event of the parser."""
        kind, field = event["type"], event["field"]
        if kind == "region_open" and field != ANSWER:
            return self._open(field)
        if kind == "region_chunk":
            return self._text_of(field, event["text"])
        if kind == "region_close" and field == CALLS:
            return self._end_mark()
        if kind == "region_close":
            self._in_thought = False
        return []

    def _open(self, field: str) -> list[Part]:
        if field == CALLS and self._call is not None and self._call.in_string:
            text, self._past_mark = self._past_mark + CALL_BEGIN, ""
            return list(self._call.push(text))
        parts = [*self._held(), *self._end_call()]
        if field == THOUGHT:
            self._in_thought = True
        else:
            self._call = CallText(len(self._called), {each.name for each in self._called})
        return parts

    def _text_of(self, field: str, text: str) -> list[Part]:
        if field == THOUGHT:
            return [TextPart(THOUGHT, text)]
        if field == ANSWER:
            return self._answer(text)
        return [] if self._call is None else list(self._call.push(text))

    def _answer(self, text: str) -> list[Part]:
        if self._call is not None:
            return self._rest_of_call(text)
        if self._after_call:  # white space between two calls, or before what is said after them
            text = text.lstrip()
            self._after_call = not text
        self._is_text = self._is_text or text != ""
        text = self._stops.push(text)
        self.ended = self._stops.stopped
        return [TextPart(ANSWER, text)] if text else []

    def _held(self) -> list[Part]:
        """Return the answer's text that might have become a stop string."""
        text = self._stops.flush()
        return [TextPart(ANSWER, text)] if text else []

    def _end_mark(self) -> list[Part]:
        """Return the parts for an end mark, which in a string of the call is text."""
        if self._call is not None and self._call.in_string:
            return list(self._call.push(CALL_END))
        return self._end_call()

    def _rest_of_call(self, text: str) -> list[Part]:
        """Return the parts for text after an end mark that a string of the call holds."""
        self._past_mark += text
        parts: list[Part] = []
        while self._past_mark and self._call is not None:
            body, mark, rest = self._past_mark.partition(CALL_END)
            if not mark:
                end = len(body) - overlap(body, CALL_END)
                self._past_mark = body[end:]
                return parts + self._call.push(body[:end])
            parts += self._call.push(body)
            self._past_mark = rest
            parts += self._end_mark()
        rest, self._past_mark = self._past_mark, ""
        return parts + self._answer(rest) if rest and not self.ended else parts

    def _end_call(self, *, cut: bool = False) -> list[Part]:
        """Return the parts that end the open call, if there is one; none for a repeat."""
        if self._call is None:
            return []
        call, self._call = self._call, None
        self._after_call = True
        parts = call.close(cut=cut)
        if not cut and any(call.called.repeats(earlier) for earlier in self._called):
            self.ended = True
            return []
        self._called.append(call.called)
        self.num_calls += call.valid
        return list(parts)


def _parser(template: dict[str, Any], parts: ReplyParts) -> ResponseParser:
    fields = dict(template["fields"])
    if not parts.thoughts:
        del fields[THOUGHT]
    if not parts.calls:
        fields.pop(CALLS, None)
    return ResponseParser({**template, "fields": fields}, prefix=parts.opened)
