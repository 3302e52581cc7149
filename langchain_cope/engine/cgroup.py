"""How much memory the control groups of this process leave it: those of a container, say.

The host's own figures do not tell: a container of 1.5 GB on a machine with 19 free is killed at
1.5.
Both versions of Linux's control groups are read; elsewhere there is none.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class _Version:
    mounts: tuple[str, ...]
    """Where its hierarchy may be mounted."""
    limits: tuple[str, ...]
    usage: str
    reclaimable: str
    """In `memory.stat`: the page cache that goes as soon as memory is needed."""


_V1 = _Version(
    ("sys/fs/cgroup/memory",),
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    "total_inactive_file",
)
_V2 = _Version(
    ("sys/fs/cgroup", "sys/fs/cgroup/unified"),
    ("memory.max", "memory.high"),
    "memory.current",
    "inactive_file",
)


def free_in_cgroups(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process could still take within its groups' limits.

    The group with the least left counts, be it the process's own or one around it. None where no
    limit can be read. `root` is the folder that holds `proc` and `sys`.
    """
    left = []
    for version, path in _groups(root / "proc/self/cgroup"):
        for mount in version.mounts:
            own = root / mount / path.lstrip("/")
            # In a container the path may be the host's, and the mount begin at the own group: what
            # does not exist is passed over, and the mount itself is the last of the groups around.
            for folder in (own, *own.parents):
                left += _left(folder, version)
                if folder == root / mount:
                    break
    return min(left, default=None)


def _groups(file: Path) -> Iterator[tuple[_Version, str]]:
    """Yield version and path of each group of the process that may limit its memory."""
    for line in _read(file).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield _V2, path
        elif "memory" in controllers.split(","):
            yield _V1, path


def _left(folder: Path, version: _Version) -> list[int]:
    """Return what each limit of one group leaves; nothing for a limit that is not set."""
    used = _read(folder / version.usage).strip()
    if not used.isdecimal():
        return []
    reclaimable = 0
    for line in _read(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == version.reclaimable:
            reclaimable = int(value)
    limits = [_read(folder / file).strip() for file in version.limits]
    return [max(0, int(limit) - int(used) + reclaimable) for limit in limits if limit.isdecimal()]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
