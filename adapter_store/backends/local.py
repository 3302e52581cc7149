"""A store in a local folder.

POSIX only: `link(2)` makes a staged, fsynced file appear under its name at once, and fails where
the name is taken; that is the put-if-absent that commits rest on. The folder's file system needs
hard links, and staging and target on one device. Files have mode 0600, folders 0700. No lock files:
they silently do nothing on some network file systems.
"""

import contextlib
import errno
import os
from pathlib import Path

from adapter_store.errors import BackendError
from adapter_store.facts import StoredFile
from adapter_store.layout import STAGING

_MAX_TRIES = 20
_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EFBIG: "files of this size are not allowed here: raise the limit",
    errno.EROFS: "it is on a read-only file system: choose a store on a writable one",
    errno.EACCES: "permission denied: give this user access to the folder, or choose another store",
    errno.EPERM: "not permitted: give this user access, on a file system with hard links, "
    "or choose another store",
    errno.EOPNOTSUPP: "the file system has no hard links: choose a store on another one",
    errno.ENOTDIR: "a file stands where a folder is needed: move it away, or choose another store",
    errno.EISDIR: "a folder stands where a file is needed: move it away, or choose another store",
}


class LocalBackend:
    """Files below one folder ("~" is expanded), which is made at the first write only."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._root = local_path(folder)
        self._prefix = f"{self._root}/"

    @property
    def url(self) -> str:
        """The folder as a file:// URL."""
        return self._root.as_uri()

    def path_of(self, key: str) -> Path:
        """Return where `key` lies on this machine."""
        return Path(self._at(key))

    def get(self, key: str, max_bytes: int) -> bytes:
        """Return at most the first `max_bytes` bytes of a file."""
        path = self._at(key)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                # A buffer of the asked size is allocated at once: ask for no more than the file
                # can give.
                return _read_all(descriptor, min(os.fstat(descriptor).st_size, max_bytes))
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _refused("read", path, error) from error

    def stat(self, key: str) -> StoredFile | None:
        """Return a file's size, time and inode."""
        path = self._at(key)
        try:
            status = os.stat(path)  # noqa: PTH116 - a Path would cost more than the look itself
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _refused("read", path, error) from error
        return StoredFile(status.st_size, status.st_mtime, (status.st_ino, status.st_mtime_ns))

    def put_if_absent(self, key: str, data: bytes) -> None:
        """Stage the file, fsync it, link it to its name, fsync the folder.

        After a crash the file is whole or absent, and it is there where this had returned.
        """
        path = self.path_of(key)
        try:
            for _ in range(_MAX_TRIES):
                # Another process may remove a folder that is empty, at any moment: make it again.
                with contextlib.suppress(FileNotFoundError):
                    return self._put(path, data)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
        except FileExistsError:
            raise
        except OSError as error:
            raise _refused("write", path, error) from error

    def _put(self, path: Path, data: bytes) -> None:
        staged = self._root / STAGING / os.urandom(16).hex()
        _make_folder(staged.parent)
        try:
            _write_durably(staged, data)
            _make_folder(path.parent)
            os.link(staged, path)
        finally:
            with contextlib.suppress(OSError):
                staged.unlink()
        _sync_folder(path.parent)

    def list_folder(self, folder: str) -> list[str]:
        """Return the sorted names in a folder."""
        path = self.path_of(folder)
        try:
            return sorted(os.listdir(path))  # noqa: PTH208 - only names, of up to thousands
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _refused("list", path, error) from error

    def delete(self, key: str) -> None:
        """Remove a file, and its folder where that is empty now."""
        path = self.path_of(key)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _refused("delete", path, error) from error
        with contextlib.suppress(OSError):
            path.parent.rmdir()

    def _at(self, key: str) -> str:
        # As text, not as a Path: this is most of the time that a warm look takes.
        if key.startswith("/") or (".." in key and ".." in key.split("/")):
            raise ValueError(f"{key!r} leads out of the store")
        return self._prefix + key


def local_path(folder: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a folder ("~" expanded); BackendError for an impossible name."""
    text = os.fsdecode(folder)
    if not text or "\0" in text:
        raise BackendError(f"{text!r} is not a path of a folder: give one such as ~/adapters")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise BackendError(
            f"cannot expand the path {text!r} ({error}): write it without ~"
        ) from error


def _read_all(descriptor: int, size: int) -> bytes:
    chunks = []
    while size > 0 and (chunk := os.read(descriptor, size)):
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks) if len(chunks) != 1 else chunks[0]


def _write_durably(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        try:
            new.mkdir(0o700)
        except FileExistsError:
            if new.exists() and not new.is_dir():
                raise NotADirectoryError(
                    errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(new)
                ) from None
        _sync_folder(new.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refused(verb: str, path: str | Path, error: OSError) -> BackendError:
    reason = f"{error.strerror or error}: correct that, or choose another store"
    advice = _ADVICE.get(error.errno or 0, reason)
    # Other errors, such as a network file system's timeout, leave it open whether a write lands.
    return BackendError(f"cannot {verb} {path}: {advice}", refused=error.errno in _ADVICE)
