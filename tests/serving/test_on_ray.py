"""A fleet, and a server of two replicas, on a real Ray cluster of this machine.

The same results as without Ray, and what a death costs. All are in one file because a cluster
takes long to start.
"""

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fleet_users import histories_in, plan_in
from serving.conftest import ROLES, Running, wait_until
from serving.matrix import LOCKED, MATRIX

from adapter_store import AdapterStore
from langchain_cope.engine import EngineOptions
from langchain_cope.errors import InputError
from langchain_cope.fleet import open_source, run_fleet
from langchain_cope.fleet.runner import WorkersFailed
from langchain_cope.fleet.tasks import State
from langchain_cope.serving import ServeSettings
from langchain_cope.serving.keys import add_key, new_key

ray: Any = pytest.importorskip("ray", reason="ray is not installed (extra ray)")
pytestmark = pytest.mark.filterwarnings("ignore")  # ray's own

PORT = 18765


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of two cores."""
    from langchain_cope._ray import import_ray

    import_ray()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()  # servers, too, and at once: their own end waits for answers under way


@pytest.fixture(scope="module")
def on_ray(
    base: Path, published: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None
) -> Running:
    """The tests' server on two replicas."""
    from ray import serve

    from langchain_cope.serving.on_ray import APP, deployment

    folder = tmp_path_factory.mktemp("on-ray")
    made = {role: new_key(role, **settings) for role, settings in ROLES.items()}
    for _, key in made.values():
        add_key(folder / "keys.json", key)
    settings = ServeSettings(
        model=str(base),
        served_name="tiny",
        store=str(published),
        data=folder / "data",
        keys=folder / "keys.json",
        user_header="X-User",
        device="cpu",
        engine_options=EngineOptions(max_rows=16),
    )
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(deployment(settings, 2), name=APP)
    texts = {role: text for role, (text, _) in made.items()}
    unused: Any = None
    return Running(unused, unused, f"http://127.0.0.1:{PORT}", texts, {}, base)


def replica_of(user_key: str) -> int:
    """Return the process of the replica that a user's requests go to."""
    from ray import serve

    from langchain_cope.serving.on_ray import APP

    handle = serve.get_deployment_handle("Replica", APP)
    return int(handle.options(session_id=user_key).pid.remote().result())


def homes(settings: ServeSettings, num_replicas: int, keys: list[str]) -> list[str]:
    """Return which of so many replicas Ray's router, as we set it, sends each session to."""
    from ray.serve._private.common import (
        DeploymentHandleSource,
        DeploymentID,
        ReplicaID,
        RequestMetadata,
    )
    from ray.serve._private.request_router.common import PendingRequest

    from langchain_cope.serving.on_ray import deployment

    door = deployment(settings, num_replicas)._bound_deployment
    config = door.init_args[0]._bound_deployment._deployment_config.request_router_config
    app = DeploymentID("Replica", "test")
    router = config.get_request_router_class()(app, DeploymentHandleSource.REPLICA)
    router.initialize_state(**config.request_router_kwargs)
    ids = [ReplicaID(f"replica-{number}", app) for number in range(num_replicas)]
    replicas = [SimpleNamespace(replica_id=one) for one in ids]
    router._replicas = dict(zip(ids, replicas, strict=True))
    router._rebuild_ring(frozenset(ids))

    async def chosen(key: str) -> str:
        request = PendingRequest([], {}, RequestMetadata("r", key, session_id=key))
        (first, *_), *_ = await router.choose_replicas(replicas, request)
        return str(first.replica_id.unique_id)

    async def of_all() -> list[str]:
        return [await chosen(key) for key in keys]

    return asyncio.run(of_all())


def text_of(answer: httpx.Response) -> str:
    return str(answer.json()["choices"][0]["message"]["content"])


@pytest.mark.usefixtures("cluster")
def test_a_killed_actor_costs_nobody_the_version(tiny: Callable[..., Path], tmp_path: Path) -> None:
    from langchain_cope.fleet.on_ray import RayRunner

    plan = plan_in(tmp_path, tiny("llama", initializer_range=0.05))

    runner, killed = RayRunner(2, "auto"), []

    def kill_once(progress: Any) -> None:
        if progress.done == 2 and not killed:
            busy = next(actor for actor in runner._workers if actor.task is not None)
            killed.append(ray.get(busy.handle.pid.options(concurrency_group="stop").remote()))
            os.kill(killed[0], signal.SIGKILL)

    report = run_fleet(
        open_source(histories_in(tmp_path)), plan, tmp_path / "work", runner, on_progress=kill_once
    )
    assert killed
    store = AdapterStore(plan.store)
    for user, outcome in report.users.items():
        assert outcome.state is State.PUBLISHED, outcome.reason
        assert [version.version for version in store.versions(user)] == [outcome.version]


