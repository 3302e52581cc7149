"""A real server on a loopback port: a tiny base, two users' adapters, keys of every kind."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny import TOOLS, make_adapter, make_model

from adapter_store import AdapterStore
from langchain_cope.engine import load_base
from langchain_cope.serving import ServerState, ServeSettings
from langchain_cope.serving.keys import Key, add_key, new_key
from langchain_cope.serving.principals import (
    ADMIN_SCOPES,
    ANYBODY,
    APP_SCOPES,
    NOBODY,
    USER_SCOPES,
    Users,
)
from langchain_cope.serving.run import DrainingServer, server_of

ROLES: dict[str, dict[str, Any]] = {
    "alice": {"scopes": USER_SCOPES, "users": Users(("alice",))},
    "bob": {"scopes": USER_SCOPES, "users": Users(("bob",))},
    "app": {"scopes": APP_SCOPES, "users": Users(prefix="al")},
    "proxy": {"scopes": APP_SCOPES, "users": ANYBODY, "trusted_header": True},
    "base": {"scopes": frozenset({"chat"}), "users": NOBODY},
    "admin": {"scopes": ADMIN_SCOPES, "users": ANYBODY},
}


@dataclass
class Running:
    """A server that runs."""

    server: DrainingServer
    state: ServerState
    url: str
    keys: dict[str, str]
    records: dict[str, Key]
    base: Path

    def client(self, role: str | None = "alice", **options: Any) -> httpx.Client:
        headers = {} if role is None else {"Authorization": f"Bearer {self.keys.get(role, role)}"}
        return httpx.Client(
            base_url=self.url,
            headers={**headers, **options.pop("headers", {})},
            timeout=30,
            **options,
        )

    def ask(self, role: str = "alice", text: str = "Hello", **fields: Any) -> httpx.Response:
        body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 8}
        with self.client(role) as client:
            return client.post("/v1/chat/completions", json={**body, **fields})


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base whose replies may hold calls and JSON."""
    folder = tmp_path_factory.mktemp("served")
    return make_model(folder, "llama", template=TOOLS, context=1024, likely='"]}')


@pytest.fixture(scope="session")
def published(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter store in which alice and bob have a version each."""
    folder = tmp_path_factory.mktemp("served-store")
    store = AdapterStore(str(folder / "adapters"))
    fingerprint = load_base(str(base)).fingerprint()
    for seed, user in enumerate(("alice", "bob"), 1):
        adapter = make_adapter(tmp_path_factory.mktemp(user), base, seed=seed)
        store.publish(user, adapter, base=fingerprint)
    return folder / "adapters"


@contextmanager
def running(
    base: Path, store: Path, folder: Path, *, keys: bool = True, **options: Any
) -> Iterator[Running]:
    """Run a server in a thread of its own until the block ends."""
    made = {role: new_key(role, **settings) for role, settings in ROLES.items()} if keys else {}
    for _, key in made.values():
        add_key(folder / "keys.json", key)
    settings = ServeSettings(
        model=str(base),
        served_name="tiny",
        store=str(store),
        data=folder / "data",
        keys=folder / "keys.json" if keys else None,
        port=0,
        user_header="X-User",
        **options,
    )
    state = ServerState.of(settings)
    server = server_of(state)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(
        target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True
    )
    thread.start()
    wait_until(lambda: server.started, seconds=30)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    texts = {role: text for role, (text, _) in made.items()}
    try:
        yield Running(
            server, state, url, texts, {role: key for role, (_, key) in made.items()}, base
        )
    finally:
        server.should_exit = True
        thread.join(30)


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def server(
    base: Path, published: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """The server that most tests ask."""
    with running(base, published, tmp_path_factory.mktemp("server")) as started:
        yield started
