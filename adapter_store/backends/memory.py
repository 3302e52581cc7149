"""A store in this process's memory, for tests and notebooks: other processes do not see it."""

import itertools
import threading
import time
from dataclasses import dataclass
from typing import Union

from adapter_store.facts import StoredFile


@dataclass(frozen=True)
class _File:
    content: bytes
    modified: float
    number: int


_Tree = dict[str, Union["_Tree", _File]]


class MemoryBackend:
    """A tree of dicts under a lock, gone with the process.

    `MemoryBackend.shared(name)` gives the same one to all who name it.
    """

    # One dict for the process, which is what it is for.
    _by_name: dict[str, "MemoryBackend"] = {}  # noqa: RUF012
    _by_name_lock = threading.Lock()

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._tree: _Tree = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count()

    @classmethod
    def shared(cls, name: str) -> "MemoryBackend":
        """Return this process's backend of that name, made at the first call."""
        with cls._by_name_lock:
            return cls._by_name.setdefault(name, cls(name))

    @property
    def url(self) -> str:
        """`memory://name`."""
        return f"memory://{self._name}"

    def get(self, key: str, max_bytes: int) -> bytes:
        """Return at most the first `max_bytes` bytes of what was put."""
        file = self._file(key)
        if file is None:
            raise FileNotFoundError(key)
        return file.content[:max_bytes]

    def stat(self, key: str) -> StoredFile | None:
        """Return size and time of what was put, and the number of that put."""
        file = self._file(key)
        return None if file is None else StoredFile(len(file.content), file.modified, file.number)

    def put_if_absent(self, key: str, data: bytes) -> None:
        """Keep `data` under `key`."""
        folders, name = _split(key)
        with self._lock:
            tree = self._tree
            for folder in folders:
                below = tree.setdefault(folder, {})
                if isinstance(below, _File):
                    raise FileExistsError(key)
                tree = below
            if name in tree:
                raise FileExistsError(key)
            tree[name] = _File(bytes(data), time.time(), next(self._numbers))

    def list_folder(self, folder: str) -> list[str]:
        """Return the sorted names in a folder."""
        with self._lock:
            return sorted(self._folder(folder.split("/")))

    def delete(self, key: str) -> None:
        """Forget `key`, and the folders that it leaves empty."""
        folders, name = _split(key)
        with self._lock:
            self._folder(folders).pop(name, None)
            while folders and not self._folder(folders):
                self._folder(folders[:-1]).pop(folders.pop(), None)

    def _file(self, key: str) -> _File | None:
        folders, name = _split(key)
        with self._lock:
            file = self._folder(folders).get(name)
        return file if isinstance(file, _File) else None

    def _folder(self, folders: list[str]) -> _Tree:
        tree = self._tree
        for name in folders:
            below = tree.get(name, {})
            tree = below if isinstance(below, dict) else {}
        return tree


def _split(key: str) -> tuple[list[str], str]:
    *folders, name = key.split("/")
    return folders, name
