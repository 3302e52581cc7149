"""Files and folders that appear whole or not at all: a crash leaves no half-written work.

Names that begin with a dot are unfinished work.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder to fill with files, which becomes `folder` when the block ends.

    Where the block raises, what was written is removed and `folder` does not appear.
    """
    with TemporaryDirectory(dir=folder.parent, prefix=".") as scratch:
        unfinished = Path(scratch) / folder.name
        unfinished.mkdir()
        yield unfinished
        for path in (*unfinished.iterdir(), unfinished):
            _sync(path)
        unfinished.rename(folder)
    _sync(folder.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to `path`, in place of what is there."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(json.dumps(value), encoding="utf-8")
    _sync(unfinished)
    unfinished.replace(path)
    _sync(path.parent)


def read_json(path: Path) -> Any:
    """Return what `write_json` wrote to `path`."""
    return json.loads(path.read_text(encoding="utf-8"))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
