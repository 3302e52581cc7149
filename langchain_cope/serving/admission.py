"""Who is answered when: room for rows, a fair line before it, and a bound on that line.

The engine answers first come first served. So that one busy key does not hold up the others, no
more is handed to it than it can run; the others wait here. Whoever holds the fewest rows is next,
and of those that hold as many whoever has the shortest line.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from langchain_cope.serving.errors import ApiError

_RECENT = 64  # answers that the rate is measured over
_LONGEST = 120  # seconds: OpenAI's clients heed no longer Retry-After
_MOMENT = 5.0  # seconds
_UNKNOWN = 5.0  # seconds, before anything was measured


@dataclass(eq=False)
class _Ticket:
    key: str
    rows: int
    called: "asyncio.Future[None]"


class Admission:
    """The line before one engine. The event loop alone uses it."""

    def __init__(
        self, rows: int, max_waiting: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start empty.

        Args:
            rows: rows that run at a time; a request that needs more of them runs alone.
            max_waiting: requests that may wait. Beyond that a key may still have its equal share.
            clock: seconds, for tests.
        """
        self._rows = rows
        self._max_waiting = max_waiting
        self._clock = clock
        self._waiting: dict[str, deque[_Ticket]] = {}
        self._held: Counter[str] = Counter()
        self._left: deque[float] = deque(maxlen=_RECENT)

    @property
    def num_waiting(self) -> int:
        """Requests in the line."""
        return sum(map(len, self._waiting.values()))

    def is_busy(self) -> bool:
        """Tell whether anybody is answered, or was a moment ago."""
        recent = bool(self._left) and self._clock() - self._left[-1] < _MOMENT
        return bool(self._held) or recent

    def check(self, key: str) -> None:
        """Raise ApiError (429) where no more requests of this key may wait."""
        others = self._waiting.keys() - {key}
        share = self._max_waiting // (len(others) + 1)
        own = len(self._waiting.get(key, ()))
        if self.num_waiting >= self._max_waiting and own >= share:
            raise ApiError(
                429,
                "server_busy",
                "as many requests wait as may: try again later",
                retry_after=self.seconds_to_serve(own * (len(others) + 1)),
            )

    @asynccontextmanager
    async def place(self, key: str, rows: int) -> AsyncIterator[float]:
        """Wait for room, hold it for the block, and yield the seconds waited.

        Raises ApiError as `check` does.
        """
        self.check(key)
        started = self._clock()
        rows = min(rows, self._rows)
        await self._call(key, rows)
        try:
            yield self._clock() - started
        finally:
            self._left.append(self._clock())
            self._give_back(key, rows)

    def seconds_to_serve(self, num_requests: int) -> float:
        """Return how long so many requests take at the present rate, 1 to 120 seconds."""
        if len(self._left) < 2:
            return _UNKNOWN
        seconds = max(self._clock() - self._left[0], 1e-3)
        return min(max(num_requests * seconds / len(self._left), 1.0), _LONGEST)

    async def _call(self, key: str, rows: int) -> None:
        ticket = _Ticket(key, rows, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(key, deque()).append(ticket)
        self._admit()
        try:
            await ticket.called
        except asyncio.CancelledError:
            if not ticket.called.cancelled():
                self._give_back(key, rows)  # called and gone in the same moment
            elif ticket in self._waiting.get(key, ()):
                self._remove(ticket)
            self._admit()
            raise

    def _admit(self) -> None:
        """Call whoever fits: of the keys that wait, the one that holds the fewest rows."""
        while self._waiting:
            key = min(self._waiting, key=lambda name: (self._held[name], len(self._waiting[name])))
            ticket = self._waiting[key][0]
            if ticket.called.cancelled():
                self._remove(ticket)
                continue
            if self._held.total() + ticket.rows > self._rows:
                return
            self._remove(ticket)
            self._held[key] += ticket.rows
            ticket.called.set_result(None)

    def _remove(self, ticket: _Ticket) -> None:
        line = self._waiting[ticket.key]
        line.remove(ticket)
        if not line:
            del self._waiting[ticket.key]

    def _give_back(self, key: str, rows: int) -> None:
        self._held[key] -= rows
        if not self._held[key]:
            del self._held[key]
        self._admit()
