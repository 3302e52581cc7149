"""Plain folders for versions of stores that have none: temporary, of this process, removed at exit.

A long-lived server asks for many: beyond a GiB the longest unused go, so a folder is for reading
now, not for keeping. What a killed process left is removed by the next one: each locks its folder
for as long as it lives.
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
_locks: list[int] = []  # held, and never released
# By process and name, the longest unused first.
_sizes: OrderedDict[tuple[int, str], int] = OrderedDict()


def write_scratch(name: str, files: Mapping[str, bytes]) -> Path:
    """Return a folder of that name with exactly these files.

    Equal content may be written again at any time.
    """
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
            f"cannot write an adapter to the temporary folder ({error}): free some space, "
            "or point TMPDIR elsewhere"
        ) from error
    return folder


def scratch_names(prefix: str) -> list[str]:
    """Return the names of this process's folders that begin with `prefix`."""
    root = _folders.get(os.getpid())
    return [] if root is None else [folder.name for folder in root.glob(f"{prefix}*")]


def remove_scratch(name: str) -> None:
    """Remove this process's folder of that name."""
    with _lock:
        _sizes.pop((os.getpid(), name), None)
    root = _folders.get(os.getpid())
    if root is not None:
        remove_tree(root / name, ignore_errors=True)


def remove_scratch_everywhere(prefix: str) -> None:
    """Remove all folders that begin with `prefix`, of every process of this user.

    Processes with another temporary folder are not seen.
    """
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
        root = _folders.get(process)
        if root is None or not root.is_dir():  # a cleaner of temporary files may have come
            root = _new_root()
            _folders[process] = root
            atexit.register(_remove_all, process)
        return root


def _new_root() -> Path:
    import tempfile  # slow to import, and rarely needed

    _remove_abandoned(Path(tempfile.gettempdir()))
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        if _hold(folder):
            return folder


def _hold(folder: Path) -> bool:
    """Lock a folder until this process ends; return False where another has removed it meanwhile.

    That one took it for an abandoned folder.
    """
    try:
        _locks.append(_locked(folder, os.O_CREAT))
    except OSError:
        return False
    return (folder / _LOCK).exists()


def _remove_abandoned(temporary: Path) -> None:
    for folder in _ours(temporary):
        with contextlib.suppress(OSError):  # its process lives
            lock = _locked(folder)
            try:
                remove_tree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _locked(folder: Path, flags: int = 0) -> int:
    """Return the descriptor of a folder's lock file, which holds the lock.

    OSError where another process holds it. Not a FileLock: one that a forked child inherits
    releases its parent's lock when the child ends.
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
    """Return the folders of all processes of this user, and none of what others put there."""
    folders = []
    for folder in temporary.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
                folders.append(folder)
    return folders


def _remove_all(process: int) -> None:
    if process == os.getpid():
        remove_tree(_folders[process], ignore_errors=True)
