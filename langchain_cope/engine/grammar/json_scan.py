"""Where in a piece of JSON one is, character by character; nothing is checked."""


class JsonScan:
    """Strings and brackets that are open after what was pushed."""

    def __init__(self) -> None:
        self.in_string = False
        self.open: list[str] = []
        """The brackets that would close what is open, the outermost first."""
        self._escaped = False

    def push(self, text: str) -> None:
        """Go on with ``text``."""
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
        """An end that no reader can take for one, not even one that completes what was cut."""
        return ('"' if self.in_string else "") + ("}" if self.open[-1:] == ["]"] else "]")

    def copy(self) -> "JsonScan":
        """Another one at the same place."""
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