@pytest.mark.usefixtures("cluster")
def test_a_base_that_is_on_no_machine_is_named(tmp_path: Path) -> None:
    from langchain_cope.fleet.on_ray import RayRunner

    with pytest.raises(WorkersFailed, match="missing"):
        run_fleet(
            open_source(histories_in(tmp_path)),
            plan_in(tmp_path, tmp_path / "missing"),
            tmp_path / "work",
            RayRunner(1, "auto"),
        )


def test_every_user_is_answered_as_by_the_local_server(on_ray: Running, server: Running) -> None:
    for role, fields in (("alice", {}), ("bob", {}), ("base", {}), ("app", {"user": "alice"})):
        here, there = (each.ask(role, max_tokens=12, **fields) for each in (server, on_ray))
        assert there.status_code == 200, there.text
        assert text_of(there) == text_of(here)
    with on_ray.client("alice") as client:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = [line for line in stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 3


def test_keys_and_routes_are_those_of_the_local_server(on_ray: Running) -> None:
    for (method, path), statuses in MATRIX.items():
        if "{" in path:
            continue
        with on_ray.client(None) as client:
            assert client.request(method, path).status_code == statuses[0], path
        if statuses[:4] == LOCKED:
            with on_ray.client("malformed") as client:
                assert client.request(method, path).status_code == 401
    assert on_ray.ask("alice", user="bob").status_code == 403
    with on_ray.client("alice") as client:
        assert client.get("/v1/nothing").status_code == 404
        assert client.post("/v1/chat/completions", content=b"x" * (2 << 20)).status_code == 413
        refused = client.post("/v1/personalize", json={"user": "alice"})
        assert refused.json()["error"]["code"] == "training_off"
        rows = [{"prompt": "a", "completion": "b"}]
        assert client.post("/v1/history", json={"user": "alice", "rows": rows}).status_code == 200
        assert client.get("/v1/history", params={"user": "alice"}).json()["items"] == 1


def test_a_user_stays_on_one_replica_and_users_are_spread(on_ray: Running) -> None:
    keys = [f"{number:064x}" for number in range(20)]
    first = [replica_of(key) for key in keys]
    assert [replica_of(key) for key in keys] == first
    assert len(set(first)) == 2


@pytest.mark.parametrize("replicas", [2, 4, 8])
def test_a_new_replica_moves_few_users(base: Path, tmp_path: Path, replicas: int) -> None:
    settings = ServeSettings(model=str(base), data=tmp_path, keys=tmp_path / "keys.json")
    keys = [f"{number:064x}" for number in range(1000)]
    before, after = homes(settings, replicas, keys), homes(settings, replicas + 1, keys)
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert 0 < len(moved) <= 2 / (replicas + 1) * len(keys)
    assert set(moved) == {f"replica-{replicas}"}  # nobody changes between those that stay
    assert max(Counter(after).values()) <= 2 / (replicas + 1) * len(keys)


def test_a_replica_that_dies_costs_no_request_before_its_first_piece(
    on_ray: Running, published: Path
) -> None:
    key = AdapterStore(str(published)).user_key("alice")
    victim = replica_of(key)
    answers: list[httpx.Response] = []
    asking = [
        threading.Thread(target=lambda: answers.append(on_ray.ask("alice", max_tokens=400)))
        for _ in range(4)
    ]
    for thread in asking:
        thread.start()
    time.sleep(0.3)
    os.kill(victim, signal.SIGKILL)
    for thread in asking:
        thread.join(60)
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({text_of(answer) for answer in answers}) == 1
    wait_until(lambda: replica_of(key) != victim, seconds=60)


def test_a_stream_whose_replica_dies_ends_with_an_error_event(
    on_ray: Running, published: Path
) -> None:
    victim = replica_of(AdapterStore(str(published)).user_key("bob"))
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
        "max_tokens": 900,
    }
    with (
        on_ray.client("bob") as client,
        client.stream("POST", "/v1/chat/completions", json=body) as stream,
    ):
        lines = []
        for line in stream.iter_lines():
            if line:
                lines.append(line)
            if len(lines) == 3:
                os.kill(victim, signal.SIGKILL)
    assert lines[-1] == "data: [DONE]"
    assert '"code":"replica_lost"' in lines[-2]


def test_without_keys_nothing_is_served(base: Path, tmp_path: Path) -> None:
    from langchain_cope.serving.on_ray import app, serve_on_ray

    settings = ServeSettings(model=str(base), data=tmp_path)
    with pytest.raises(InputError, match="cope-lc keys new"):
        serve_on_ray(settings, "local", 1)
    with pytest.raises(InputError, match="cope-lc keys new"):
        app({"model": str(base)})
    with pytest.raises(InputError, match="'colour' is no setting"):
        app({"model": str(base), "colour": "red"})
