"""A fleet: everybody trained, verdicts last, exactly one publish a user."""

import errno
import itertools
import json
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from fleet_users import FAST, histories_in, plan_in, write_users

from adapter_store import AdapterStore
from adapter_store.errors import BackendError
from langchain_cope.errors import Cancelled, HistoryUnreachable, InputError
from langchain_cope.fleet import (
    FleetReport,
    Plan,
    ProcessRunner,
    SerialRunner,
    open_source,
    run_fleet,
)
from langchain_cope.fleet.fleet import FleetProgress
from langchain_cope.fleet.runner import WorkersFailed
from langchain_cope.fleet.sources import of_store
from langchain_cope.fleet.tasks import State, Task
from langchain_cope.fleet.worker import Worker, _Known
from langchain_cope.history.items import UserHistory


def states(report: FleetReport) -> dict[str, State]:
    return {user: outcome.state for user, outcome in report.users.items()}


def cancelled(
    plan: Plan, histories: Path, work: Path, enough: Callable[[FleetProgress], bool]
) -> str:
    """Run a fleet, stop it once there is `enough` of it, and return what it says."""
    stop = threading.Event()

    def look(progress: FleetProgress) -> None:
        if enough(progress):
            stop.set()

    with pytest.raises(Cancelled) as error:
        run_fleet(open_source(histories), plan, work, SerialRunner(), stop=stop, on_progress=look)
    return str(error.value)


@pytest.fixture(scope="module")
def alone(
    base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, Path, Path, FleetReport]:
    """A fleet that one worker of this process trained, of which tests look at different sides."""
    folder = tmp_path_factory.mktemp("alone")
    plan, histories = plan_in(folder, base), histories_in(folder)
    store = AdapterStore(plan.store)

    def look(progress: FleetProgress) -> None:
        seen.append(progress.done)
        if progress.done == 2:
            waiting = [store.candidate(user) for user in ("alice", "bob", "carol")]
            assert sum(one is not None for one in waiting) == 2
            assert [store.versions(user) for user in ("alice", "bob", "carol")] == [[], [], []]

    seen: list[int] = []
    work = folder / "work"
    report = run_fleet(open_source(histories), plan, work, SerialRunner(), on_progress=look)
    assert seen == [0, 1, 2, 3]  # and candidates waited until all were trained
    return plan, histories, work, report


def test_everybody_is_trained_and_published_once(
    alone: tuple[Plan, Path, Path, FleetReport],
) -> None:
    plan, histories, work, report = alone
    assert set(states(report)) == {"alice", "bob", "carol"}
    assert set(states(report).values()) == {State.PUBLISHED}
    assert report.is_complete
    store = AdapterStore(plan.store)
    for user, outcome in report.users.items():
        (version,) = store.versions(user)
        assert version.version == outcome.version == store.active(user)
        assert store.candidate(user) is None
        assert outcome.verdict["mean_gain"] > 0
    json.dumps(report.as_dict(), allow_nan=False)
    assert not list(Path(plan.job_dir).iterdir())

    again = run_fleet(open_source(histories), plan, work, SerialRunner())
    assert set(states(again).values()) == {State.UNCHANGED}
    assert [len(store.versions(user)) for user in report.users] == [1, 1, 1]


def test_processes_do_what_one_does_though_one_is_killed(
    plan: Plan, histories: Path, tmp_path: Path, alone: tuple[Plan, Path, Path, FleetReport]
) -> None:
    class Interrupted(ProcessRunner):
        def start(self, plan: Plan) -> None:
            super().start(plan)
            for worker in self._workers:  # as a terminal does, in whatever moment
                os.kill(worker._process.pid, signal.SIGINT)
                os.kill(worker._process.pid, signal.SIGTERM)

    runner, killed, reasons = Interrupted(2), [], set()

    def kill_once(progress: FleetProgress) -> None:
        reasons.update(progress.failures)
        if progress.done == 1 and not killed:
            busy = next(worker for worker in runner._workers if worker.task is not None)
            killed.append(busy._process.pid)
            os.kill(busy._process.pid, signal.SIGKILL)

    source = open_source(histories)
    report = run_fleet(source, plan, tmp_path / "work", runner, on_progress=kill_once)
    assert killed
    assert all("signal 9" in reason for reason in reasons)
    *_, one = alone
    assert states(report) == states(one)
    for user, outcome in report.users.items():
        assert outcome.metrics["sft"] == pytest.approx(one.users[user].metrics["sft"], rel=1e-3)
        assert len(AdapterStore(plan.store).versions(user)) == 1


