"""Digests of large files, remembered: hashing takes about a second a GB, looking whether a file changed a microsecond.

A digest is remembered under what the file system says of the files: path, device, inode, size, times of content and of
inode. Where any of it differs, or a file is so young that a further write could leave its times as they are, it is
computed anew. The memory is a folder of small files in the user's cache; losing it costs time only.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from platformdirs import user_cache_path

WORTH_BYTES = 64 * 1024**2  # below it hashing is faster than anybody notices
_SETTLED_SECONDS = 2.0  # the coarsest clock of a file system
_SHA256 = re.compile(r"[0-9a-f]{64}")


def remembered(files: list[Path], compute: Callable[[], str]) -> str:
    """Return the hex sha256 that `compute` makes of these files, from memory where they are as they were."""
    marks = _marks(files)
    if sum(size for _, _, _, size, *_ in marks) < WORTH_BYTES:
        return compute()
    place = user_cache_path("langchain-cope", appauthor=False) / "digests" / _name(marks)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found = place.read_text(encoding="ascii").strip()
        if _SHA256.fullmatch(found):
            return found
    digest = compute()
    newest = max(max(changed, moved) for *_, changed, moved in marks) / 1e9
    if marks == _marks(files) and time.time() - newest > _SETTLED_SECONDS:
        _keep(place, digest)
    return digest


def _marks(files: list[Path]) -> list[tuple[str, int, int, int, int, int]]:
    found = [(path.resolve(), path.stat()) for path in files]
    return [
        (str(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        for path, stat in found
    ]


def _name(marks: list[tuple[str, int, int, int, int, int]]) -> str:
    return hashlib.sha256(json.dumps(["fingerprint 1", marks]).encode()).hexdigest()


def _keep(place: Path, digest: str) -> None:
    made = place.with_name(f".{os.urandom(8).hex()}")
    with contextlib.suppress(OSError):  # a cache that cannot be written remembers nothing
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        made.write_text(digest, encoding="ascii")
        made.replace(place)
