"""`/app/`: the page, five files of this package and nothing from elsewhere."""

from importlib.resources import files
from typing import Any

from fastapi import Request
from fastapi.responses import RedirectResponse, Response

from langchain_cope.serving.errors import ApiError
from langchain_cope.serving.route import Route
from langchain_cope.serving.state import State

_KINDS = {
    "index.html": "text/html; charset=utf-8",
    "app.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def file(name: str, state: State) -> Response:
    """Return one file of the page."""
    kind = _KINDS.get(name or "index.html")
    if kind is None or not state.settings.app:
        raise ApiError(404, "route_not_found", "there is no such page")
    data = (files("langchain_cope.serving") / "app" / (name or "index.html")).read_bytes()
    return Response(data, media_type=kind, headers=_HEADERS)


async def index(state: State) -> Response:
    """Return the page."""
    return await file("", state)


async def to_index(request: Request) -> Any:
    """Send a browser to the page."""
    return RedirectResponse("/app/", 307)


_HIDDEN = {"include_in_schema": False}
ROUTES = (
    Route("GET", "/app", "open", to_index, _HIDDEN),
    Route("GET", "/app/", "open", index, _HIDDEN),
    Route("GET", "/app/{name}", "open", file, _HIDDEN),
)
