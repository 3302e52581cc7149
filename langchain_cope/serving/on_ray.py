"""The server on a Ray cluster: a door in front, and replicas of the whole server behind it.

    client → Ray's HTTP proxy → Door: reads the request, finds the user → Replica: `create_app`

A replica is the local server without its socket: the same app with the same routes and keys, asked
in ASGI's own messages. The door authenticates nobody: it only reads who is meant, so that a user's
requests meet on one replica, by Ray's consistent hashing of the store's keyed hash of the user. A
replica that dies before the first message of its answer is asked for again once, elsewhere; after
that a stream ends with an error event. What a key may have at a time is counted by each replica.

Trainings run elsewhere (`cope-lc personalize-fleet`), and requests about histories go to one
replica at a time, since they share a folder. Needs ray (extra `ray`).
"""

import asyncio
import dataclasses
import json
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from adapter_store.errors import AdapterStoreError
from langchain_cope._ray import import_ray
from langchain_cope.engine import EngineOptions
from langchain_cope.errors import InputError
from langchain_cope.serving.errors import ApiError
from langchain_cope.serving.settings import ServeSettings
from langchain_cope.serving.sse import DONE, event

APP = "langchain-cope"
HISTORIES = "histories"
"""The session of requests about histories: not a user's key, which is hexadecimal."""
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_CHAT = "/v1/chat/completions"
_METHODS = ["GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS"]
_KEPT = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")


def serve_on_ray(settings: ServeSettings, address: str, replicas: int) -> None:
    """Serve on the cluster at `address` until a signal comes.

    Raises:
        InputError: There are no keys, or no cluster.
    """
    _check(settings)
    ray = import_ray()
    from ray import serve

    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, RuntimeError) as error:
        raise InputError(f"no Ray cluster at {address!r}: {error}") from error
    # Ray ends in order on Ctrl-C alone; a container is ended with SIGTERM.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    serve.start(http_options={"host": settings.host, "port": settings.port})
    serve.run(deployment(settings, replicas), name=APP, blocking=True)


def app(arguments: Mapping[str, Any]) -> Any:
    """Return the application, for a Serve configuration: `langchain_cope.serving.on_ray:app`.

    Args:
        arguments: fields of `ServeSettings`, `max_rows`, `replicas`, and `cpus`, the cores of each
            replica. The store's keys come of the environment.
    """
    given = dict(arguments)
    replicas, cpus = int(given.pop("replicas", 1)), given.pop("cpus", None)
    max_rows = given.pop("max_rows", None)
    known = {field.name for field in dataclasses.fields(ServeSettings)} - {"engine_options"}
    unknown = sorted(given.keys() - known)
    if unknown:
        raise InputError(f"{unknown[0]!r} is no setting of the server; there are {sorted(known)}")
    for name in ("keys", "data"):
        if name in given:
            given[name] = Path(given[name])
    options = None if max_rows is None else EngineOptions(max_rows=int(max_rows))
    settings = ServeSettings(engine_options=options, **given)
    _check(settings)
    return deployment(settings, replicas, cpus)


def deployment(settings: ServeSettings, replicas: int, cpus: int | None = None) -> Any:
    """Return the application of a door and so many replicas, ready for `serve.run`.

    `cpus` are the cores of each replica; None: its share of this machine's.
    """
    import_ray()
    from fastapi import FastAPI
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    settings = dataclasses.replace(settings, train="off")
    rows = (settings.engine_options or EngineOptions()).max_rows
    replica = serve.deployment(
        Replica,
        name="Replica",
        num_replicas=replicas,
        # It has its own line, and refuses with the time after which to come again.
        max_ongoing_requests=rows + settings.max_waiting,
        max_queued_requests=settings.max_waiting,
        graceful_shutdown_timeout_s=settings.drain,
        health_check_period_s=5,
        health_check_timeout_s=30,
        ray_actor_options={
            "num_cpus": cpus or max(1, (os.cpu_count() or 1) // replicas),
            "num_gpus": int((settings.device or "").startswith("cuda")),
        },
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTER, request_router_kwargs={"num_fallback_replicas": 2}
        ),
    )
    http = FastAPI(openapi_url=None)
    http.add_api_route("/{path:path}", _door, methods=_METHODS)
    door = serve.deployment(
        serve.ingress(http)(Door),
        name="Door",
        max_ongoing_requests=replicas * (rows + settings.max_waiting),
        graceful_shutdown_timeout_s=settings.drain,
        ray_actor_options={"num_cpus": 0},
    )
    return door.bind(replica.bind(settings), settings)


