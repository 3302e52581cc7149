"""Text that people wrote, or a model did, made safe for a terminal: it may hold escape sequences."""

import json
import math
import sys
import unicodedata
from typing import Any

_DIRECTION = {
    *map(chr, range(0x202A, 0x202F)),
    *map(chr, range(0x2066, 0x206A)),
}  # they reorder what follows
_BREAKS = {"\u2028", "\u2029"}


def clean(text: str, *, keep: str = "") -> str:
    """``text`` with control characters written out in hexadecimal; those in ``keep`` stay as they are."""
    return "".join(char if char in keep or not _acts(char) else _spelled(char) for char in text)


def one_line(text: str) -> str:
    """``text`` in one safe line: every run of white space is one blank."""
    return clean(" ".join(text.split()))


def shorten(text: str, limit: int = 60) -> str:
    """``text`` in one safe line of at most ``limit`` characters, "…" standing for the rest."""
    line = one_line(text[: 8 * limit])
    return (
        line if len(line) <= limit and len(text) <= 8 * limit else line[: limit - 1].rstrip() + "…"
    )


def name_of(user_id: str) -> str:
    """A user id as people see it: as it is where it is plain, quoted and shortened where it is not."""
    line = clean(user_id)
    if len(line) > 60:
        return f"{line[:40]}… ({len(user_id)} characters)"
    return repr(line) if line != " ".join(line.split()) or not line else line


def print_json(value: Any) -> None:
    """Print one JSON object on standard output; NaN and infinities become null."""
    print(
        json.dumps(finite(value), indent=2, default=str, allow_nan=False),
        file=sys.stdout,
        flush=True,
    )


def finite(value: Any) -> Any:
    """``value`` with None in place of every number that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


def _acts(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs") or char in _DIRECTION or char in _BREAKS


def _spelled(char: str) -> str:
    number = ord(char)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
