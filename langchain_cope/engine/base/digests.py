"""Digests of large files, cached: hashing takes a second a GB, a look at a file a microsecond.

A digest is cached under what the file system says of the files: path, device, inode, size, times
of content and of inode. Where any of it differs, or a file is so young that a further write could
leave its times as they are, it is computed anew. The cache is this process's memory and, for what
takes long, a folder of small files in the user's cache folder; losing it costs time only.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

from langchain_cope.engine.base.user_cache import read_entry, write_entry

WORTH_BYTES = 64 * 1024**2
"""Bytes below which hashing is too fast to be worth a file."""
_SETTLED_SECONDS = 2.0  # tick of the coarsest clock of a file system
_SHA256 = re.compile(r"[0-9a-f]{64}")

_computed: dict[str, str] = {}  # in this process, by name

_FileState = tuple[str, int, int, int, int, int]
"""Path, device, inode, size, time of content and time of inode, in bytes and nanoseconds."""


def cached_digest(files: list[Path], compute: Callable[[], str]) -> str:
    """Return the hex sha256 of `files`, from the cache where they are unchanged.

    Args:
        files: what `compute` reads.
        compute: makes the digest; called where none is cached.
    """
    states = _states(files)
    name = _name(states)
    if name in _computed:
        return _computed[name]
    entry = Path("digests") / name
    is_worth = sum(size for _, _, _, size, _, _ in states) >= WORTH_BYTES
    cached = read_entry(entry) if is_worth else None
    if cached is not None and _SHA256.fullmatch(cached):
        _computed[name] = cached
        return cached
    digest = compute()
    newest = max(max(content, inode) for *_, content, inode in states) / 1e9
    if states == _states(files) and time.time() - newest > _SETTLED_SECONDS:
        _computed[name] = digest
        if is_worth:
            write_entry(entry, digest)
    return digest


def _states(files: list[Path]) -> list[_FileState]:
    states = []
    for file in files:
        path, stat = str(file.resolve()), file.stat()
        identity = (path, stat.st_dev, stat.st_ino)
        states.append((*identity, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return states


def _name(states: list[_FileState]) -> str:
    return hashlib.sha256(json.dumps(["fingerprint 1", states]).encode()).hexdigest()
