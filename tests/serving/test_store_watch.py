"""A store that is away for a moment ends no server; one that stays away does, and says so."""

import threading
from pathlib import Path

import pytest
from serving.conftest import Running, running, wait_until

from adapter_store.errors import BackendError
from langchain_cope.serving import store_watch
from langchain_cope.serving.store_watch import StoreWatch


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Store:
    """Counts what it is asked; `away` makes it fail, `hang` makes it wait."""

    away, asked = False, 0

    def __init__(self) -> None:
        self.hang = threading.Event()
        self.hang.set()

    def exists(self) -> bool:
        self.asked += 1
        self.hang.wait(5)
        if self.away:
            raise BackendError("out of reach")
        return True


def test_a_store_that_is_away_is_given_half_a_minute() -> None:
    clock, store = Clock(), Store()
    watch = StoreWatch(store, clock)  # type: ignore[arg-type]
    watch.ask()
    store.away = True
    seen = []
    for _ in range(4):
        clock.now += 10
        watch.ask()
        seen.append(watch.is_well())
    assert seen == [True, True, False, False]
    store.away = False
    watch.ask()
    assert watch.is_well()


def test_a_store_is_asked_while_nobody_wants_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, store = Clock(), Store()
    watch = StoreWatch(store, clock)  # type: ignore[arg-type]
    monkeypatch.setattr(store_watch, "ASK_SECONDS", 0.01)
    watch.start()
    wait_until(lambda: store.asked >= 3)
    clock.now += 1000  # as after a night without a probe
    wait_until(watch.is_well)
    watch.close()


def test_a_store_that_hangs_holds_one_thread_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, store = Clock(), Store()
    watch = StoreWatch(store, clock)  # type: ignore[arg-type]
    monkeypatch.setattr(store_watch, "ASK_SECONDS", 0.01)
    store.hang.clear()
    watch.start()
    wait_until(lambda: store.asked == 1)
    clock.now += 31
    assert not watch.is_well()
    assert store.asked == 1
    store.hang.set()
    wait_until(watch.is_well)
    watch.close()


def test_readiness_says_why_not_in_the_form_of_errors(
    base: Path, published: Path, tmp_path: Path
) -> None:
    with running(base, published, tmp_path) as server, server.client(None) as probe:
        assert probe.get("/readyz").json() == {"status": "ok"}
        engine, server.state.engine = server.state.engine, None
        assert why_not(server) == "starting"
        server.state.engine = engine
        clock = Clock()
        server.state.store_watch = StoreWatch(server.state.store, clock)
        clock.now += 31
        assert why_not(server) == "store_unavailable"
        assert server.ask().status_code == 200  # readiness is advice; the store itself answers
        server.state.begin_drain()
        assert why_not(server) == "stopping"


def why_not(server: Running) -> str:
    with server.client(None) as probe:
        answer = probe.get("/readyz")
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "5"
    return str(answer.json()["error"]["code"])
