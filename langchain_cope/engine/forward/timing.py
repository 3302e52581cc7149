"""How long things take that are compared on the machine at hand."""

import time
from collections.abc import Callable, Sequence


def fastest_of_each(ways: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Return the seconds of each way's fastest run.

    They run in turns, so that what disturbs one disturbs the others, and only the fastest counts.
    """
    times = [[_seconds(way) for way in ways] for _ in range(rounds)]
    return [min(column) for column in zip(*times, strict=True)]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
