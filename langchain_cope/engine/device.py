"""What a device and its libraries hold: memory, pages of a checkpoint, pools of idle threads."""

import ctypes
import functools
import math
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor

from langchain_cope.engine.cgroup import cores_in_cgroups, free_in_cgroups

_OMP_PAUSE_SOFT = 1  # threads go, settings stay


def free_bytes(device: torch.device) -> int:
    """Return the bytes of `device` that could be taken now: on a CPU within a container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    of_host = int(psutil.virtual_memory().available)
    of_groups = free_in_cgroups()
    return of_host if of_groups is None else min(of_host, of_groups)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether `error` says that an allocation failed."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # On a CPU torch has no class of its own for it.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def give_back(device: torch.device) -> None:
    """Return freed memory that torch, or the C library, holds in reserve to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        # glibc reserves what a thread frees (the engine's, say) for that thread.
        trim(ctypes.c_size_t(0))


def limit_threads() -> None:
    """Let torch compute with no more threads than a container has cores' time for.

    More of them use that time up together, and then all of them stand still. What the user has set
    stays: `OMP_NUM_THREADS`, or fewer threads.
    """
    cores = cores_in_cgroups()
    if cores is not None and "OMP_NUM_THREADS" not in os.environ:
        most = max(1, math.ceil(cores))
        if torch.get_num_threads() > most:
            torch.set_num_threads(most)


class CheckpointPages:
    """Pages of safetensors files that this process has mapped (on Linux; elsewhere empty)."""

    def __init__(self) -> None:
        maps = Path("/proc/self/maps")
        lines = maps.read_text(encoding="utf-8").splitlines() if maps.exists() else []
        areas = [line.split()[0].split("-") for line in lines if line.endswith(".safetensors")]
        self._areas = [(int(start, 16), int(end, 16)) for start, end in areas]

    def release(self, tensor: Tensor) -> None:
        """Take the pages of `tensor` out of memory where they lie in such a file.

        They are read from the file again where they are needed again.
        """
        start = tensor.data_ptr()
        end = start + tensor.numel() * tensor.element_size()
        if not any(low <= start and end <= high for low, high in self._areas):
            return
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = end // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED
            )


def release_thread_pool() -> None:
    """End the idle OpenMP threads of the calling thread; its next parallel product starts new ones.

    Only GNU OpenMP (torch's builds for Linux) needs it; elsewhere nothing happens. There every
    thread that runs a parallel product gets a pool of its own and keeps it. As soon as the pools
    together have more threads than the machine has cores, libgomp lets a waiting thread sleep
    after a microsecond instead of milliseconds, and waking it costs more than most products of a
    step: one of a 134-million-parameter base took 71 ms beside an idle pool, 42 ms without. The
    engine's thread does the steps, so a thread that hands it work lets go of its own pool first.
    """
    if pause := _omp_pause():
        pause()


def limit_own_threads(number: int, of_others: int) -> None:
    """Let products of the calling thread run on `number` threads.

    torch keeps a number for each thread, and one for threads to come: that stays `of_others`.
    """
    torch.set_num_threads(number)
    keeper = threading.Thread(target=torch.set_num_threads, args=(of_others,))
    keeper.start()
    keeper.join()
    release_thread_pool()


@functools.cache
def _omp_pause() -> Callable[[], object] | None:
    """Return `omp_pause_resource_all` of the libgomp that torch has loaded, if there is one."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        paths = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line}
        torch_folder = str(Path(torch.__file__).parent)
        path = min(paths, key=lambda p: not p.startswith(torch_folder))
        pause = ctypes.CDLL(path).omp_pause_resource_all
    except (OSError, ValueError, AttributeError):  # not Linux, no libgomp, or one before OpenMP 5.0
        return None
    return functools.partial(pause, _OMP_PAUSE_SOFT)
