"""Threads of a step: as many as there are cores that other programs leave.

A product on several threads ends with the slowest of them. Where another program keeps a core busy,
one thread waits for its turn and the others for it, hundreds of times a step: on two cores an
answer of smollm2 then took 3.5 times as long on two threads as undisturbed, 1.6 times on one.
"""

import math
import os
import time
from collections.abc import Callable

import psutil
import torch

from langchain_cope.engine.device import limit_own_threads

_PERIOD = 0.25  # seconds between two looks; Linux counts in hundredths
_TOLERATED = 0.25  # of a core: on two cores beside 0.3 one thread was faster by a fifth
_LONGEST = 4 * _PERIOD  # what was seen over longer times, idle ones, says little of now

Usage = tuple[float, float]
"""The time, and the seconds that other processes have computed so far, all cores together."""


class FreeCores:
    """How many threads products of one thread run on; used by that thread alone."""

    def __init__(self, look: Callable[[], Usage] | None = None) -> None:
        """Start with all of torch's threads; `look` reads the usage, by default the system's."""
        self._look = look or _usage
        self._most = self._now = torch.get_num_threads()
        self._time, self._busy = self._look()

    def take_all(self) -> None:
        """Compute with all threads."""
        self._set(self._most)

    def take_free(self) -> None:
        """Compute with as many threads as other programs leave cores, at least one.

        Looks at most four times a second.
        """
        if self._most == 1 or time.monotonic() < self._time + _PERIOD:
            return
        before, busy_before = self._time, self._busy
        self._time, self._busy = self._look()
        seconds = self._time - before
        if _PERIOD <= seconds <= _LONGEST:
            taken = (self._busy - busy_before) / seconds
            free = (os.cpu_count() or 1) - math.ceil(taken - _TOLERATED)
            self._set(max(1, min(self._most, free)))

    def _set(self, number: int) -> None:
        if number != self._now:
            self._now = number
            limit_own_threads(number, of_others=self._most)


def _usage() -> Usage:
    try:
        times = psutil.cpu_times()
    except OSError:  # a sandbox that does not tell: nobody else computes, then
        return time.monotonic(), 0.0
    kinds = ["user", "system", "irq", "softirq"]
    # Those of low priority give way by themselves, unless ours is low too, as under Ray.
    if psutil.Process().nice() > 0:
        kinds.append("nice")
    busy = sum(getattr(times, kind, 0.0) for kind in kinds)
    return time.monotonic(), busy - time.process_time()