class Replica:
    """The whole server in an actor, without a socket."""

    def __init__(self, settings: ServeSettings) -> None:
        from langchain_cope.serving.app import create_app
        from langchain_cope.serving.state import ServerState

        self._state = ServerState.of(settings)
        self._app = create_app(self._state)
        self._state.load()
        self._state.start_watching()

    async def answer(self, scope: Message, body: bytes) -> AsyncIterator[Message]:
        """Yield the messages of the answer to one request."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        gone = asyncio.Event()
        asked = False

        async def receive() -> Message:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app({**scope, "state": {}}, receive, messages.put)
            finally:
                messages.put_nowait(None)

        running = asyncio.ensure_future(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await running
        finally:  # also where the client has gone
            gone.set()
            running.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await running

    def check_health(self) -> None:
        """Raise RuntimeError where the engine has stopped: Ray then starts another replica."""
        from langchain_cope.engine import Engine

        if self._state.engine not in Engine.running():
            raise RuntimeError("the engine's thread has stopped")

    def pid(self) -> int:
        """Return the process that this runs in."""
        return os.getpid()


class Door:
    """Reads requests, and hands each to the replica of its user."""

    def __init__(self, replicas: Any, settings: ServeSettings) -> None:
        from langchain_cope.serving.keys import KeyFile
        from langchain_cope.stores import open_store

        assert settings.keys is not None
        self._replicas = replicas
        self._settings = settings
        self._keys = KeyFile(settings.keys)
        self._store = open_store(settings.store)

    async def pass_on(self, request: Request) -> Response:
        """Return the answer of a replica; what goes wrong here has the form of its errors."""
        try:
            return await self._answer(request)
        except ApiError as error:
            return error.response()

    async def _answer(self, request: Request) -> Response:
        body = await self._body(request)
        session = await asyncio.to_thread(self._session, request, body)
        scope = {name: request.scope[name] for name in _KEPT if name in request.scope}
        scope["client"] = scope["server"] = None
        messages, start = await self._first(scope, body, session)
        headers = {name.decode(): value.decode("latin-1") for name, value in start["headers"]}
        is_stream = headers.get("content-type", "").startswith("text/event-stream")
        return StreamingResponse(_content(messages, is_stream=is_stream), start["status"], headers)

    async def _first(self, scope: Message, body: bytes, session: str) -> tuple[Any, Message]:
        """Return an answer's messages and the first of them, from the second replica if need be."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import BackPressureError

        options = {"stream": True, **({"session_id": session} if session else {})}
        for is_last in (False, True):
            messages = self._replicas.options(**options).answer.remote(scope, body)
            try:
                return messages, await anext(messages)
            except BackPressureError:
                raise ApiError(
                    429, "server_busy", "too many requests wait: try again later", retry_after=5
                ) from None
            except RayError as error:
                if is_last:
                    detail = type(error).__name__
                    message = "no replica could answer: try again later"
                    raise ApiError(
                        503, "replica_lost", message, retry_after=5, detail=detail
                    ) from error
        raise AssertionError

    async def _body(self, request: Request) -> bytes:
        """Return the request's body; of one that is too long so much that a replica refuses it."""
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.write_deadline):
                async for piece in request.stream():
                    if len(body) <= self._settings.max_body:
                        body += piece
        except TimeoutError:
            message = "the request did not come in time"
            raise ApiError(408, "request_too_slow", message) from None
        return bytes(body)

    def _session(self, request: Request, body: bytes) -> str:
        """Return what decides the replica; "" for any of them."""
        if request.url.path != _CHAT:
            return HISTORIES if request.url.path.startswith("/v1/") else ""
        user = self._user(request, body)
        if user is None:
            return ""
        with suppress(AdapterStoreError):  # of which the replica tells better
            return self._store.user_key(user)
        return ""

    def _user(self, request: Request, body: bytes) -> str | None:
        """Return the user who is meant; whether the key may name that user the replica decides."""
        from langchain_cope.serving.chat_request import split_model

        _, _, text = request.headers.get("Authorization", "").partition(" ")
        holder = self._keys.principal_of(text.strip())
        if holder is None:
            return None
        named: Any = None
        with suppress(ValueError, AttributeError, TypeError, ApiError, RecursionError):
            fields = json.loads(body)
            named = fields.get("user") or split_model(fields.get("model"), self._settings.name)
        header = self._settings.user_header
        if named is None and header is not None and holder.trusted_header:
            named = request.headers.get(header)
        return named if isinstance(named, str) and named else holder.users.only


async def _door(request: Request) -> Response:
    from ray import serve

    door: Door = serve.get_replica_context().servable_object
    return await door.pass_on(request)


async def _content(messages: Any, *, is_stream: bool) -> AsyncIterator[bytes]:
    """Yield the body of an answer; where a stream's replica dies, an error event ends it."""
    from ray.exceptions import RayError

    try:
        async for message in messages:
            if message["type"] == "http.response.body":
                yield message.get("body", b"")
    except RayError:
        if not is_stream:
            raise
        lost = ApiError(
            503, "replica_lost", "the replica that answered was lost: ask again", retry_after=1
        )
        yield (event(lost.body) + DONE).encode()
    finally:
        messages.cancel()  # where the client has gone


def _check(settings: ServeSettings) -> None:
    if settings.keys is None:
        raise InputError(
            "a server on Ray may be reached from other machines, whatever its address, and there "
            "are no keys: make some with `cope-lc keys new --keys FILE` and give --keys FILE"
        )
