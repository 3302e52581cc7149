"""A reply taken apart while it comes: thoughts, answer and tool calls as chunks of a message."""

import json
import re
import uuid
from typing import Any

from langchain_core.messages import AIMessageChunk
from langchain_core.messages.tool import tool_call_chunk

from langchain_cope.engine import CALL_END, JsonScan, overlap

_HEAD = re.compile(
    r'\s*\{\s*"name":\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)":\s*(?=\{)'
)


class ReplyStream:
    """Chunks of one message, from the text of a reply as it comes.

    Thoughts become ``additional_kwargs["reasoning_content"]``, which LangChain shows as reasoning blocks. A call comes as a chunk
    with name and id, then as pieces of its arguments. What is no call, or was cut, ends up among ``invalid_tool_calls``.
    """

    def __init__(
        self, template: dict[str, Any], *, prefix: str, with_calls: bool, whole: bool = False
    ) -> None:
        """How the reply is taken apart.

        Args:
            template: `ReplyFormat.template`.
            prefix: the end of the prompt that is part of the reply, ``<think>`` say.
            with_calls: calls may be made; else their marks are text.
            whole: the reply is the answer, whatever it holds.
        """
        from transformers.utils.chat_parsing import ResponseParser

        from langchain_cope.engine import ANSWER, CALLS, THOUGHT, only_answer

        fields = {
            name: field for name, field in template["fields"].items() if with_calls or name != CALLS
        }
        self._parser = ResponseParser(
            only_answer() if whole else {**template, "fields": fields}, prefix=prefix
        )
        self._ways = {ANSWER: self._answer, THOUGHT: self._thought, CALLS: self._call_text}
        self._calls_field = CALLS
        self._call: _CallText | None = None
        self._past_mark = ""
        """Text after a mark that stands in a string of the call, and so did not end it."""
        self._after_call = False
        self.num_calls = 0
        """Calls that are whole."""
        self._num_begun = 0

    def push(self, text: str) -> list[AIMessageChunk]:
        """Chunks for the next piece of text."""
        return self._chunks(self._parser.feed(text))

    def finish(self) -> list[AIMessageChunk]:
        """Chunks for what was held back, once no more text comes."""
        _, events = self._parser.finalize()
        found = self._chunks(events, cut=True)
        return found + (self._end_call() if self._call is not None else [])

    def _chunks(self, events: list[dict[str, Any]], cut: bool = False) -> list[AIMessageChunk]:
        found: list[AIMessageChunk] = []
        for event in events:
            calls = event["field"] == self._calls_field
            if event["type"] == "region_open" and calls:
                found += self._end_call() if self._call is not None else []
                self._call = _CallText(self._num_begun)
                self._num_begun += 1
            elif event["type"] == "region_chunk":
                found += self._ways[event["field"]](event["text"])
            elif event["type"] == "region_close" and calls and self._call is not None:
                found += (
                    self._call.push(CALL_END)
                    if self._call.in_string and not cut
                    else self._end_call()
                )
        return found

    def _answer(self, text: str) -> list[AIMessageChunk]:
        if self._call is not None:
            return self._past_a_mark(text)
        if self._after_call:  # white space between two calls, or before what is said after them
            text = text.lstrip()
            self._after_call = not text
        return [AIMessageChunk(content=text)] if text else []

    def _past_a_mark(self, text: str) -> list[AIMessageChunk]:
        """The rest of a call in whose strings its own end mark stands, and what comes after it."""
        assert self._call is not None
        self._past_mark += text
        found: list[AIMessageChunk] = []
        while self._past_mark and self._call is not None:
            body, mark, rest = self._past_mark.partition(CALL_END)
            if not mark:
                held = overlap(body, CALL_END)
                self._past_mark = body[len(body) - held :]
                return found + self._call.push(body[: len(body) - held])
            found += self._call.push(body)
            self._past_mark = rest
            found += self._call.push(mark) if self._call.in_string else self._end_call()
        rest, self._past_mark = self._past_mark, ""
        return found + (self._answer(rest) if rest else [])

    def _thought(self, text: str) -> list[AIMessageChunk]:
        return [AIMessageChunk(content="", additional_kwargs={"reasoning_content": text})]

    def _call_text(self, text: str) -> list[AIMessageChunk]:
        return [] if self._call is None else self._call.push(text)

    def _end_call(self) -> list[AIMessageChunk]:
        assert self._call is not None
        found = self._call.close()
        self.num_calls += self._call.complete
        self._call, self._after_call = None, True
        return found


class _CallText:
    """One call from the text between its marks."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._id = f"call_{uuid.uuid4().hex[:24]}"
        self._body = ""
        self._sent: int | None = None
        """Up to where arguments were passed on; None before the name is known."""
        self._scan = JsonScan()
        """Of the arguments."""
        self.complete = False
        """Name and arguments are there."""

    @property
    def in_string(self) -> bool:
        """Whether the text so far ends in a string of the arguments."""
        return self._sent is not None and self._scan.in_string

    def push(self, text: str) -> list[AIMessageChunk]:
        """Chunks for the next piece of the text."""
        self._body += text
        chunks = []
        if self._sent is None:
            head = _HEAD.match(self._body)
            if head is None:
                return []
            self._sent = head.end()
            chunks.append(self._chunk(json.loads(head[1], strict=False), ""))
        arguments = self._more_arguments(self._sent)
        self._sent += len(arguments)
        return [*chunks, *([self._chunk(None, arguments)] if arguments else [])]

    def close(self) -> list[AIMessageChunk]:
        """Chunks for what is left at the end of the text.

        LangChain completes JSON that was cut, and would run the tool with half its arguments: a wrong end prevents that.
        """
        if self.complete:
            return []
        if self._sent is not None:
            return [self._chunk(None, self._scan.wrong_end())]
        if whole := self._whole():
            self.complete = True
            return [whole]
        scan = JsonScan()
        scan.push(self._body)
        return [self._chunk(None, self._body.strip() + scan.wrong_end())]

    def _whole(self) -> AIMessageChunk | None:
        """A call whose parts stand in another order; None where the text is no call at all."""
        try:
            call = json.loads(self._body, strict=False)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        return self._chunk(name, json.dumps(arguments, ensure_ascii=False))

    def _more_arguments(self, start: int) -> str:
        """What belongs to the arguments from ``start`` on; nothing after the brace that ends them."""
        for place in range(start, len(self._body)):
            if self.complete:
                return self._body[start:place]
            self._scan.push(self._body[place])
            self.complete = not self._scan.open
        return self._body[start:]

    def _chunk(self, name: str | None, arguments: str) -> AIMessageChunk:
        first = name is not None or self._sent is None
        chunk = tool_call_chunk(
            name=name, args=arguments, id=self._id if first else None, index=self._index
        )
        return AIMessageChunk(content="", tool_call_chunks=[chunk])
