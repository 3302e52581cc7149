"""A store that is slow rather than away: who is being answered goes on, who comes waits for it."""

import shutil
import threading
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
    folder, store = with_users(published, tmp_path, base, "alvin")
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


def test_newcomers_wait_for_a_slow_store_side_by_side(
    base: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = [f"al{number}" for number in range(12)]
    folder, store = with_users(published, tmp_path, base, *users)
    with running(base, folder, tmp_path) as server, ThreadPoolExecutor(len(users)) as threads:
        asking, fetching = AtATime(), AtATime()
        for verb, count in (("stat", asking), ("get", fetching)):
            monkeypatch.setattr(LocalBackend, verb, count(getattr(LocalBackend, verb)))
        answers = list(threads.map(lambda user: server.ask("app", user=user), users))
    versions = [answer.json()["cope"]["adapter_version"] for answer in answers]
    assert versions == [store.active(user) for user in users]
    assert asking.most >= 8, "requests wait for the store at a time"
    assert fetching.weights >= 4, "adapters are fetched at a time"


def with_users(
    published: Path, tmp_path: Path, base: Path, *users: str
) -> tuple[Path, AdapterStore]:
    """Return a copy of a store, folder and store, that also has a version of each of `users`."""
    folder = shutil.copytree(published, tmp_path / "adapters")
    store = AdapterStore(str(folder))
    adapter = make_adapter(tmp_path / "adapter", base, seed=9)
    fingerprint = load_base(str(base)).fingerprint()
    for user in users:
        store.publish(user, adapter, base=fingerprint)
    return folder, store


class AtATime:
    """Makes verbs of a backend slow, and counts how many calls there are at a time."""

    def __init__(self) -> None:
        self.most = self.weights = 0
        """Of all files, and of adapters' weights."""
        self._now: list[str] = []
        self._lock = threading.Lock()

    def __call__(self, verb: Callable[..., Any]) -> Callable[..., Any]:
        slow_verb = slow(verb, READ / 2)

        def counted(backend: LocalBackend, key: str, *arguments: Any) -> Any:
            with self._lock:
                self._now.append(key)
                self.most = max(self.most, len(self._now))
                weights = sum(each.endswith(".safetensors") for each in self._now)
                self.weights = max(self.weights, weights)
            try:
                return slow_verb(backend, key, *arguments)
            finally:
                with self._lock:
                    self._now.remove(key)

        return counted


def slow(verb: Callable[..., Any], seconds: float = READ) -> Callable[..., Any]:
    """Return a verb of a backend that takes its time."""

    def wait(*arguments: Any) -> Any:
        time.sleep(seconds)
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
