"""Python's collector of cycles, paused where much is made that stays."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Collect nothing in the block; afterwards do again what was done before. Also a decorator.

    For imports and loading: they make half a million objects that stay, and looking through them
    again and again, for cycles that nobody needs, takes a fifth of the time to a first answer.
    """
    if not gc.isenabled():
        yield
        return
    try:
        gc.disable()
        yield
    finally:
        gc.enable()
