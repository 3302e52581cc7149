"""A reply taken apart while it comes: thoughts, answer and tool calls as chunks of a message."""

import json
import re
import uuid
from typing import Any

from langchain_core.messages import AIMessageChunk
from langchain_core.messages.tool import tool_call_chunk

from langchain_cope.engine.json_scan import JsonScan

_HEAD = re.compile(r'\s*\{\s*"name":\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)":\s*(?=\{)')


class ReplyStream:
    """Chunks of one message, from the text of a reply as it comes.

    Thoughts become ``additional_kwargs["reasoning_content"]``, which LangChain shows as reasoning blocks. A call comes as a chunk
    with name and id, then as pieces of its arguments. What is no call, or was cut, ends up among ``invalid_tool_calls``.
    """

    def __init__(self, template: dict[str, Any], *, prefix: str, with_calls: bool) -> None:
        """``template``: `ReplyFormat.template`. ``prefix``: the end of the prompt that is part of the reply, ``<think>`` say."""
        from transformers.utils.chat_parsing import ResponseParser

        from langchain_cope.engine.reply_format import ANSWER, CALLS, THOUGHT

        fields = {name: field for name, field in template["fields"].items() if with_calls or name != CALLS}
        self._parser = ResponseParser({**template, "fields": fields}, prefix=prefix)
        self._ways = {ANSWER: self._answer, THOUGHT: self._thought, CALLS: self._call_text}
        self._calls_field = CALLS
        self._call: _CallText | None = None
        self.num_calls = 0
        self._after_call = False

    def push(self, text: str) -> list[AIMessageChunk]:
        """Chunks for the next piece of text."""
        return self._chunks(self._parser.feed(text))

    def finish(self) -> list[AIMessageChunk]:
        """Chunks for what was held back, once no more text comes."""
        _, events = self._parser.finalize()
        return self._chunks(events)

    def _chunks(self, events: list[dict[str, Any]]) -> list[AIMessageChunk]:
        found: list[AIMessageChunk] = []
        for event in events:
            calls = event["field"] == self._calls_field
            if event["type"] == "region_open" and calls:
                self._call = _CallText(self.num_calls)
                self.num_calls += 1
            elif event["type"] == "region_chunk":
                found += self._ways[event["field"]](event["text"])
            elif event["type"] == "region_close" and calls and self._call is not None:
                found += self._call.close()
                self._call, self._after_call = None, True
        return found

    def _answer(self, text: str) -> list[AIMessageChunk]:
        if self._after_call and not text.strip():
            return []  # between two calls
        return [AIMessageChunk(content=text)]

    def _thought(self, text: str) -> list[AIMessageChunk]:
        return [AIMessageChunk(content="", additional_kwargs={"reasoning_content": text})]

    def _call_text(self, text: str) -> list[AIMessageChunk]:
        return [] if self._call is None else self._call.push(text)


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
        self._complete = False

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
        if self._complete:
            return []
        if self._sent is not None:
            return [self._chunk(None, self._scan.wrong_end())]
        if whole := self._whole():
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
            if self._complete:
                return self._body[start:place]
            self._scan.push(self._body[place])
            self._complete = not self._scan.open
        return self._body[start:]

    def _chunk(self, name: str | None, arguments: str) -> AIMessageChunk:
        first = name is not None or self._sent is None
        chunk = tool_call_chunk(name=name, args=arguments, id=self._id if first else None, index=self._index)
        return AIMessageChunk(content="", tool_call_chunks=[chunk])
