"""Plain folders for versions whose store has none: temporary, in this process, removed at exit.

A long-lived server asks for many: beyond a GiB the longest unused go, so a folder is for reading now, not for keeping.
What a killed process left is removed by the next one: each locks its folder for as long as it lives.
"""

import atexit
import contextlib
import os
import stat
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from threading import Lock

from adapter_store.errors import BackendError
from adapter_store.files import remove_tree

MAX_BYTES = 1024**3
_PREFIX = "adapter-store-"
_LOCK = ".lock"
_MIN_FOLDERS = 16  # whatever their size

_lock = Lock()
_folders: dict[int, Path] = {}  # by process, since a forked child must not remove its parent's
_locks: list[int] = []  # held, and never let go
_sizes: OrderedDict[tuple[int, str], int] = (
    OrderedDict()
)  # by process and name, the longest unused first


def write_scratch(name: str, files: Mapping[str, bytes]) -> Path:
    """Return a folder of that name with exactly these files. Equal content may be written again at any time."""
    _make_room(name, sum(map(len, files.values())))
    try:
        folder = _root() / name
        folder.mkdir(0o700, exist_ok=True)
        for file, content in files.items():
            part = folder / f".{os.urandom(6).hex()}"
            part.write_bytes(content)
            part.replace(folder / file)  # a reader of the same version never sees half a file
    except OSError as error:
        raise BackendError(
            f"cannot write an adapter to the temporary folder ({error}): free some space, or point TMPDIR elsewhere"
        ) from error
    return folder


def scratch_names(prefix: str) -> list[str]:
    """Return the names of this process's folders that begin so."""
    root = _folders.get(os.getpid())
    return [] if root is None else [folder.name for folder in root.glob(f"{prefix}*")]


def remove_scratch(name: str) -> None:
    """Remove this process's folder of that name."""
    with _lock:
        _sizes.pop((os.getpid(), name), None)
    if (root := _folders.get(os.getpid())) is not None:
        remove_tree(root / name, ignore_errors=True)


def remove_scratch_everywhere(prefix: str) -> None:
    """Remove all folders whose names begin so, of every process of this user with the same temporary folder."""
    import tempfile  # slow to import, and rarely needed

    for name in scratch_names(prefix):
        remove_scratch(name)
    for root in _ours(Path(tempfile.gettempdir())):
        for folder in root.glob(f"{prefix}*"):
            remove_tree(folder, ignore_errors=True)


def _make_room(name: str, num_bytes: int) -> None:
    process = os.getpid()
    with _lock:
        _sizes[process, name] = num_bytes
        _sizes.move_to_end((process, name))
        mine = [key for key in _sizes if key[0] == process]
        total = sum(_sizes[key] for key in mine)
        for key in mine[:-_MIN_FOLDERS]:
            if total <= MAX_BYTES:
                break
            total -= _sizes.pop(key)
            if process in _folders:
                remove_tree(_folders[process] / key[1], ignore_errors=True)


def _root() -> Path:
    with _lock:
        process = os.getpid()
        if (
            process not in _folders or not _folders[process].is_dir()
        ):  # a cleaner of temporary files may have come
            import tempfile  # slow to import, and rarely needed

            _remove_abandoned(Path(tempfile.gettempdir()))
            while not _hold(folder := Path(tempfile.mkdtemp(prefix=_PREFIX))):
                pass
            _folders[process] = folder
            atexit.register(_remove_all, process)
        return _folders[process]


def _hold(folder: Path) -> bool:
    """Lock a folder until this process ends; False where another took it for an abandoned one in between."""
    try:
        _locks.append(_locked(folder, os.O_CREAT))
    except OSError:
        return False
    return (folder / _LOCK).exists()


def _remove_abandoned(temporary: Path) -> None:
    for folder in _ours(temporary):
        with contextlib.suppress(OSError):  # one whose process lives
            lock = _locked(folder)
            try:
                remove_tree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _locked(folder: Path, flags: int = 0) -> int:
    """Return the descriptor of a folder's lock file, which holds it; OSError where another process does.

    Not a FileLock: one that a forked child inherits lets go of its parent's lock, when the child ends.
    """
    import fcntl  # not on every system

    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _ours(temporary: Path) -> list[Path]:
    """Return the folders of all processes of this user; what others put there under such a name is not touched."""
    found = []
    for folder in temporary.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
                found.append(folder)
    return found


def _remove_all(process: int) -> None:
    if process == os.getpid():
        remove_tree(_folders[process], ignore_errors=True)
