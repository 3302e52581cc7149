"""Server-sent events: one answer in pieces, kept alive while nothing comes."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse

PING_SECONDS = 15.0
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # which proxies may not buffer
DONE = "data: [DONE]\n\n"
_PING = ": ping\n\n"


def event(value: Any, name: str | None = None, id: int | None = None) -> str:
    """Return `value` as JSON in one event, of that name and id if any."""
    first = "" if id is None else f"id: {id}\n"
    first += "" if name is None else f"event: {name}\n"
    return f"{first}data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def event_stream(events: AsyncGenerator[str]) -> StreamingResponse:
    """Return the answer that sends `events`, which are closed when the client goes."""
    return StreamingResponse(
        _with_pings(events), media_type="text/event-stream", headers=dict(HEADERS)
    )


async def _with_pings(events: AsyncGenerator[str]) -> AsyncIterator[str]:
    """Yield `events`, and a comment whenever none has come for a while."""
    try:
        while True:
            coming = asyncio.ensure_future(anext(events))
            try:
                while not (await asyncio.wait({coming}, timeout=PING_SECONDS))[0]:
                    yield _PING
            except BaseException:
                coming.cancel()
                await asyncio.wait({coming})
                raise
            try:
                yield coming.result()
            except StopAsyncIteration:
                return
    finally:
        await events.aclose()
