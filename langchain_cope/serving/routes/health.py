"""`/healthz` and `/readyz`: whether the process lives, and whether to send it requests."""

from starlette.responses import JSONResponse, Response

from langchain_cope.serving.route import Route
from langchain_cope.serving.state import State


async def healthz() -> Response:
    """Tell that the process answers."""
    return JSONResponse({"status": "ok"})


async def readyz(state: State) -> Response:
    """Tell whether new requests are welcome: the base is loaded and the store answers."""
    if state.draining or state.engine is None or not state.store_watch.is_well():
        return JSONResponse({"status": "not ready"}, 503)
    return JSONResponse({"status": "ok"})


ROUTES = (Route("GET", "/healthz", "open", healthz), Route("GET", "/readyz", "open", readyz))
