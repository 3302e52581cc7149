"""A reply taken apart while it comes: thoughts, answer and tool calls as chunks of a message."""

import json
import re
import uuid
from typing import Any

from langchain_core.messages import AIMessageChunk
from langchain_core.messages.tool import tool_call_chunk

from langchain_cope.engine import CALL_END, JsonScan, overlap

# A call up to the brace that opens its arguments; group 1 is the name, a JSON string.
_CALL_START = re.compile(
    r'\s*\{\s*"name":\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)":\s*(?=\{)'
)


class ReplyStream:
    """The chunks of one message, made from the text of a reply as it comes.

    Thoughts become `additional_kwargs["reasoning_content"]`, which LangChain shows as reasoning
    blocks. A call comes as a chunk with name and id, then as pieces of its arguments. A call that
    was cut, and text between a call's marks that is no call, end up among `invalid_tool_calls`.
    """

    def __init__(
        self, template: dict[str, Any], *, prefix: str, with_calls: bool, whole: bool = False
    ) -> None:
        """Prepare to take a reply apart.

        Args:
            template: `ReplyFormat.template` of the base.
            prefix: the end of the prompt that belongs to the reply, `<think>` for example.
            with_calls: whether calls may be made; otherwise their marks are text.
            whole: whether the reply is the answer, whatever marks it holds.
        """
        from transformers.utils.chat_parsing import ResponseParser

        from langchain_cope.engine import ANSWER, CALLS, THOUGHT, only_answer

        fields = dict(template["fields"])
        if not with_calls:
            fields.pop(CALLS, None)
        template = only_answer() if whole else {**template, "fields": fields}
        self._parser = ResponseParser(template, prefix=prefix)
        self._calls_field = CALLS
        self._read = {ANSWER: self._answer, THOUGHT: self._thought, CALLS: self._call_text}
        self._call: _CallText | None = None
        """The call that the text so far leaves open."""
        self._past_mark = ""
        """Text after an end mark that stands in a string of the call, and so did not end it."""
        self._after_call = False
        self._num_begun = 0
        self.num_calls = 0
        """How many calls are complete."""

    def push(self, text: str) -> list[AIMessageChunk]:
        """Return the chunks for the next piece of text."""
        return self._chunks(self._parser.feed(text))

    def finish(self) -> list[AIMessageChunk]:
        """Return the chunks for what was held back; no more text comes."""
        _, events = self._parser.finalize()
        chunks = self._chunks(events, cut=True)
        if self._call is not None:
            chunks += self._end_call()
        return chunks

    def _chunks(self, events: list[dict[str, Any]], cut: bool = False) -> list[AIMessageChunk]:
        """Return the chunks for the parser's events; `cut`: the end of the reply caused them."""
        chunks: list[AIMessageChunk] = []
        for event in events:
            kind, field = event["type"], event["field"]
            if kind == "region_chunk":
                chunks += self._read[field](event["text"])
            elif kind == "region_open" and field == self._calls_field:
                chunks += self._begin_call()
            elif kind == "region_close" and field == self._calls_field:
                chunks += self._mark_or_end(cut)
        return chunks

    def _begin_call(self) -> list[AIMessageChunk]:
        chunks = [] if self._call is None else self._end_call()
        self._call = _CallText(self._num_begun)
        self._num_begun += 1
        return chunks

    def _mark_or_end(self, cut: bool) -> list[AIMessageChunk]:
        """Return the chunks for an end mark, which in a string of the call is text."""
        if self._call is None:
            return []
        if self._call.in_string and not cut:
            return self._call.push(CALL_END)
        return self._end_call()

    def _answer(self, text: str) -> list[AIMessageChunk]:
        if self._call is not None:
            return self._rest_of_call(text)
        if self._after_call:  # white space between two calls, or before what is said after them
            text = text.lstrip()
            self._after_call = not text
        return [AIMessageChunk(content=text)] if text else []

    def _rest_of_call(self, text: str) -> list[AIMessageChunk]:
        """Return the chunks for text after an end mark that a string of the call holds."""
        assert self._call is not None
        self._past_mark += text
        chunks: list[AIMessageChunk] = []
        while self._past_mark and self._call is not None:
            body, mark, rest = self._past_mark.partition(CALL_END)
            if not mark:
                end = len(body) - overlap(body, CALL_END)
                self._past_mark = body[end:]
                return chunks + self._call.push(body[:end])
            chunks += self._call.push(body)
            self._past_mark = rest
            chunks += self._mark_or_end(cut=False)
        rest, self._past_mark = self._past_mark, ""
        if rest:
            chunks += self._answer(rest)
        return chunks

    def _thought(self, text: str) -> list[AIMessageChunk]:
        return [AIMessageChunk(content="", additional_kwargs={"reasoning_content": text})]

    def _call_text(self, text: str) -> list[AIMessageChunk]:
        return [] if self._call is None else self._call.push(text)

    def _end_call(self) -> list[AIMessageChunk]:
        assert self._call is not None
        chunks = self._call.close()
        if self._call.complete:
            self.num_calls += 1
        self._call = None
        self._after_call = True
        return chunks


class _CallText:
    """One call, read from the text between its marks."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._id = f"call_{uuid.uuid4().hex[:24]}"
        self._body = ""
        self._sent: int | None = None
        """Index in `_body` up to which arguments were passed on; None before the name is known."""
        self._scan = JsonScan()
        """The arguments so far."""
        self.complete = False
        """Whether name and arguments are there."""

    @property
    def in_string(self) -> bool:
        """Whether the text so far ends in a string of the arguments."""
        return self._sent is not None and self._scan.in_string

    def push(self, text: str) -> list[AIMessageChunk]:
        """Return the chunks for the next piece of the text."""
        self._body += text
        chunks = []
        if self._sent is None:
            start = _CALL_START.match(self._body)
            if start is None:
                return []
            self._sent = start.end()
            chunks.append(self._chunk(json.loads(start[1], strict=False), ""))
        arguments = self._more_arguments(self._sent)
        self._sent += len(arguments)
        if arguments:
            chunks.append(self._chunk(None, arguments))
        return chunks

    def close(self) -> list[AIMessageChunk]:
        """Return the chunks for what is left at the end of the text.

        LangChain completes JSON that was cut, and would run the tool with half its arguments. A
        wrong end prevents that.
        """
        if self.complete:
            return []
        if self._sent is not None:
            return [self._chunk(None, self._scan.wrong_end())]
        call = self._reordered()
        if call is not None:
            self.complete = True
            return [call]
        scan = JsonScan()
        scan.push(self._body)
        return [self._chunk(None, self._body.strip() + scan.wrong_end())]

    def _reordered(self) -> AIMessageChunk | None:
        """Return a call with its parts in another order; None if the text is no call at all."""
        try:
            call = json.loads(self._body, strict=False)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        return self._chunk(name, json.dumps(arguments, ensure_ascii=False))

    def _more_arguments(self, start: int) -> str:
        """Return the arguments from `start` on; nothing after the brace that ends them."""
        for index in range(start, len(self._body)):
            if self.complete:
                return self._body[start:index]
            self._scan.push(self._body[index])
            self.complete = not self._scan.open
        return self._body[start:]

    def _chunk(self, name: str | None, arguments: str) -> AIMessageChunk:
        is_first = name is not None or self._sent is None
        call_id = self._id if is_first else None
        chunk = tool_call_chunk(name=name, args=arguments, id=call_id, index=self._index)
        return AIMessageChunk(content="", tool_call_chunks=[chunk])
