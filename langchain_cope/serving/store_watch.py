"""Whether the adapter store answers, asked seldom and never waited for."""

import asyncio
import time
from collections.abc import Callable

from adapter_store import AdapterStore

ASK_SECONDS = 10.0  # between two questions
GRACE_SECONDS = 30.0  # a store that is away for a moment shall not end every server


class StoreWatch:
    """Asks a store whether it is there. The event loop alone uses it."""

    def __init__(self, store: AdapterStore, clock: Callable[[], float] = time.monotonic) -> None:
        """Take the store for well at first."""
        self._store = store
        self._clock = clock
        self._answered = clock()
        self._asked = -ASK_SECONDS
        self._question: asyncio.Task[bool] | None = None

    def is_well(self) -> bool:
        """Tell whether it has answered within the last 30 seconds; ask again where need be."""
        now = self._clock()
        is_asking = self._question is not None and not self._question.done()
        if not is_asking and now - self._asked >= ASK_SECONDS:
            self._asked = now
            self._question = asyncio.ensure_future(asyncio.to_thread(self._store.exists))
            self._question.add_done_callback(self._note)
        return now - self._answered < GRACE_SECONDS

    def _note(self, question: "asyncio.Task[bool]") -> None:
        if not question.cancelled() and question.exception() is None:
            self._answered = self._clock()
