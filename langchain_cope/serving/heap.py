"""Freed memory goes back to the system, so that a server which holds no more does not grow.

The C library keeps what is freed in reserve, in a heap for each few threads. Answers, adapters and
beginnings of prompts come and go in other orders and sizes than they came in before, so pieces in
use lie between the free ones, and the reserve grows for hours, ever more slowly.
"""

import threading

TRIM_SECONDS = 60.0  # between two times; one takes some milliseconds


class HeapTrimming:
    """Gives freed memory back again and again, on a thread of its own."""

    def __init__(self) -> None:
        self._closing = threading.Event()

    def start(self) -> None:
        """Do so from now on."""
        threading.Thread(target=self._trim_on, name="cope-heap", daemon=True).start()

    def close(self) -> None:
        """Do so no more."""
        self._closing.set()

    def _trim_on(self) -> None:
        import torch

        from langchain_cope.engine import give_back

        while not self._closing.wait(TRIM_SECONDS):
            give_back(torch.device("cpu"))