def test_a_stopped_fleet_publishes_nothing_and_goes_on(
    plan: Plan, histories: Path, tmp_path: Path
) -> None:
    said = cancelled(plan, histories, tmp_path / "work", lambda progress: progress.done == 1)
    assert "1 of 3 users are done" in said
    store = AdapterStore(plan.store)
    assert [store.versions(user) for user in ("alice", "bob", "carol")] == [[], [], []]
    waiting = store.candidate("alice") or store.candidate("carol")
    report = run_fleet(open_source(histories), plan, tmp_path / "work", SerialRunner())
    assert set(states(report).values()) == {State.PUBLISHED}
    assert waiting is not None
    assert store.versions(waiting.user_id) == [waiting]  # not trained a second time


def test_a_fleet_is_stopped_at_once_while_workers_load(
    plan: Plan, histories: Path, tmp_path: Path
) -> None:
    class Stopping(ProcessRunner):
        def submit(self, task: Task) -> None:
            super().submit(task)
            if self.running == 2:
                stop.set()

    runner, stop, work = Stopping(2), threading.Event(), tmp_path / "work"
    with pytest.raises(Cancelled, match="0 of 3 users are done"):
        run_fleet(open_source(histories), plan, work, runner, stop=stop)
    assert not runner.running
    lines = (work / "ledger.jsonl").read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert events == ["started", "begun", "begun"]  # nobody has lost a try


def test_without_its_ledger_a_fleet_finds_its_candidates(
    plan: Plan, histories: Path, tmp_path: Path
) -> None:
    cancelled(plan, histories, tmp_path / "work", lambda progress: progress.done == 2)
    store = AdapterStore(plan.store)
    waiting = {user: store.candidate(user) for user in ("alice", "bob", "carol")}
    report = run_fleet(open_source(histories), plan, tmp_path / "elsewhere", SerialRunner())
    assert set(states(report).values()) == {State.PUBLISHED}
    for user, candidate in waiting.items():
        if candidate is not None:
            assert store.versions(user) == [candidate]


