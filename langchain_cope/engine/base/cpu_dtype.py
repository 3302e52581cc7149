"""In which dtype a CPU computes: bfloat16 where it multiplies it natively, and faster.

Measured once a machine. The result is kept in the user's cache folder, so that a training, one that
is resumed, and the chat after it compute alike.
"""

import functools
import threading
import time
from pathlib import Path

import torch
from torch.nn.functional import linear

from langchain_cope.engine.base.user_cache import kept_fact

SMALL_BASE = 32_000_000
"""Parameters below which a CPU computes in float32, unmeasured.

The weights fit its caches, and float32 answers do not depend on who else is in the batch.
"""
_ROWS, _OUT, _IN = 16, 1024, 1024  # eight users' step; short, so that some go undisturbed
_ROUNDS = 30
_CLEARLY = 0.8  # bfloat16 must take less than this share of the time
_IDENTITY = ("model name", "flags", "CPU implementer", "CPU part", "Features")
_DTYPES = (torch.float32, torch.bfloat16)
_lock = threading.Lock()


def cpu_dtype(num_parameters: int) -> torch.dtype:
    """Return the dtype for a base of that size: float32 or bfloat16."""
    if num_parameters < SMALL_BASE:
        return torch.float32
    with _lock:  # two measurements at once would disturb each other
        return _fastest()


def cpu_features() -> str:
    """Return what Linux says of the first core: its model and what it can do; else nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return ""
    return "\n".join(line for line in lines if line.startswith(_IDENTITY))


@functools.cache
def _fastest() -> torch.dtype:
    cpu = cpu_features()
    if "bf16" not in cpu:  # avx512_bf16 and amx_bf16 of x86, bf16 of Arm
        return torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}

    def find() -> str:
        return "bfloat16" if _bfloat16_is_faster() else "float32"

    return known[kept_fact("dtype", f"{cpu}\n{torch.__version__}", known.__contains__, find)]


def _bfloat16_is_faster() -> bool:
    """Time both in turns and compare the fastest of each: what disturbs a round is left out."""
    with torch.inference_mode():
        weights = torch.ones(_OUT, _IN)
        pairs = [(torch.ones(_ROWS, _IN).to(dtype), weights.to(dtype)) for dtype in _DTYPES]
        times = [[_seconds(*pair) for pair in pairs] for _ in range(_ROUNDS)]
    float32, bfloat16 = (min(column) for column in zip(*times[1:], strict=True))  # the first warms
    return bool(bfloat16 < _CLEARLY * float32)


def _seconds(rows: torch.Tensor, weights: torch.Tensor) -> float:
    started = time.perf_counter()
    linear(rows, weights)
    return time.perf_counter() - started
