"""How many users a long command on a store has done, said on standard error after a while."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_SECONDS = 10.0  # between two lines, where there is no terminal


@contextmanager
def counted(what: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told how many of something are done.

    It says so on standard error once it takes a while.
    """
    started = said = time.monotonic()
    on_terminal = sys.stderr.isatty()
    seconds_between = 1.0 if on_terminal else LINE_SECONDS
    ending = "\r" if on_terminal else "\n"

    def count(number: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said > seconds_between:
            said = now
            line = f"{number} {what}, {number / (now - started):.0f} a second"
            print(line, end=ending, file=sys.stderr, flush=True)

    yield count
    if said != started and on_terminal:
        print(file=sys.stderr)
