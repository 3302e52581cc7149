"""One pool of torch's threads at a time, where torch runs on GNU OpenMP (its builds for Linux).

Every thread of a process that runs a parallel product gets a pool of its own, and keeps it. As soon as the pools together have more
threads than the machine has cores, libgomp lets a waiting thread sleep after a microsecond instead of milliseconds, and waking it
costs more than most products of a step: one of a 134-million-parameter base took 71 ms beside an idle pool, 42 ms without.
The engine's thread does the steps, so whoever hands it work first lets go of the pool that its own thread may have.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch

_SOFT = 1  # omp_pause_soft: threads go, settings stay


def release_pool() -> None:
    """End the idle OpenMP threads of the calling thread; its next parallel product starts new ones. Harmless everywhere else."""
    if pause := _pause():
        pause()


@functools.cache
def _pause() -> Callable[[], object] | None:
    """``omp_pause_resource_all`` of the libgomp that torch has loaded, or None where there is none."""
    try:
        loaded = Path("/proc/self/maps").read_text(encoding="utf-8")
        paths = {line.split()[-1] for line in loaded.splitlines() if "libgomp" in line}
        torch_folder = str(Path(torch.__file__).parent)
        path = min(paths, key=lambda p: not p.startswith(torch_folder))
        pause = ctypes.CDLL(path).omp_pause_resource_all
    except (OSError, ValueError, AttributeError):  # not Linux, no libgomp, or one before OpenMP 5.0
        return None
    return functools.partial(pause, _SOFT)
