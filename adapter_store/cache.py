"""A read-through cache of adapters on this machine, for any number of processes, limited by bytes.

    <folder>/<store id>/<user key>/<version>/   the two files, sealed where the storage has them so
    <folder>/tmp/                               what is being written or removed; never read

A version is written in tmp/ and renamed into place, and renamed away before it is removed, so that
it is there whole or not at all, whichever process is killed when. What is read is checked by the
store each time as if it came from the storage: a damaged copy costs a download, never an answer.
File locks only keep two processes from fetching the same thing; nothing is wrong where they do not
work. The time of a version's folder is when it was last used; the longest unused go first.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from adapter_store.backends.local import local_path
from adapter_store.files import remove_tree
from adapter_store.layout import ADAPTER_FILES
from adapter_store.text import shorten

_TMP = "tmp"
_GONE = "gone-"  # begins the names of what is being removed
_FULL, _AFTER_EVICTION = 1.0, 0.9  # shares of the limit
_SCAN_EVERY = 0.05  # of the limit, in bytes written by this process
_STALE_SECONDS = 3600.0  # age of something in tmp/ that no living process needs
_LOCK_SECONDS = 60.0


class AdapterCache:
    """Adapters kept in a local folder, about `max_bytes` of them.

    Thread-safe; processes may share it.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int = 10 * 1024**3) -> None:
        if not isinstance(max_bytes, int) or max_bytes < 1:
            raise ValueError(
                f"max_bytes is {shorten(max_bytes)}, expected a whole number of at least 1"
            )
        self._folder = local_path(folder)
        self._max_bytes = max_bytes
        self._unscanned = float("inf")  # the first write looks at what others left

    def __repr__(self) -> str:
        return f"AdapterCache({str(self._folder)!r}, max_bytes={self._max_bytes})"

    def read(
        self, store_id: str, user_key: str, version: str, sizes: Mapping[str, int]
    ) -> dict[str, bytes] | None:
        """Return a version's files, None where they are not here with these sizes."""
        folder = self._version(store_id, user_key, version)
        try:
            if any((folder / name).stat().st_size != size for name, size in sizes.items()):
                return None
            files = {name: (folder / name).read_bytes() for name in ADAPTER_FILES}
            os.utime(folder)
        except OSError:
            return None
        return files

    def write(self, store_id: str, user_key: str, version: str, files: Mapping[str, bytes]) -> None:
        """Keep a version's files, or nothing where the cache cannot be written."""
        staged = self._folder / _TMP / os.urandom(16).hex()
        with contextlib.suppress(OSError):
            try:
                staged.mkdir(parents=True, mode=0o700)
                for name, data in files.items():
                    _write_new(staged / name, data)
                target = self._version(store_id, user_key, version)
                self._remove(target)  # one that could not be used
                target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                staged.rename(target)  # fails where another process was faster
            finally:
                remove_tree(staged, ignore_errors=True)
            self._unscanned += sum(map(len, files.values()))
            if self._unscanned > self._max_bytes * _SCAN_EVERY:
                self.evict()

    def drop(self, store_id: str, user_key: str, version: str | None = None) -> None:
        """Remove a version, or everything of a user.

        OSError where a copy that must go cannot be removed.
        """
        if version is None:
            self._remove(self._folder / store_id / user_key)
            self._sweep()
        else:
            self._remove(self._version(store_id, user_key, version))

    def users(self, store_id: str) -> list[str]:
        """Return the keys of the users who have a copy here."""
        return sorted(path.name for path in _folders(self._folder / store_id))

    def versions(self, store_id: str, user_key: str) -> list[str]:
        """Return the versions of a user that are here."""
        return sorted(path.name for path in _folders(self._folder / store_id / user_key))

    @contextlib.contextmanager
    def fetching(self, store_id: str, user_key: str, version: str) -> Iterator[None]:
        """Keep others from fetching the same version meanwhile; for a while, where locks work."""
        from filelock import FileLock, Timeout

        path = self._folder / _TMP / f"{store_id[:16]}-{user_key[:32]}-{version}.lock"
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError, Timeout, NotImplementedError):
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                stack.enter_context(FileLock(path, timeout=_LOCK_SECONDS))
            yield
        with contextlib.suppress(OSError):
            path.unlink()

    def num_bytes(self) -> int:
        """Return how many bytes of adapters are here."""
        return sum(size for _, size, _ in self._all())

    def evict(self) -> None:
        """Remove what is over the limit, longest unused first, and what killed processes left."""
        self._unscanned = 0
        self._sweep()
        copies = sorted(self._all())
        total = sum(size for _, size, _ in copies)
        if total <= self._max_bytes * _FULL:
            return
        for _, size, folder in copies:
            if total <= self._max_bytes * _AFTER_EVICTION:
                break
            with contextlib.suppress(OSError):
                self._remove(folder)
                total -= size

    def _version(self, store_id: str, user_key: str, version: str) -> Path:
        return self._folder / store_id / user_key / version

    def _all(self) -> list[tuple[float, int, Path]]:
        """Return (last used, bytes, folder) of every version."""
        copies = []
        for store in _folders(self._folder):
            if store.name == _TMP:
                continue
            for user in _folders(store):
                for version in _folders(user):
                    with contextlib.suppress(OSError):  # another process may be removing it
                        size = sum(file.stat().st_size for file in version.iterdir())
                        copies.append((version.stat().st_mtime, size, version))
        return copies

    def _remove(self, folder: Path) -> None:
        """Rename a folder into tmp/, which is atomic, then delete it."""
        gone = self._folder / _TMP / f"{_GONE}{os.urandom(16).hex()}"
        try:
            gone.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.rename(gone)
        except FileNotFoundError:
            return
        remove_tree(gone)
        with contextlib.suppress(OSError):  # the user's folder, where it is empty now
            folder.parent.rmdir()

    def _sweep(self) -> None:
        """Remove what killed processes were writing a while ago, or were removing."""
        old = time.time() - _STALE_SECONDS
        with contextlib.suppress(OSError):
            for path in (self._folder / _TMP).iterdir():
                with contextlib.suppress(OSError):
                    if not path.name.startswith(_GONE) and path.stat().st_mtime >= old:
                        continue
                    if path.suffix == ".lock":
                        path.unlink()
                    else:
                        remove_tree(path)


def _write_new(path: Path, data: bytes) -> None:
    """Write a new file that only its owner may read."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def _folders(folder: Path) -> list[Path]:
    try:
        entries = os.scandir(folder)
        return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
