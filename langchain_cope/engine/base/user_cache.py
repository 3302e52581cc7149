"""Small facts that took time to find, in the user's cache folder; losing them costs time only."""

import contextlib
import os
from pathlib import Path

from platformdirs import user_cache_path

# RuntimeError: no home folder can be found.
_UNREADABLE = (OSError, RuntimeError, UnicodeDecodeError)


def read_entry(name: Path) -> str | None:
    """Return the text of the entry of that relative path; None where it cannot be read."""
    with contextlib.suppress(*_UNREADABLE):
        return (_folder() / name).read_text(encoding="ascii").strip()
    return None


def write_entry(name: Path, text: str) -> None:
    """Write the entry, whole or not at all; where it cannot be written, do nothing."""
    with contextlib.suppress(*_UNREADABLE):
        entry = _folder() / name
        temporary = entry.with_name(f".{os.urandom(8).hex()}")
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.write_text(text, encoding="ascii")
        temporary.replace(entry)


def _folder() -> Path:
    return user_cache_path("langchain-cope", appauthor=False)
