"""Who may call a route: checked before anything of a request's body is read.

`GuardedRoute` asks `guard` first, for every route of the app; a route without a declared scope
cannot be added. Without keys the server listens on a loopback address alone, where any web page
may send requests and a foreign name may be made to lead: there Host and Origin are checked.
"""

from collections.abc import Callable, Coroutine
from typing import Any, Literal
from urllib.parse import urlsplit

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from langchain_cope.serving.errors import ApiError, api_error
from langchain_cope.serving.principals import ANYBODY, SCOPES, Principal, Scope
from langchain_cope.serving.request_log import log
from langchain_cope.serving.settings import LOOPBACK
from langchain_cope.serving.state import ServerState, state_of

Needs = Scope | Literal["open", "key"]
"""What a route needs: a scope, any valid key, or nothing at all."""
SCOPE = "x-scope"
"""Where a route's entry in the OpenAPI document says what it needs."""
LOCAL = Principal("local", frozenset(SCOPES), ANYBODY)
"""Who asks where there are no keys."""


class GuardedRoute(APIRoute):
    """A route that nobody passes without the scope that it declares."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler behind its guard."""
        needs: Needs = (self.openapi_extra or {})[SCOPE]
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                guard(request, needs)
                return await handle(request)
            except (ApiError, HTTPException, RequestValidationError):
                raise
            except Exception as error:
                told = api_error(error)
                if told.status == 500:
                    log.error("a request failed", exc_info=error, extra={"line": _line(request)})
                raise told from error

        return guarded


def guard(request: Request, needs: Needs) -> None:
    """Find out who asks and whether they may, and note it for the endpoint.

    Raises ApiError: 401 without a valid key, 403 without the scope or from a foreign page.
    """
    state = state_of(request)
    if state.draining and needs not in ("open", "metrics"):
        raise ApiError(503, "stopping", "the server is stopping: try another", retry_after=1)
    if state.keys is None:
        _check_local(request)
        principal = LOCAL
    elif needs == "open":
        return
    else:
        principal = _key_holder(request, state)
        request.state.log["key"] = principal.id
    if needs != "open" and needs != "key":  # as mypy narrows it
        principal.require(needs)
    request.state.principal = principal
    if needs not in ("open", "metrics"):
        state.limits.take_request(principal)


def _line(request: Request) -> dict[str, Any]:
    return {"id": request.state.log["id"]}


def _key_holder(request: Request, state: ServerState) -> Principal:
    scheme, _, text = request.headers.get("Authorization", "").partition(" ")
    assert state.keys is not None
    found = state.keys.principal_of(text.strip()) if scheme.lower() == "bearer" else None
    if found is None:
        raise ApiError(
            401,
            "invalid_api_key",
            "no valid key was given: send `Authorization: Bearer KEY` with a key that is neither "
            "revoked nor expired",
        )
    return found


def _check_local(request: Request) -> None:
    """Raise ApiError (403) unless Host, and Origin where there is one, are this very machine."""
    host = _host_of(f"//{request.headers.get('Host', '')}")
    origin = request.headers.get("Origin")
    # A page of another port of this machine is foreign as well; so is a file's, `null`.
    is_own = origin is None or origin.partition("://")[2] == request.headers.get("Host")
    if host not in LOOPBACK or not is_own:
        raise ApiError(
            403,
            "foreign_page",
            "without keys this server answers requests from this machine's own programs and its "
            "own page only: use http://127.0.0.1, or start it with --keys FILE",
        )


def _host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
