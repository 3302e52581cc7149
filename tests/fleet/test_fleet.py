"""A fleet: everybody trained, verdicts last, exactly one publish a user."""

import json
import os
import signal
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from fleet_users import write_users

from adapter_store import AdapterStore
from adapter_store.errors import BackendError
from langchain_cope.errors import Cancelled, InputError
from langchain_cope.fleet import Plan, ProcessRunner, SerialRunner, open_source, run_fleet
from langchain_cope.fleet.fleet import FleetProgress
from langchain_cope.fleet.runner import WorkersFailed
from langchain_cope.fleet.tasks import State
from langchain_cope.fleet.worker import Worker, _Known


def states(report) -> dict[str, State]:
    return {user: outcome.state for user, outcome in report.users.items()}


def test_everybody_is_trained_and_published_once(
    plan: Plan, histories: Path, tmp_path: Path
) -> None:
    seen: list[FleetProgress] = []
    source = open_source(histories)
    report = run_fleet(source, plan, tmp_path / "work", SerialRunner(), on_progress=seen.append)
    assert set(states(report)) == {"alice", "bob", "carol"}
    assert set(states(report).values()) == {State.PUBLISHED}
    assert report.is_complete
    store = AdapterStore(plan.store)
    for user, outcome in report.users.items():
        (version,) = store.versions(user)
        assert version.version == outcome.version == store.active(user)
        assert store.candidate(user) is None
        assert outcome.verdict["mean_gain"] > 0
    assert [progress.done for progress in seen] == [0, 1, 2, 3]
    json.dumps(report.as_dict(), allow_nan=False)
    assert not list((tmp_path / "jobs").iterdir())

    again = run_fleet(open_source(histories), plan, tmp_path / "work", SerialRunner())
    assert set(states(again).values()) == {State.UNCHANGED}
    assert [len(store.versions(user)) for user in report.users] == [1, 1, 1]


def test_candidates_wait_until_all_are_trained(plan: Plan, histories: Path, tmp_path: Path) -> None:
    store, seen = AdapterStore(plan.store), []

    def look(progress: FleetProgress) -> None:
        if progress.done == 2:
            waiting = [store.candidate(user) for user in ("alice", "bob", "carol")]
            seen.append(sum(one is not None for one in waiting))
            assert [store.versions(user) for user in ("alice", "bob")] == [[], []]

    run_fleet(open_source(histories), plan, tmp_path / "work", SerialRunner(), on_progress=look)
    assert seen == [2]


def test_two_processes_do_what_one_does(plan: Plan, histories: Path, tmp_path: Path) -> None:
    report = run_fleet(open_source(histories), plan, tmp_path / "work", ProcessRunner(2))
    alone = run_fleet(
        open_source(histories),
        replace(plan, store=str(tmp_path / "other"), job_dir=str(tmp_path / "other_jobs")),
        tmp_path / "other_work",
        SerialRunner(),
    )
    assert states(report) == states(alone)
    for user, outcome in report.users.items():
        assert outcome.metrics["sft"] == pytest.approx(alone.users[user].metrics["sft"], rel=1e-3)


def test_a_stopped_fleet_publishes_nothing_and_goes_on(
    plan: Plan, histories: Path, tmp_path: Path
) -> None:
    stop = threading.Event()

    def stop_after_one(progress: FleetProgress) -> None:
        if progress.done == 1:
            stop.set()

    with pytest.raises(Cancelled, match="1 of 3 users are done"):
        run_fleet(
            open_source(histories),
            plan,
            tmp_path / "work",
            SerialRunner(),
            stop=stop,
            on_progress=stop_after_one,
        )
    store = AdapterStore(plan.store)
    assert [store.versions(user) for user in ("alice", "bob", "carol")] == [[], [], []]
    waiting = store.candidate("alice") or store.candidate("carol")
    report = run_fleet(open_source(histories), plan, tmp_path / "work", SerialRunner())
    assert set(states(report).values()) == {State.PUBLISHED}
    assert waiting is not None
    assert store.versions(waiting.user_id) == [waiting]  # not trained a second time


def test_without_its_ledger_a_fleet_finds_its_candidates(
    plan: Plan, histories: Path, tmp_path: Path
) -> None:
    stop = threading.Event()
    with pytest.raises(Cancelled):
        run_fleet(
            open_source(histories),
            plan,
            tmp_path / "work",
            SerialRunner(),
            stop=stop,
            on_progress=lambda progress: stop.set() if progress.done == 2 else None,
        )
    store = AdapterStore(plan.store)
    waiting = {user: store.candidate(user) for user in ("alice", "bob", "carol")}
    report = run_fleet(open_source(histories), plan, tmp_path / "elsewhere", SerialRunner())
    assert set(states(report).values()) == {State.PUBLISHED}
    for user, candidate in waiting.items():
        if candidate is not None:
            assert store.versions(user) == [candidate]


