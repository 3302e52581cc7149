"""`/v1/history`: what a user wrote, added a text at a time; thumbs and corrections are rows too."""

import json
import re
from functools import partial
from typing import Any

from fastapi import Request

from langchain_cope.history.foreign import seems_json
from langchain_cope.serving.errors import ApiError
from langchain_cope.serving.route import Route
from langchain_cope.serving.state import Caller, State, UserBody, user_in_body, user_in_query

_BLANK_LINES = re.compile(r"\n[^\S\n]*\n")


class HistoryBody(UserBody):
    """What is added to a user's history: rows, or a text that was pasted."""

    rows: list[dict[str, Any]] | None = None
    """As `cope-lc personalize` reads them; with `answer` and `score` or `correction` feedback."""
    text: str | None = None
    """Texts with blank lines between them, or JSON, one object a line."""


async def add(body: HistoryBody, request: Request, caller: Caller, state: State) -> dict[str, Any]:
    """Add to the history, and say how many texts are new and how many there are."""
    user = user_in_body(request, body)
    if (body.rows is None) == (body.text is None):
        raise ApiError(400, "invalid_value", "give either `rows` or `text`", param="rows")
    rows = body.rows if body.rows is not None else rows_of_text(body.text or "")

    def write() -> dict[str, Any]:
        before = state.history.count(user)
        state.history.add(user, rows)
        after = state.history.count(user)
        return {"user": user, "added": max(0, after - before), "items": after}

    return await state.storing.run(caller.id, write)


async def count(request: Request, caller: Caller, state: State) -> dict[str, Any]:
    """Return how many texts are kept; the texts themselves are never sent."""
    user = user_in_query(request)
    return {
        "user": user,
        "items": await state.storing.run(caller.id, partial(state.history.count, user)),
    }


async def delete(request: Request, caller: Caller, state: State) -> dict[str, Any]:
    """Delete the history; adapters that were learnt from it stay (`/v1/erase` takes all)."""
    user = user_in_query(request)
    return {
        "user": user,
        "deleted": await state.storing.run(caller.id, partial(state.history.delete_user, user)),
    }


def rows_of_text(text: str) -> list[dict[str, Any]]:
    """Return what was pasted as rows. Raises ApiError (400) for broken JSON."""
    text = text.replace("\r\n", "\n")
    if not seems_json(text):
        texts = (part.strip() for part in _BLANK_LINES.split(text))
        return [{"text": part} for part in texts if part]
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ApiError(
                400,
                "invalid_value",
                f"line {number} is no JSON object: give one a line",
                param="text",
            )
        rows.append(row)
    return rows


ROUTES = (
    Route("POST", "/v1/history", "history", add),
    Route("GET", "/v1/history", "history", count),
    Route("DELETE", "/v1/history", "history", delete),
)
