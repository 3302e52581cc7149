"""`/v1/personalize`: from a user's history to a voice of the user's own, as a job."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request, Response

from langchain_cope.serving.errors import ApiError
from langchain_cope.serving.jobs import Job
from langchain_cope.serving.route import Route
from langchain_cope.serving.sse import event, event_stream
from langchain_cope.serving.state import (
    ServerState,
    State,
    UserBody,
    user_in_body,
    user_in_query,
    user_of,
)

POLL_SECONDS = 0.1


async def start(body: UserBody, request: Request, state: State) -> dict[str, Any]:
    """Queue a personalization; what is learnt is what the history holds."""
    user = user_in_body(request, body)
    job = await asyncio.to_thread(state.runner.add, user)
    return job.shown()


async def listed(request: Request, state: State) -> dict[str, Any]:
    """Return the user's jobs, newest first."""
    user = user_in_query(request)
    return {"object": "list", "data": [job.shown() for job in state.runner.of_user(user)]}


async def one(job: str, request: Request, state: State) -> dict[str, Any]:
    """Return one job as it stands."""
    return _found(job, request, state).shown()


async def cancel(job: str, request: Request, state: State) -> dict[str, Any]:
    """Stop a job; what it has done so far is not published."""
    found = _found(job, request, state)
    await asyncio.to_thread(state.runner.cancel, found)
    return found.shown()


async def events(job: str, request: Request, state: State) -> Response:
    """Stream a job's progress: events `progress`, at last one `end` with what `one` returns.

    A client that comes again with `Last-Event-ID` hears what it has missed. Where the server stops
    the stream ends without an `end`: the job goes on after the next start.
    """
    found = _found(job, request, state)
    last = request.headers.get("Last-Event-ID", "")
    num_heard = int(last) if last.isdecimal() and last.isascii() else 0
    return event_stream(_events(found, num_heard, state))


def _found(job: str, request: Request, state: ServerState) -> Job:
    """Return a job of a user whom this request may name: the key allows, and the proxy's header."""

    def may_see(user: str) -> bool:
        try:
            return user_of(request, {"user": user}) == user
        except ApiError:
            return False

    return state.runner.find(job, may_see)


async def _events(job: Job, num_heard: int, state: ServerState) -> AsyncGenerator[str]:
    if job.status == "queued":
        yield event({"status": "queued"}, "progress")
    if num_heard > len(job.steps):
        num_heard = 0  # of a process before this one
    while True:
        is_live = job.is_live  # asked first: no step comes after the end
        while num_heard < len(job.steps):
            num_heard += 1
            yield event(job.steps[num_heard - 1], "progress", id=num_heard)
        if not is_live:
            break
        if state.draining:
            return
        await asyncio.sleep(POLL_SECONDS)
    yield event(job.shown(), "end")


ROUTES = (
    Route("POST", "/v1/personalize", "personalize", start, {"status_code": 202}),
    Route("GET", "/v1/personalize", "personalize", listed),
    Route("GET", "/v1/personalize/{job}", "personalize", one),
    Route("POST", "/v1/personalize/{job}/cancel", "personalize", cancel),
    Route("GET", "/v1/personalize/{job}/events", "personalize", events),
)