def test_an_erasure_fences_the_training_under_way(
    plan: Plan, histories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, work = AdapterStore(plan.store), Worker.work

    def erase_meanwhile(self, task, should_stop):
        if task.user == "bob":
            store.erase_user("bob")
        outcome = work(self, task, should_stop)
        if task.user == "alice":
            store.erase_user("alice")  # whose candidate waits already
        return outcome

    monkeypatch.setattr(Worker, "work", erase_meanwhile)
    report = run_fleet(open_source(histories), plan, tmp_path / "work", SerialRunner())
    assert states(report) == {
        "alice": State.ERASED,
        "bob": State.ERASED,
        "carol": State.PUBLISHED,
    }
    assert store.versions("alice") == store.versions("bob") == []
    assert not list((tmp_path / "jobs").iterdir())


def test_who_fails_twice_is_named_and_passed_over(
    plan: Plan, histories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: Counter[str] = Counter()
    trained = Worker._trained

    def fail(self, task, should_stop):
        tries[task.user] += 1
        if task.user == "bob":
            with suppress(_Known):  # of the second time
                trained(self, task, should_stop)  # leaves a candidate that nobody hears of
        if task.user == "bob" or (task.user == "carol" and tries["carol"] == 1):
            raise RuntimeError("out of luck")
        return trained(self, task, should_stop)

    monkeypatch.setattr(Worker, "_trained", fail)
    report = run_fleet(open_source(histories), plan, tmp_path / "work", SerialRunner())
    assert states(report)["bob"] is State.FAILED
    assert states(report)["carol"] is states(report)["alice"] is State.PUBLISHED
    assert report.failures == {"RuntimeError: out of luck": 1}
    assert tries == {"alice": 1, "bob": 2, "carol": 2}
    assert AdapterStore(plan.store).candidate("bob") is None


def test_short_histories_and_broken_files_are_named(plan: Plan, tmp_path: Path) -> None:
    folder = tmp_path / "histories"
    folder.mkdir()
    write_users(folder / "a.jsonl", ["alice"])
    write_users(folder / "b.jsonl", ["bob"], num_items=3)
    (folder / "c.jsonl").write_text("{broken")
    report = run_fleet(open_source(folder), plan, tmp_path / "work", SerialRunner())
    assert states(report) == {"alice": State.PUBLISHED, "bob": State.UNFIT}
    assert "at least 5 are needed" in report.users["bob"].reason
    assert "c.jsonl:1: broken JSON" in report.unreadable["c.jsonl"]


def test_a_killed_worker_is_replaced_and_its_user_trained(
    plan: Plan, histories: Path, tmp_path: Path
) -> None:
    killed = []

    def kill_once(progress: FleetProgress) -> None:
        if progress.done == 1 and not killed:
            worker = runner._workers[0]
            killed.append(worker._process.pid)
            os.kill(worker._process.pid, signal.SIGKILL)

    runner = ProcessRunner(1)
    report = run_fleet(
        open_source(histories), plan, tmp_path / "work", runner, on_progress=kill_once
    )
    assert killed
    assert set(states(report).values()) == {State.PUBLISHED}


def test_a_base_that_is_gone_ends_the_fleet_at_once(
    plan: Plan, histories: Path, tmp_path: Path
) -> None:
    missing = replace(plan, model=str(tmp_path / "missing"))
    with pytest.raises(WorkersFailed, match="missing"):
        run_fleet(open_source(histories), missing, tmp_path / "work", ProcessRunner(2))
    report = run_fleet(open_source(histories), plan, tmp_path / "work", SerialRunner())
    assert set(states(report).values()) == {State.PUBLISHED}


def test_a_store_that_is_away_for_a_while_costs_no_user(
    plan: Plan, histories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langchain_cope.fleet.fleet.PAUSES_SECONDS", (0.01,))
    away = iter(range(4))
    publish = AdapterStore.publish

    def refuse_at_first(self, *args, **options):
        if next(away, None) is not None:
            raise BackendError("the storage is away")
        return publish(self, *args, **options)

    monkeypatch.setattr(AdapterStore, "publish", refuse_at_first)
    report = run_fleet(open_source(histories), plan, tmp_path / "work", SerialRunner())
    assert set(states(report).values()) == {State.PUBLISHED}
    monkeypatch.setattr(
        AdapterStore, "data_seq", lambda *_: (_ for _ in ()).throw(BackendError("away"))
    )
    with pytest.raises(BackendError, match="nothing is lost"):
        run_fleet(open_source(histories), plan, tmp_path / "w2", SerialRunner(), patience=0.05)


def test_two_runs_in_one_folder_are_refused(plan: Plan, histories: Path, tmp_path: Path) -> None:
    def again(progress: FleetProgress) -> None:
        if progress.done == 0:
            with pytest.raises(InputError, match="another run of this fleet"):
                run_fleet(open_source(histories), plan, tmp_path / "work", SerialRunner())

    run_fleet(open_source(histories), plan, tmp_path / "work", SerialRunner(), on_progress=again)


def test_a_version_that_became_active_meanwhile_stays(
    plan: Plan, histories: Path, tmp_path: Path
) -> None:
    from adapter_store.conformance import BASE, make_adapter

    store, theirs = AdapterStore(plan.store), []

    def publish_meanwhile(progress: FleetProgress) -> None:
        if progress.done == 3:
            theirs.append(store.publish("bob", make_adapter(1), base=BASE))

    report = run_fleet(
        open_source(histories),
        plan,
        tmp_path / "work",
        SerialRunner(),
        on_progress=publish_meanwhile,
    )
    assert states(report)["bob"] is State.SUPERSEDED
    assert store.versions("bob") == theirs
    assert store.candidate("bob") is None
