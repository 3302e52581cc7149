"""Trainings on one device take turns: two at once would only slow each other, and draw from each other's random numbers."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from langchain_cope.errors import Cancelled

WAIT_SECONDS = 0.1  # between two looks at whether to stop

_turns: dict[str, threading.Lock] = {}  # by device
_registry = threading.Lock()


@contextmanager
def turn_on(device: object, should_stop: Callable[[], bool]) -> Iterator[None]:
    """Wait for a turn to train on ``device`` in this process.

    Raises ``Cancelled`` where ``should_stop`` says so meanwhile.
    """
    with _registry:
        turn = _turns.setdefault(str(device), threading.Lock())
    while not turn.acquire(timeout=WAIT_SECONDS):
        if should_stop():
            raise Cancelled(
                "stopped on request while waiting for another training; nothing was published"
            )
    try:
        yield
    finally:
        turn.release()
