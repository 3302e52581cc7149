"""`/v1/personalize`: from a user's history to a voice of the user's own, as a job."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request, Response

from langchain_cope.serving.jobs import Job
from langchain_cope.serving.route import Route
from langchain_cope.serving.sse import event, event_stream
from langchain_cope.serving.state import Caller, State, UserBody, user_in_body, user_in_query

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


async def one(job: str, caller: Caller, state: State) -> dict[str, Any]:
    """Return one job as it stands."""
    return state.runner.find(job, caller.users.__contains__).shown()


async def cancel(job: str, caller: Caller, state: State) -> dict[str, Any]:
    """Stop a job; what it has done so far is not published."""
    found = state.runner.find(job, caller.users.__contains__)
    await asyncio.to_thread(state.runner.cancel, found)
    return found.shown()


async def events(job: str, request: Request, caller: Caller, state: State) -> Response:
    """Stream a job's progress: events `progress`, at last one `end` with what `one` returns.

    A client that comes again with `Last-Event-ID` hears what it has missed.
    """
    found = state.runner.find(job, caller.users.__contains__)
    last = request.headers.get("Last-Event-ID", "")
    return event_stream(_events(found, int(last) if last.isdecimal() and last.isascii() else 0))


async def _events(job: Job, num_heard: int) -> AsyncGenerator[str]:
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
        await asyncio.sleep(POLL_SECONDS)
    yield event(job.shown(), "end")


ROUTES = (
    Route("POST", "/v1/personalize", "personalize", start, {"status_code": 202}),
    Route("GET", "/v1/personalize", "personalize", listed),
    Route("GET", "/v1/personalize/{job}", "personalize", one),
    Route("POST", "/v1/personalize/{job}/cancel", "personalize", cancel),
    Route("GET", "/v1/personalize/{job}/events", "personalize", events),
)
