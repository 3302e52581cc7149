"""`/v1/adapters`: the versions of a user's voice, and which of them answers."""

from functools import partial
from typing import Any

from fastapi import Request

from adapter_store import AdapterVersion
from langchain_cope.serving.route import Route
from langchain_cope.serving.state import Caller, State, UserBody, user_in_body, user_in_query


class ActivateBody(UserBody):
    """Which version is to answer."""

    version: str


async def versions(request: Request, caller: Caller, state: State) -> dict[str, Any]:
    """Return the user's versions, newest first, and what the active one recommends."""
    user = user_in_query(request)
    active, found = await state.storing.run(
        caller.id, lambda: (state.store.active(user), state.store.versions(user))
    )
    shown = [_shown(version, active) for version in reversed(found)]
    recommended = next(
        ({"alpha": one.alpha, "tau": one.tau} for one in found if one.version == active), None
    )
    return {"object": "list", "data": shown, "recommended": recommended}


async def activate(
    body: ActivateBody, request: Request, caller: Caller, state: State
) -> dict[str, Any]:
    """Let another version answer from the next request on."""
    user = user_in_body(request, body)
    version = await state.storing.run(caller.id, partial(state.store.activate, user, body.version))
    return _shown(version, version.version)


async def rollback(
    body: UserBody, request: Request, caller: Caller, state: State
) -> dict[str, Any]:
    """Let the version answer that did before the present one."""
    user = user_in_body(request, body)
    version = await state.storing.run(caller.id, partial(state.store.rollback, user))
    return _shown(version, version.version)


def _shown(version: AdapterVersion, active: str | None) -> dict[str, Any]:
    verdict = version.metadata.get("verdict")
    sentence = verdict.get("sentence") if isinstance(verdict, dict) else None
    return {
        "version": version.version,
        "created": version.created_at.isoformat(),
        "active": version.version == active,
        "reason": sentence,
        "metrics": version.metrics,
    }


ROUTES = (
    Route("GET", "/v1/adapters", "adapters", versions),
    Route("POST", "/v1/adapters/activate", "adapters", activate),
    Route("POST", "/v1/adapters/rollback", "adapters", rollback),
)
