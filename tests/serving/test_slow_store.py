"""A store that is slow rather than away: who is being answered goes on, who comes waits for it."""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving.conftest import Running, running, wait_until
from tiny import make_adapter

from adapter_store import AdapterStore, LocalBackend
from langchain_cope.engine import load_base

READ = 0.4  # seconds that every question to the store takes


def test_a_slow_store_holds_up_newcomers_alone(
    base: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(published, tmp_path / "adapters")
    store = AdapterStore(str(folder))
    adapter = make_adapter(tmp_path / "adapter", base, seed=9)
    store.publish("alvin", adapter, base=load_base(str(base)).fingerprint())
    with running(base, folder, tmp_path) as server, ThreadPoolExecutor(4) as threads:
        engine = server.state.engine
        assert engine is not None
        reading = threads.submit(times_of_pieces, server)
        wait_until(lambda: engine.statistics().rows > 0, seconds=20)
        for verb in ("get", "stat", "list_folder"):
            monkeypatch.setattr(LocalBackend, verb, slow(getattr(LocalBackend, verb)))
        begun = time.monotonic()
        asked = {
            "alice": threads.submit(server.ask, "alice"),
            "bob": threads.submit(server.ask, "bob"),
            "alvin": threads.submit(server.ask, "app", user="alvin"),
        }
        with server.client(None) as probe:
            assert probe.get("/healthz").status_code == probe.get("/readyz").status_code == 200
        assert not all(answer.done() for answer in asked.values()), "probes wait for no store"
        for user, answer in asked.items():
            assert answer.result().json()["cope"]["adapter_version"] == store.active(user)
        ended = time.monotonic()
        assert ended - begun > READ, "they asked the store"
        pieces = reading.result()
        # On a fast machine the answer is over before the store has told anything.
        assert sum(begun < at < ended for at in pieces) > 20 or pieces[-1] < begun + READ


def slow(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Return a verb of a backend that takes its time."""

    def wait(*arguments: Any) -> Any:
        time.sleep(READ)
        return verb(*arguments)

    return wait


def times_of_pieces(server: Running) -> list[float]:
    """Return when each piece of a long answer to alice came."""
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Tell me more"}],
        "max_tokens": 900,
        "temperature": 1,
        "stream": True,
    }
    with (
        server.client("alice") as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        lines = response.iter_lines()
        return [time.monotonic() for line in lines if line.startswith("data: {")]
