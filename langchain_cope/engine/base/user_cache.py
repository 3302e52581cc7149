"""The package's folder in the user's cache, and small facts in it that took time to find.

Losing any of it costs time only.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from platformdirs import user_cache_path

# RuntimeError: no home folder can be found.
_UNREADABLE = (OSError, RuntimeError, UnicodeDecodeError)


def kept_fact(
    kind: str, circumstances: str, is_known: Callable[[str], bool], find: Callable[[], str]
) -> str:
    """Return a fact that takes time to find: the kept one, or what `find` returns, kept from now.

    Args:
        kind: the folder of such facts.
        circumstances: what the fact depends on.
        is_known: tells whether a kept text is such a fact; any other is found anew.
        find: finds it.
    """
    entry = Path(kind) / hashlib.sha256(circumstances.encode()).hexdigest()
    kept = read_entry(entry)
    if kept is not None and is_known(kept):
        return kept
    found = find()
    write_entry(entry, found)
    return found


def read_entry(name: Path) -> str | None:
    """Return the text of the entry of that relative path; None where it cannot be read."""
    with contextlib.suppress(*_UNREADABLE):
        return (cache_folder() / name).read_text(encoding="ascii").strip()
    return None


def write_entry(name: Path, text: str) -> None:
    """Write the entry, whole or not at all; where it cannot be written, do nothing."""
    with contextlib.suppress(*_UNREADABLE):
        entry = cache_folder() / name
        temporary = entry.with_name(f".{os.urandom(8).hex()}")
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.write_text(text, encoding="ascii")
        temporary.replace(entry)


def cache_folder() -> Path:
    """Return this package's folder in the user's cache, which may not be there yet."""
    return user_cache_path("langchain-cope", appauthor=False)
