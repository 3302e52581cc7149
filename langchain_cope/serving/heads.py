"""Bounds of what comes before a request is known: its head, in bytes and in seconds.

uvicorn has none. Without them anybody, with a key or not, could fill the memory with one endless
header, or hold connections open with a byte now and then. And of requests that are sent before the
one before is answered, uvicorn tells the last alone that the client has gone: here all are told.
"""

import asyncio
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as _Protocol
else:
    _Protocol = AutoHTTPProtocol

MAX_HEAD = 65_536  # bytes, about: what comes at one time may be more
HEAD_SECONDS = 30.0  # from its first byte to its end


class BoundedHeads(_Protocol):
    """One connection, closed where a head is too long or does not come in time."""

    _num_bytes = 0
    _answered: Any = None
    """The cycle that is answered now: not the newest, where others wait behind it."""
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Wait for the first head, as long as a connection may be idle later."""
        super().connection_made(transport)
        self._close_in(self.timeout_keep_alive)

    def data_received(self, data: bytes) -> None:
        """Take what has come; uvicorn begins a new cycle where a head is whole."""
        former = self.cycle
        is_body = former is not None and former.more_body
        super().data_received(data)
        if self.cycle is not former:
            self._num_bytes = 0
            self._stay_open()
        elif not is_body and not self.transport.is_closing():
            if not self._num_bytes:
                self._close_in(HEAD_SECONDS)
            self._num_bytes += len(data)
            if self._num_bytes > MAX_HEAD:
                self.send_400_response("The head of the request is too long.")

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more, and let who answers know."""
        self._stay_open()
        super().connection_lost(exc)
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def _close_in(self, seconds: float) -> None:
        self._stay_open()
        self._deadline = asyncio.get_running_loop().call_later(seconds, self._close)

    def _stay_open(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _close(self) -> None:
        """Close; an answer that is under way to who sends the next head too early is sent first."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:
            self._close_in(HEAD_SECONDS)
