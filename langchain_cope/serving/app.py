"""The app: the table of routes, each with what a key needs for it.

To add a route: write its endpoint in a module of `routes/`, list it there in `ROUTES`, and give the
module a place in the table below; the committed matrix of the tests wants a row for it, too.
"""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from langchain_cope.serving.access import SCOPE, GuardedRoute
from langchain_cope.serving.errors import BODY_SCHEMA, ApiError
from langchain_cope.serving.request_log import RequestLog
from langchain_cope.serving.route import Route
from langchain_cope.serving.routes import (
    adapters,
    chat,
    erase,
    health,
    history,
    metrics,
    models,
    page,
    personalize,
    users,
)
from langchain_cope.serving.state import ServerState


def _document(request: Request) -> Response:
    return JSONResponse(request.app.openapi())


ROUTES: tuple[Route, ...] = (
    *health.ROUTES,
    *metrics.ROUTES,
    *models.ROUTES,
    *chat.ROUTES,
    *users.ROUTES,
    *adapters.ROUTES,
    *history.ROUTES,
    *personalize.ROUTES,
    *erase.ROUTES,
    *page.ROUTES,
    Route("GET", "/openapi.json", "key", _document, {"include_in_schema": False}),
)


_ERROR: dict[str, Any] = {
    "description": "An error.",
    "content": {"application/json": {"schema": BODY_SCHEMA}},
}


def create_app(state: ServerState) -> FastAPI:
    """Return the ASGI app of a server."""
    app = FastAPI(
        title="langchain-cope",
        openapi_url=None,  # a route of our own has it, behind its guard; the pages load from a CDN
        docs_url=None,
        redoc_url=None,
        telemetry={"logs": False},  # which would hold the texts of exceptions
        lifespan=_lifespan,
        responses={"4XX": _ERROR, "5XX": _ERROR, 422: _ERROR},
    )
    app.state.server = state
    app.router.route_class = GuardedRoute
    for route in ROUTES:
        app.add_api_route(
            route.path,
            route.endpoint,
            methods=[route.method],
            openapi_extra={SCOPE: route.needs},
            response_model=None,
            **route.options,
        )
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_middleware(RequestLog, settings=state.settings)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the base while the server starts; let go of it at the end."""
    state: ServerState = app.state.server
    with ThreadPoolExecutor(1) as loader:  # which ends: its idle threads would slow the engine's
        await asyncio.get_running_loop().run_in_executor(loader, state.load)
    state.runner.start()
    state.start_watching()
    yield
    await asyncio.to_thread(state.close)


def _answer(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.state.log["error"] = error.code
    if error.detail:
        request.state.log["detail"] = error.detail
    return error.response()


def _answer_invalid(request: Request, error: Exception) -> Response:
    """Name the field that is wrong; what was in it may be a text and is not repeated."""
    assert isinstance(error, RequestValidationError)
    problem: dict[str, Any] = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"] if part != "body")
    message = f"{where or 'the body'}: {problem['msg']}"
    return _answer(request, ApiError(400, "invalid_value", message, param=where or None))


def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: "there is no such route; this server speaks chat completions (/v1/chat/completions), "
        "not /v1/responses",
        405: "this route has another method",
        408: "the request did not come in time",
        413: f"a request may have {request.app.state.server.settings.max_body:,} bytes",
    }
    codes = {
        404: "route_not_found",
        405: "method_not_allowed",
        408: "request_too_slow",
        413: "request_too_large",
    }
    status = error.status_code
    told = ApiError(status, codes.get(status, "http_error"), messages.get(status, error.detail))
    return _answer(request, told)
