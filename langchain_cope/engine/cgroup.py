"""What the control groups of this process leave it, those of a container, say: memory, cores.

The host's own figures do not tell: a container of 1.5 GB on a machine with 19 free is killed at
1.5, and one of two cores on a machine with 64 stands still while 64 threads have used up its time.
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
_CPU_MOUNTS = ("sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct")  # of the first version


def free_in_cgroups(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process could still take within its groups' limits.

    The group with the least left counts, be it the process's own or one around it. None where no
    limit can be read. `root` is the folder that holds `proc` and `sys`.
    """
    left = []
    for is_second, folder in _folders(root, "memory", _V1.mounts):
        left += _left(folder, _V2 if is_second else _V1)
    return min(left, default=None)


def cores_in_cgroups(root: Path = Path("/")) -> float | None:
    """Return how many cores' time this process may use within its groups' limits.

    The group with the least counts. None where no limit can be read. `root` is the folder that
    holds `proc` and `sys`.
    """
    cores = []
    for is_second, folder in _folders(root, "cpu", _CPU_MOUNTS):
        names = ("cpu.max",) if is_second else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = " ".join(_read(folder / name) for name in names).split()
        if len(words) == 2 and all(map(str.isdecimal, words)) and int(words[1]):  # -1, max: none
            cores.append(int(words[0]) / int(words[1]))
    return min(cores, default=None)


def _folders(root: Path, controller: str, mounts: tuple[str, ...]) -> Iterator[tuple[bool, Path]]:
    """Yield the folders of the groups of the process, its own and those around it.

    With each comes whether it is of the second version; those of the first lie in `mounts`.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for mount in mounts if controllers else _V2.mounts:
            own = root / mount / path.lstrip("/")
            # In a container the path may be the host's, and the mount begin at the own group: what
            # does not exist is passed over, and the mount itself is the last of the groups around.
            for folder in (own, *own.parents):
                yield not controllers, folder
                if folder == root / mount:
                    break


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
