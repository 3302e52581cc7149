"""Threads for what would hold up the event loop: few of them, and a fair, bounded line before."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from langchain_cope.serving.admission import Admission

T = TypeVar("T")


class Workers:
    """Does the work of many requests, as many at a time as there are threads."""

    def __init__(self, name: str, threads: int, max_waiting: int) -> None:
        """Take how many work, and how many requests may wait for them."""
        self._line = Admission(threads, max_waiting)
        self._threads = ThreadPoolExecutor(threads, name)

    @property
    def num_waiting(self) -> int:
        """Requests in the line."""
        return self._line.num_waiting

    async def run(self, key: str, work: Callable[[], T]) -> T:
        """Return what `work` returns, done in its turn for this key.

        A caller that is cancelled in the line leaves it. Work that has begun cannot be stopped: its
        thread counts as taken until it is done, so that who comes and goes starts no more of it.

        Raises ApiError (429) where no more may wait, and what `work` raises.
        """
        async with self._line.place(key, 1):
            done = asyncio.get_running_loop().run_in_executor(self._threads, work)
            try:
                return await asyncio.shield(done)
            except asyncio.CancelledError:
                await asyncio.wait({done})
                raise

    def close(self) -> None:
        """Begin no more work."""
        self._threads.shutdown(wait=False, cancel_futures=True)
