"""Oldest first, by what times there are.

What has no time is placed by its neighbours: in a file that is listed newest first the one below is
the older one. Knows no items and no rows: it is told how to find a time and a conversation.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from math import inf
from operator import itemgetter
from typing import TypeVar

T = TypeVar("T")
_Key = tuple[float, int]
"""Unix seconds, and the place among those without a time that hang on the same neighbour."""


def oldest_first(
    files: Sequence[Sequence[T]],
    time_of: Callable[[T], datetime | None],
    conversation_of: Callable[[T], object],
) -> list[T]:
    """Return the entries of all files oldest first; those of equal times keep their order.

    A file without any time comes after the newest of the files before it. Neighbours of one
    conversation stay together and in their order.
    """
    newest: _Key = (-inf, 0)
    keyed: list[tuple[_Key, T]] = []
    for entries in files:
        times = [_seconds(time_of(entry)) for entry in entries]
        runs = _runs([conversation_of(entry) for entry in entries])
        keys = _keys(times, runs) or [newest] * len(entries)
        newest = max([newest, *keys])
        keyed += zip(keys, entries, strict=True)
    return [entry for _, entry in sorted(keyed, key=itemgetter(0))]


def _seconds(time: datetime | None) -> float | None:
    if time is None:
        return None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _runs(conversations: Sequence[object]) -> list[range]:
    """Return the neighbours of one conversation as ranges; each entry of none is alone."""
    starts = [
        index
        for index, name in enumerate(conversations)
        if index == 0 or name is None or name != conversations[index - 1]
    ]
    return [range(start, end) for start, end in pairwise([*starts, len(conversations)])]


def _keys(times: Sequence[float | None], runs: Sequence[range]) -> list[_Key] | None:
    """Return what to sort by, None without any time."""
    if all(time is None for time in times):
        return None
    filled = list(times)
    for run in runs:
        _fill(filled, run)
    places = _places([filled[run[0]] for run in runs])
    keys: list[_Key] = []
    for run, place in zip(runs, places, strict=True):
        for index in run:
            time = filled[index]
            keys.append(place if time is None else (time, 0))
    return keys


def _fill(times: list[float | None], run: range) -> None:
    """Give the entries of a conversation the time of the one before, else of the first with one."""
    latest = next((times[index] for index in run if times[index] is not None), None)
    for index in run:
        latest = times[index] = latest if times[index] is None else times[index]


def _places(times: Sequence[float | None]) -> list[_Key]:
    """Return where each stands; without a time, between the neighbours that have one.

    At the ends it is beside the only neighbour: before or after it, as the times rise or fall.
    """
    known = [(index, time) for index, time in enumerate(times) if time is not None]
    steps = [after[1] - before[1] for before, after in pairwise(known)]
    rising = 1 if sum(step >= 0 for step in steps) >= len(steps) / 2 else -1
    places: list[_Key] = []
    num_passed = 0
    for index, time in enumerate(times):
        if time is not None:
            num_passed += 1
            places.append((time, 0))
        elif num_passed in (0, len(known)):
            end, end_time = known[0] if num_passed == 0 else known[-1]
            places.append((end_time, rising * (index - end)))
        else:
            (before, start), (after, end_time) = known[num_passed - 1], known[num_passed]
            share = (index - before) / (after - before)
            places.append((start + share * (end_time - start), 0))
    return places
