"""The same fleet on a real Ray cluster of this machine."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapter_store import AdapterStore
from langchain_cope.fleet import Plan, open_source, run_fleet
from langchain_cope.fleet.runner import WorkersFailed
from langchain_cope.fleet.tasks import State

ray: Any = pytest.importorskip("ray", reason="ray is not installed (extra ray)")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # ray's own
    pytest.mark.usefixtures("ray_cluster"),
]


def test_a_killed_actor_costs_nobody_the_version(
    plan: Plan, histories: Path, tmp_path: Path
) -> None:
    from langchain_cope.fleet.on_ray import RayRunner

    runner, killed = RayRunner(2, "auto"), []

    def kill_once(progress: Any) -> None:
        if progress.done == 2 and not killed:
            busy = next(actor for actor in runner._workers if actor.task is not None)
            killed.append(ray.get(busy.handle.pid.options(concurrency_group="stop").remote()))
            os.kill(killed[0], signal.SIGKILL)

    report = run_fleet(
        open_source(histories), plan, tmp_path / "work", runner, on_progress=kill_once
    )
    assert killed
    store = AdapterStore(plan.store)
    for user, outcome in report.users.items():
        assert outcome.state is State.PUBLISHED, outcome.reason
        assert [version.version for version in store.versions(user)] == [outcome.version]


def test_a_base_that_is_on_no_machine_is_named(plan: Plan, histories: Path, tmp_path: Path) -> None:
    from langchain_cope.fleet.on_ray import RayRunner

    with pytest.raises(WorkersFailed, match="missing"):
        run_fleet(
            open_source(histories),
            replace(plan, model=str(tmp_path / "missing")),
            tmp_path / "work",
            RayRunner(1, "auto"),
        )
