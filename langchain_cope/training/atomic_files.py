"""What a stage leaves behind appears whole or not at all: a crash leaves nothing half done under a stage's name.

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
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill with files; it becomes ``folder`` when the block ends, and is gone where the block raises."""
    with TemporaryDirectory(dir=folder.parent, prefix=".") as scratch:
        part = Path(scratch) / folder.name
        part.mkdir()
        yield part
        for path in (*part.iterdir(), part):
            _sync(path)
        part.rename(folder)
    _sync(folder.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON to ``path``, over what is there."""
    part = path.with_name(f".{path.name}")
    part.write_text(json.dumps(value), encoding="utf-8")
    _sync(part)
    part.replace(path)
    _sync(path.parent)


def read_json(path: Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
