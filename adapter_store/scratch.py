"""Plain folders for versions whose store has none: temporary, for this process's lifetime, removed at exit."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from threading import Lock

from adapter_store.errors import BackendError

_lock = Lock()
_folders: dict[int, Path] = {}  # by process, since a forked child must not remove its parent's


def write_scratch(name: str, files: Mapping[str, bytes]) -> Path:
    """Return a folder of that name with exactly these files. Equal content may be written again at any time."""
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


def remove_scratch(name: str) -> None:
    """Remove the folder of that name, if this process wrote one."""
    if (root := _folders.get(os.getpid())) is not None:
        shutil.rmtree(root / name, ignore_errors=True)


def _root() -> Path:
    with _lock:
        process = os.getpid()
        if process not in _folders:
            _folders[process] = Path(tempfile.mkdtemp(prefix="adapter-store-"))
            atexit.register(_remove_all, process)
        return _folders[process]


def _remove_all(process: int) -> None:
    if process == os.getpid():
        shutil.rmtree(_folders[process], ignore_errors=True)
