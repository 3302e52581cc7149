"""The process: uvicorn around the app, logs as JSON lines, and an end that loses no answer.

On SIGTERM or SIGINT the server is not ready any more and begins nothing new; after `drain_delay` it
takes no more connections; answers under way have `drain` seconds. A second signal ends it at once.
"""

import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from langchain_cope.serving.app import create_app
from langchain_cope.serving.heads import BoundedHeads
from langchain_cope.serving.request_log import JsonLines, log
from langchain_cope.serving.settings import ServeSettings
from langchain_cope.serving.state import ServerState

# Longer than proxies and clients keep an idle connection (a minute, mostly): who closes first loses
# what the other sends at that moment.
KEEP_ALIVE = 75


def serve(settings: ServeSettings, log_level: str = "info") -> None:
    """Serve until a signal comes.

    Raises:
        InputError: the key file is missing, readable by others, or none.
        AdapterStoreError: the store cannot be opened.
    """
    os.umask(0o077)  # what users wrote is read by nobody else of this machine
    with _logs_on_stderr(log_level):
        server_of(ServerState.of(settings)).run()


def server_of(state: ServerState) -> "DrainingServer":
    """Return the server of a state, which `run` starts."""
    settings = state.settings
    config = uvicorn.Config(
        create_app(state),
        http=BoundedHeads,
        host=settings.host,
        port=settings.port,
        workers=1,  # an engine is a process
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # addresses decide nothing here
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, round(settings.drain)),
    )
    return DrainingServer(config, state)


class DrainingServer(uvicorn.Server):
    """A server that is known not to be ready before it closes its listeners."""

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config)
        self._state = state
        self._exit_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say where."""
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            url = f"http://{host if ':' not in host else f'[{host}]'}:{port}"
            page = f", the page at {url}/app/" if self._state.settings.app else ""
            log.info("ready at %s/v1%s", url, page)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the end; a second signal ends it at once."""
        if self._exit_at is not None:
            self.should_exit = self.force_exit = True
            return
        self._exit_at = time.monotonic() + self._state.settings.drain_delay
        self._state.begin_drain()

    async def on_tick(self, counter: int) -> bool:
        """Tell, ten times a second, whether to close the listeners."""
        if self._exit_at is not None and time.monotonic() >= self._exit_at:
            self.should_exit = True
        return await super().on_tick(counter)


@contextmanager
def _logs_on_stderr(level: str) -> Iterator[None]:
    """Write the logs there as JSON lines until the block ends, or fails to start a server."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    loggers = [logging.getLogger(name) for name in ("langchain_cope.serving", "uvicorn.error")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    try:
        yield
    finally:
        for logger, (handlers, propagate, former) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(former)
