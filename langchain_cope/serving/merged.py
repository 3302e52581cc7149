"""Several answers of one engine, read as they come."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from langchain_cope.engine import Completion, Engine, Piece, Request


async def merged(
    engine: "Engine", requests: Sequence["Request"]
) -> "AsyncGenerator[tuple[int, Piece | Completion]]":
    """Yield (index of the request, piece) of all `requests` as they come.

    Raises what the first of them raises that fails. Closing it stops them all.
    """
    if len(requests) == 1:
        async with aclosing(engine.astream(requests[0])) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    events: asyncio.Queue[tuple[int, Piece | Completion] | Exception | None] = asyncio.Queue()

    async def read(index: int) -> None:
        try:
            async with aclosing(engine.astream(requests[index])) as pieces:
                async for piece in pieces:
                    events.put_nowait((index, piece))
            events.put_nowait(None)
        except Exception as error:
            events.put_nowait(error)

    readers = [asyncio.ensure_future(read(index)) for index in range(len(requests))]
    try:
        num_running = len(requests)
        while num_running:
            event = await events.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                num_running -= 1
            else:
                yield event
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.wait(readers)
