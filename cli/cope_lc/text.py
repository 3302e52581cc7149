"""What is printed, made safe: text that people or a model wrote, and numbers in JSON.

Such text may hold escape sequences, which a terminal would obey.
"""

import math
import unicodedata
from typing import Any

# Control characters of bidirectional text: they reorder what follows.
_DIRECTION = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
_LINE_BREAKS = {"\u2028", "\u2029"}
_LONGEST_NAME = 60


def clean(text: str, *, keep: str = "") -> str:
    """Return `text` with its control characters in hexadecimal, those in `keep` as they are."""
    return "".join(
        char if char in keep or not _is_control(char) else _in_hexadecimal(char) for char in text
    )


def one_line(text: str) -> str:
    """Return `text` as one safe line: every run of white space is one blank."""
    return clean(" ".join(text.split()))


def shorten(text: str, limit: int = 60) -> str:
    """Return `text` as one safe line of at most `limit` characters, "…" standing for the rest."""
    beginning = text[: 8 * limit]  # enough for the line, however long the text is
    line = one_line(beginning)
    if len(line) <= limit and beginning == text:
        return line
    return line[: limit - 1].rstrip() + "…"


def name_of(user_id: str) -> str:
    """Return a user id for people: a plain one as it is, others quoted, long ones shortened."""
    line = clean(user_id)
    if len(line) > _LONGEST_NAME:
        return f"{line[:40]}… ({len(user_id)} characters)"
    is_plain = line != "" and line == " ".join(line.split())
    return line if is_plain else repr(line)


def plural(number: int, noun: str) -> str:
    """Return a count with its noun: "1 user", "2 users"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def print_json(value: Any) -> None:
    """Print one JSON object on standard output; NaN and infinities become null."""
    import json  # the help needs none

    print(json.dumps(finite(value), indent=2, default=str, allow_nan=False), flush=True)


def finite(value: Any) -> Any:
    """Return `value` with None in place of every number that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


def _is_control(char: str) -> bool:
    is_category = unicodedata.category(char) in ("Cc", "Cs")
    return is_category or char in _DIRECTION or char in _LINE_BREAKS


def _in_hexadecimal(char: str) -> str:
    number = ord(char)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
