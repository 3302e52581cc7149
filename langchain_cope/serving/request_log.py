"""Around every request: its id, its bounds, and one line of the log, without texts."""

import asyncio
import json
import logging
import re
import time
import traceback
import uuid
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from langchain_cope.serving.metrics import Metrics
from langchain_cope.serving.settings import ServeSettings

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
log = logging.getLogger("langchain_cope.serving")


class RequestLog:
    """Middleware that gives a request its id and writes its line.

    Endpoints add what they know to `request.state.log`: counts, codes, ids of keys; no texts, and
    no ids of users.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self._app = app
        self._deadline = settings.write_deadline
        self._max_body = settings.max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("X-Request-Id", "")
        request_id = given if _ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        line: dict[str, Any] = {"id": request_id, "method": scope["method"]}
        scope.setdefault("state", {})["log"] = line
        started = time.monotonic()

        async def send_in_time(message: Message) -> None:
            if message["type"] == "http.response.start":
                line["status"] = message["status"]
                sent = MutableHeaders(scope=message)
                sent["X-Request-Id"] = request_id
                sent["X-Content-Type-Options"] = "nosniff"
            async with asyncio.timeout(self._deadline):
                await send(message)

        body = _Body(receive, headers, self._max_body, self._deadline)
        try:
            await self._app(scope, body.receive, send_in_time)
        finally:
            line["route"] = getattr(scope.get("route"), "path", None)
            line["seconds"] = round(time.monotonic() - started, 4)
            self._count(scope, line)
            log.info("request", extra={"line": line})

    def _count(self, scope: Scope, line: dict[str, Any]) -> None:
        """Count a response; what strangers send never becomes a label."""
        metrics: Metrics = scope["app"].state.server.metrics
        status = line.get("status", 499)
        metrics.responses.labels(line["route"] or "none", status).inc()
        if status in (429, 503):
            metrics.rejected.labels(line.get("error", "none")).inc()


class _Body:
    """What a client sends: up to a bound, and within a deadline for all of it."""

    def __init__(self, receive: Receive, headers: Headers, max_bytes: int, deadline: float) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._ends_at = asyncio.get_running_loop().time() + deadline
        declared = headers.get("Content-Length", "")
        is_number = declared.isdecimal() and len(declared) < 16
        self._is_declared_long = int(declared) > max_bytes if is_number else bool(declared)
        self._num_bytes = 0
        self._is_whole = False

    async def receive(self) -> Message:
        """Return the next message; raises HTTPException (413, 408) beyond bound or deadline."""
        if self._is_declared_long:  # refused before a byte of it is read
            raise HTTPException(413)
        if self._is_whole:  # what comes is that the client goes, at any time
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._ends_at):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408) from None
        self._is_whole = not message.get("more_body", False)
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._max_bytes:
            raise HTTPException(413)
        return message


class JsonLines(logging.Formatter):
    """Writes records as a JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record: of an exception its class and place, which hold no text."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry: dict[str, Any] = {
            "time": moment,
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "line", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            entry["exception"] = record.exc_info[0].__name__
            frames = traceback.extract_tb(record.exc_info[2])
            entry["at"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        return json.dumps(entry, ensure_ascii=False)
