"""How much memory a device has left, what running out of it looks like, and pages of a checkpoint that nobody reads any more."""

import ctypes
import mmap
from pathlib import Path

import psutil
import torch
from torch import Tensor


def free_bytes(device: torch.device) -> int:
    """Memory of ``device`` that could be taken now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that an allocation failed; torch has no class of its own for that on a CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def give_back(device: torch.device) -> None:
    """Return to the system what torch, or the C library, holds in reserve of memory that was let go."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        # glibc keeps what one thread let go for that thread, as the engine's, while another takes new memory.
        trim(ctypes.c_size_t(0))


class CheckpointPages:
    """Pages of safetensors files that this process has mapped (Linux; elsewhere there are none to let go of)."""

    def __init__(self) -> None:
        maps = Path("/proc/self/maps")
        lines = maps.read_text(encoding="utf-8").splitlines() if maps.exists() else []
        areas = [line.split()[0].split("-") for line in lines if line.endswith(".safetensors")]
        self._areas = [(int(start, 16), int(end, 16)) for start, end in areas]

    def let_go(self, tensor: Tensor) -> None:
        """Take the pages of ``tensor`` out of memory where they lie in such a file; they would be read again if need be."""
        start = tensor.data_ptr()
        end = start + tensor.numel() * tensor.element_size()
        if any(low <= start and end <= high for low, high in self._areas):
            first, last = (
                -(-start // mmap.PAGESIZE) * mmap.PAGESIZE,
                end // mmap.PAGESIZE * mmap.PAGESIZE,
            )
            if last > first:
                ctypes.CDLL(None).madvise(
                    ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED
                )
