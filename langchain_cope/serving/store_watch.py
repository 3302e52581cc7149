"""Whether the adapter store answers: asked by a thread of its own, which no request waits for."""

import threading
import time
from collections.abc import Callable

from adapter_store import AdapterStore

ASK_SECONDS = 10.0  # between two questions
GRACE_SECONDS = 30.0  # a store that is away for a moment shall not end every server


class StoreWatch:
    """Asks a store whether it is there. Its thread waits where requests shall not."""

    def __init__(self, store: AdapterStore, clock: Callable[[], float] = time.monotonic) -> None:
        """Take the store for well at first; nothing is asked before `start`."""
        self._store = store
        self._clock = clock
        self._answered = clock()
        self._closing = threading.Event()

    def start(self) -> None:
        """Ask from now on, whether or not anybody wants to know."""
        self._answered = self._clock()
        threading.Thread(target=self._ask_on, name="cope-store-watch", daemon=True).start()

    def close(self) -> None:
        """Ask no more; a question that hangs is left to the end of the process."""
        self._closing.set()

    def is_well(self) -> bool:
        """Tell whether the store has answered within the last 30 seconds."""
        return self._clock() - self._answered < GRACE_SECONDS

    def ask(self) -> None:
        """Ask once, and note it where an answer comes."""
        try:
            self._store.exists()
        except Exception:  # of whatever kind: what counts is that no answer came
            return
        self._answered = self._clock()

    def _ask_on(self) -> None:
        self.ask()
        while not self._closing.wait(ASK_SECONDS):
            self.ask()
