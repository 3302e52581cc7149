"""`/metrics`: what Prometheus reads."""

import asyncio

from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import Response

from langchain_cope.serving.route import Route
from langchain_cope.serving.state import State


async def metrics(state: State) -> Response:
    """Return the metrics, in Prometheus' text form."""
    text = await asyncio.to_thread(state.metrics.text)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


ROUTES = (Route("GET", "/metrics", "metrics", metrics),)
