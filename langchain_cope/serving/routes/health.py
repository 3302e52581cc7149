"""`/healthz` and `/readyz`: whether the process lives, and whether to send it requests."""

from starlette.responses import JSONResponse, Response

from langchain_cope.serving.errors import ApiError
from langchain_cope.serving.route import Route
from langchain_cope.serving.state import ServerState, State

_AGAIN = 5  # seconds until a probe may hear otherwise


async def healthz() -> Response:
    """Tell that the process answers."""
    return JSONResponse({"status": "ok"})


async def readyz(state: State) -> Response:
    """Tell whether new requests are welcome; a 503 says why not."""
    reason = _why_not(state)
    if reason is not None:
        raise ApiError(503, *reason, retry_after=_AGAIN)
    return JSONResponse({"status": "ok"})


def _why_not(state: ServerState) -> tuple[str, str] | None:
    """Return code and message of what keeps the server from being ready."""
    if state.draining:
        return "stopping", "the server is stopping"
    if state.engine is None:
        return "starting", "the base is being loaded"
    if not state.store_watch.is_well():
        return "store_unavailable", "the adapter store has not answered for half a minute"
    return None


ROUTES = (Route("GET", "/healthz", "open", healthz), Route("GET", "/readyz", "open", readyz))
