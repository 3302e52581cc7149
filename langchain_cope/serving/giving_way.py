"""Training beside answering: a thread that has the processors where answers leave them.

It has a lower priority, which Linux keeps for each thread; and while people are answered its
products run on one thread, so that the engine's own two do not wait for each other.
"""

import os
import sys
import threading

NICE = 10  # about a tenth of the weight of the threads that answer


def lower_priority() -> None:
    """Lower the priority of the calling thread and of those that it starts; on Linux alone."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


class GivesWay:
    """How many threads a training uses: one while people are answered, else all.

    The thread that trains calls it, at every step.
    """

    def __init__(self) -> None:
        self._is_giving_way = False
        self._threads = 0

    def now(self, is_busy: bool) -> None:
        """Change the number where it has to be another."""
        if is_busy == self._is_giving_way:
            return
        import torch

        from langchain_cope.engine import limit_own_threads

        self._threads = self._threads or torch.get_num_threads()
        self._is_giving_way = is_busy
        limit_own_threads(1 if is_busy else self._threads, of_others=self._threads)
