"""The shortest time that a computation can take on a machine: its roofline.

A computation reads so many bytes of weights and takes so many floating-point operations. At best
both overlap, and the longer of the two is the time. What else it reads and computes (keys and
values, adapters, norms) is left out, so that no machine can be faster than this.
"""

from collections.abc import Mapping
from dataclasses import dataclass

DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Work:
    """What a computation has to do."""

    num_bytes: float
    """Bytes of weights that are read, each once."""
    flops: Mapping[str, float]
    """Floating-point operations by the dtype in which they are done."""


@dataclass(frozen=True)
class Rates:
    """What a machine can do."""

    read: float
    """Bytes/s."""
    multiply: Mapping[str, float]
    """FLOP/s by dtype."""


def seconds_of(work: Work, rates: Rates) -> tuple[float, float]:
    """Return the seconds (to read, to compute)."""
    compute = sum(flops / rates.multiply[dtype] for dtype, flops in work.flops.items())
    return work.num_bytes / rates.read, compute


def shortest_seconds(work: Work, rates: Rates) -> float:
    """Return the longer of both."""
    return max(seconds_of(work, rates))
