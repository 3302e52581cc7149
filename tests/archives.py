"""The members of a user's tar archive, read and written again with changes."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

Member = tuple[tarfile.TarInfo, bytes | None]


def members(path: Path) -> list[Member]:
    with tarfile.open(path) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]


def rewrite(path: Path, rows: list[Member]) -> None:
    with tarfile.open(path, "w") as tar:
        for member, data in rows:
            if data is not None and member.isreg():
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data or b""))


def manifest_of(rows: list[Member]) -> dict[str, Any]:
    return json.loads(rows[0][1])


def changed_manifest(rows: list[Member], **changes: Any) -> list[Member]:
    content = {**manifest_of(rows), **changes}
    return [(rows[0][0], json.dumps(content).encode()), *rows[1:]]
