"""One tool call, read from the text between its marks while it comes."""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

# A call up to the brace that opens its arguments; group 1 is the name, a JSON string.
_CALL_START = re.compile(
    r'\s*\{\s*"name":\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)":\s*(?=\{)'
)


@dataclass(frozen=True)
class CallPart:
    """New text of a tool call."""

    index: int
    """Which call of the reply it belongs to."""
    name: str | None
    """The tool's name, in a call's first part alone; None there too where the text is no call."""
    arguments: str
    """A piece of the arguments' JSON; no JSON at all where the call is invalid."""
    is_first: bool = False


@dataclass(frozen=True)
class Called:
    """A call as far as another one can repeat it."""

    name: str | None
    arguments: Any
    """The JSON value, or the text where it is none."""

    def repeats(self, other: "Called") -> bool:
        """Return whether `other` calls the same tool with the same arguments."""
        return self.name == other.name and _same(self.arguments, other.arguments)


class CallText:
    """The text of one call.

    LangChain completes JSON that was cut, and would run the tool with half its arguments. A wrong
    end prevents that.
    """

    def __init__(self, index: int, earlier: Collection[str | None]) -> None:
        """Start a call.

        Args:
            index: which call of the reply it is.
            earlier: names of the calls before it. A call of one of these may be a repeat: it is
                held back until it is closed.
        """
        self.called = Called(None, "")
        """What is called, once the call is closed."""
        self.valid = False
        """Whether the call may be made, once it is closed."""
        self._index = index
        self._earlier = earlier
        self._body = ""
        self._name: str | None = None
        """None until it is known."""
        self._scan = JsonScan()
        """The arguments so far."""
        self._start = self._read = self._sent = 0
        """Where in `_body` the arguments begin, are read up to, and were passed on up to."""
        self._is_first = True

    @property
    def in_string(self) -> bool:
        """Whether the text so far ends in a string of the arguments."""
        return self._name is not None and self._scan.in_string

    def push(self, text: str) -> list[CallPart]:
        """Return the parts for the next piece of the text."""
        self._body += text
        if self._name is None:
            start = _CALL_START.match(self._body)
            self._name = None if start is None else _json(start[1])
            if start is None or self._name is None:
                return []
            self._start = self._read = self._sent = start.end()
        self._read_arguments()
        return [] if self._name in self._earlier else self._unsent()

    def close(self, *, cut: bool) -> list[CallPart]:
        """Return the parts for what is left; a call that was `cut` is invalid.

        `called` and `valid` are known from now on.
        """
        if self._name is None and not cut:
            self._reorder()
        if self._name is None:
            text = self._body.strip()
            self.called = Called(None, text)
            scan = JsonScan()
            scan.push(text)
            return [self._part(None, text + scan.wrong_end())]
        text = self._body[self._start : self._read]
        arguments = _json(text)
        self.called = Called(self._name, text if arguments is None else arguments)
        self.valid = isinstance(arguments, dict) and not cut
        parts = self._unsent()
        if not self.valid:
            parts.append(self._part(None, self._scan.wrong_end()))
        return parts

    def _reorder(self) -> None:
        """Read a call whose parts stand in another order, if the text is one."""
        call = _json(self._body)
        if not isinstance(call, dict):
            return
        name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
        if isinstance(name, str) and isinstance(arguments, dict):
            self._name = name
            self._body = json.dumps(arguments, ensure_ascii=False)
            self._read_arguments()

    def _read_arguments(self) -> None:
        """Read on, up to the brace that ends the arguments."""
        while self._read < len(self._body) and (self._read == self._start or self._scan.open):
            self._scan.push(self._body[self._read])
            self._read += 1

    def _unsent(self) -> list[CallPart]:
        parts = [self._part(self._name, "")] if self._is_first else []
        arguments = self._body[self._sent : self._read]
        self._sent = self._read
        return [*parts, self._part(None, arguments)] if arguments else parts

    def _part(self, name: str | None, arguments: str) -> CallPart:
        is_first, self._is_first = self._is_first, False
        return CallPart(self._index, name, arguments, is_first)


class JsonScan:
    """Strings and brackets that are open after a piece of JSON; nothing is checked."""

    def __init__(self) -> None:
        self.in_string = False
        """Whether the text ends within a string."""
        self.open: list[str] = []
        """The brackets that would close what is open, the outermost first."""
        self._escaped = False

    def push(self, text: str) -> None:
        """Go on with `text`."""
        for character in text:
            if self.in_string:
                self._read_string(character)
            elif character == '"':
                self.in_string = True
            elif character in "{[":
                self.open.append("}" if character == "{" else "]")
            elif character in "}]" and self.open:
                self.open.pop()

    def wrong_end(self) -> str:
        """Return an end that makes the text invalid, even for readers that complete JSON."""
        escaped = "\\" if self._escaped else ""  # which would take the quote into the string
        quote = f'{escaped}"' if self.in_string else ""
        wrong_bracket = "}" if self.open[-1:] == ["]"] else "]"
        return quote + wrong_bracket

    def _read_string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self.in_string = False


def _json(text: str) -> Any:
    """Return the value of `text`; None where Python reads none."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def _same(one: Any, other: Any) -> bool:
    """Return whether two JSON values are equal; to Python, 1 and true are, too."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