def test_an_erasure_or_another_version_meanwhile_wins(
    plan: Plan, histories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapter_store.conformance import BASE, make_adapter

    store, work, theirs = AdapterStore(plan.store), Worker.work, []

    def erase_meanwhile(self, task, should_stop):
        if task.user == "bob":
            store.erase_user("bob")
        outcome = work(self, task, should_stop)
        if task.user == "alice":
            store.erase_user("alice")  # whose candidate waits already
        return outcome

    def publish_meanwhile(progress: FleetProgress) -> None:
        if progress.done == 3:
            theirs.append(store.publish("carol", make_adapter(1), base=BASE))

    monkeypatch.setattr(Worker, "work", erase_meanwhile)
    source = open_source(histories)
    report = run_fleet(
        source, plan, tmp_path / "work", SerialRunner(), on_progress=publish_meanwhile
    )
    assert states(report) == {
        "alice": State.ERASED,
        "bob": State.ERASED,
        "carol": State.SUPERSEDED,
    }
    assert store.versions("alice") == store.versions("bob") == []
    assert store.versions("carol") == theirs
    assert store.candidate("carol") is None
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


def test_whom_no_store_can_keep_costs_nobody_else_anything(plan: Plan, tmp_path: Path) -> None:
    folder = tmp_path / "histories"
    folder.mkdir()
    write_users(folder / "0.jsonl", ["x" * 2000, "nul\0", "alice"])
    source = open_source(folder)
    report = run_fleet(source, plan, tmp_path / "work", SerialRunner())
    assert states(report) == {"alice": State.PUBLISHED}
    assert not report.is_complete
    too_long, with_nul = report.unreadable.values()
    assert "is too long" in too_long
    assert "NUL" in with_nul


def test_a_disk_that_is_full_for_a_while_costs_no_user(
    plan: Plan, one_history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langchain_cope.fleet.fleet.PAUSES_SECONDS", (0.01,))
    fsync, full = os.fsync, itertools.cycle([True, False])
    ledger = tmp_path / "work" / "ledger.jsonl"

    def refuse_each_second(descriptor: int) -> None:
        if os.path.samestat(os.fstat(descriptor), ledger.stat()) and next(full):
            raise OSError(errno.ENOSPC, "full")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_each_second)
    report = run_fleet(open_source(one_history), plan, tmp_path / "work", SerialRunner())
    assert set(states(report).values()) == {State.PUBLISHED}
    events = [json.loads(line)["event"] for line in ledger.read_text().splitlines()]
    assert events == ["started", "begun", "settled", "settled", "finished"]


def test_there_are_no_more_workers_than_users(
    plan: Plan, one_history: Path, tmp_path: Path
) -> None:
    runner = SerialRunner()
    runner.num_workers = 4
    report = run_fleet(open_source(one_history), plan, tmp_path / "work", runner)
    assert report.num_workers == 1


def test_a_base_that_is_gone_ends_the_fleet_at_once(
    plan: Plan, one_history: Path, tmp_path: Path
) -> None:
    missing = replace(plan, model=str(tmp_path / "missing"))
    with pytest.raises(WorkersFailed, match="missing"):
        run_fleet(open_source(one_history), missing, tmp_path / "work", ProcessRunner(1))
    report = run_fleet(open_source(one_history), plan, tmp_path / "work", SerialRunner())
    assert set(states(report).values()) == {State.PUBLISHED}


def test_a_store_that_is_away_for_a_while_costs_no_user(
    plan: Plan, one_history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langchain_cope.fleet.fleet.PAUSES_SECONDS", (0.01,))
    away = iter(range(4))
    publish = AdapterStore.publish

    def refuse_at_first(self, *args, **options):
        if next(away, None) is not None:
            raise BackendError("the storage is away")
        return publish(self, *args, **options)

    monkeypatch.setattr(AdapterStore, "publish", refuse_at_first)
    report = run_fleet(open_source(one_history), plan, tmp_path / "work", SerialRunner())
    assert set(states(report).values()) == {State.PUBLISHED}
    monkeypatch.setattr(
        AdapterStore, "data_seq", lambda *_: (_ for _ in ()).throw(BackendError("away"))
    )
    with pytest.raises(BackendError, match="nothing is lost"):
        run_fleet(open_source(one_history), plan, tmp_path / "w2", SerialRunner(), patience=0.05)


def test_a_source_that_is_away_for_a_while_costs_no_user(
    plan: Plan, one_history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langchain_cope.fleet.fleet.PAUSES_SECONDS", (0.01,))
    source = open_source(one_history)
    read, away = source.read, iter(range(3))

    def refuse_at_first(user: str) -> UserHistory:
        if next(away, None) is not None:
            raise HistoryUnreachable("Chroma is away")
        return read(user)

    monkeypatch.setattr(source, "read", refuse_at_first)
    report = run_fleet(source, plan, tmp_path / "work", SerialRunner())
    assert set(states(report).values()) == {State.PUBLISHED}


def test_two_runs_in_one_folder_are_refused(plan: Plan, histories: Path, tmp_path: Path) -> None:
    def again(progress: FleetProgress) -> bool:
        with pytest.raises(InputError, match="another run of this fleet"):
            run_fleet(open_source(histories), plan, tmp_path / "work", SerialRunner())
        return True

    cancelled(plan, histories, tmp_path / "work", again)


def test_a_base_of_another_size_gets_versions_of_its_own(
    alone: tuple[Plan, Path, Path, FleetReport], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    plan, histories, _, before = alone
    store = AdapterStore(shutil.copytree(plan.store, tmp_path / "adapters"))
    store.erase_user("carol")
    larger = tiny("qwen2", hidden_size=48, num_hidden_layers=3, initializer_range=0.05)
    moved = replace(
        plan, model=str(larger), store=str(tmp_path / "adapters"), job_dir=str(tmp_path / "jobs")
    )
    source = of_store(store, open_source(histories))

    learns_nothing = replace(moved, recipe=replace(FAST, sft=replace(FAST.sft, learning_rate=1e-9)))
    report = run_fleet(source, learns_nothing, tmp_path / "work", SerialRunner())
    assert states(report) == {"alice": State.REFUSED, "bob": State.REFUSED}
    for user in report.users:
        assert store.active(user) == before.users[user].version

    report = run_fleet(source, moved, tmp_path / "work", SerialRunner())
    assert states(report) == {"alice": State.PUBLISHED, "bob": State.PUBLISHED}
    for user, outcome in report.users.items():
        old, new = store.versions(user)
        assert store.active(user) == new.version == outcome.version
        assert old.version == before.users[user].version
        assert new.base["architecture"] != old.base["architecture"]
        assert store.rollback(user).version == old.version
