"""Where in a piece of JSON a text ends, character by character; nothing is checked."""


class JsonScan:
    """Strings and brackets that are open after the text so far."""

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
        quote = '"' if self.in_string else ""
        wrong_bracket = "}" if self.open[-1:] == ["]"] else "]"
        return quote + wrong_bracket

    def copy(self) -> "JsonScan":
        """Return an independent scan at the same position."""
        other = JsonScan()
        other.in_string, other.open, other._escaped = self.in_string, list(self.open), self._escaped
        return other

    def _read_string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self.in_string = False
