"""Python's collector of cycles, paused where much is made that stays."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

_pauses: set[object] = set()  # that are going on


@contextmanager
def collector_paused() -> Iterator[None]:
    """Collect nothing in the block; afterwards do again what was done before. Also a decorator.

    For imports and loading: they make half a million objects that stay, and looking through them
    again and again, for cycles that nobody needs, takes a fifth of the time to a first answer.
    """
    if not gc.isenabled():
        yield
        return
    pause = object()
    _pauses.add(pause)
    try:
        gc.disable()
        yield
    finally:
        gc.enable()
        _pauses.discard(pause)


def _after_fork() -> None:
    if _pauses:  # of another thread, which is not there to end it
        gc.enable()


os.register_at_fork(after_in_child=_after_fork)
