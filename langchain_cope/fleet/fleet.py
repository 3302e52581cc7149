"""The run of a fleet: hand users out, settle what comes back, decide over all, report.

    every user: data_seq → history → worker → gate → candidate in the store      (`_train`)
    all users:  p-values → discoveries → accept or withdraw each candidate       (`_decide`)

Exactly one publish a user, whatever dies when. A training publishes its candidate under a key made
of base, recipe and history, so that a second one of the same finds the first; accepting a candidate
twice does nothing the second time; and the ledger says who is done. Where the store or the disk
fails, nobody is blamed: the fleet waits, and tries again.
"""

import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from adapter_store import AdapterStore
from adapter_store.errors import (
    AdapterNotFoundError,
    BackendError,
    InvalidAdapterError,
    PublishConflictError,
)
from langchain_cope.errors import Cancelled, HistoryError
from langchain_cope.fleet.discoveries import discoveries
from langchain_cope.fleet.ledger import Ledger
from langchain_cope.fleet.report import FleetReport
from langchain_cope.fleet.runner import Runner
from langchain_cope.fleet.skewed_gains import p_values
from langchain_cope.fleet.sources import Source
from langchain_cope.fleet.tasks import Outcome, Plan, State, Task, is_of_surroundings
from langchain_cope.personalization.gate import JUDGED_AGAINST, REASON_CHARACTERS
from langchain_cope.stores import open_store

T = TypeVar("T")

LEDGER = "ledger.jsonl"
POLL_SECONDS = 0.5
DECIDING = 16  # verdicts carried out at a time: they wait for the storage
NOTED_TOGETHER = 64  # of them that a crash may lose sight of; they are found done
PATIENCE_SECONDS = 600.0  # with a store, a disk or a source that fails
PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # the last one again and again


@dataclass(frozen=True)
class FleetProgress:
    """How far a fleet has come."""

    done: int
    total: int
    seconds_a_user: float | None
    """Of this run; None before its first user is done."""
    counts: Counter[State] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    """By reason; those that are tried again, too."""

    @property
    def seconds_left(self) -> float | None:
        """Until the last user is trained, at the speed so far."""
        if self.seconds_a_user is None:
            return None
        return self.seconds_a_user * (self.total - self.done)


def run_fleet(
    source: Source,
    plan: Plan,
    folder: Path,
    runner: Runner,
    *,
    stop: threading.Event | None = None,
    on_progress: Callable[[FleetProgress], None] = lambda _: None,
    patience: float = PATIENCE_SECONDS,
) -> FleetReport:
    """Personalize every user of `source`, and return what became of each.

    Args:
        source: Whose histories there are.
        plan: What is the same for all.
        folder: Private, and of this fleet alone: the ledger. The same call with the same folder
            goes on where another one ended.
        runner: Where workers live.
        stop: Ends it in order when set, with nothing lost and nothing published.
        on_progress: Called whenever a user is settled.
        patience: Seconds to wait for a store, a disk or a source that fails.

    Raises:
        Cancelled: `stop` was set.
        WorkersFailed: No worker could start.
        BackendError: The store, the disk or the source did not come back.
        InputError: Another run works in `folder`.
    """
    with Ledger(folder / LEDGER) as ledger:
        fleet = _Fleet(source, plan, ledger, stop or threading.Event(), on_progress, patience)
        with closing(runner):
            fleet.train(runner)
        fleet.decide()
        report = fleet.report(runner.num_workers)
        fleet.finish()
    return report


class _Fleet:
    def __init__(
        self,
        source: Source,
        plan: Plan,
        ledger: Ledger,
        stop: threading.Event,
        on_progress: Callable[[FleetProgress], None],
        patience: float,
    ) -> None:
        self._source, self._plan, self._ledger, self._stop = source, plan, ledger, stop
        self._on_progress = on_progress
        self._patience = patience
        self._store: AdapterStore = open_store(plan.store)
        self._began = time.monotonic()
        self._failures: Counter[str] = Counter()
        self._counts: Counter[State] = Counter()
        self._settled_now = 0
        self._users: list[str] = []
        self._keys: dict[str, str] = {}
        self._deciding = False

    # ── training ──

    def train(self, runner: Runner) -> None:
        """Have every user trained who is not settled yet."""
        self._list_users()
        plan = self._plan
        settings = {"model": plan.model, "task adapter": plan.task_adapter, "store": plan.store}
        self._persist(partial(self._ledger.start, settings))
        waiting = deque(user for user in self._users if self._outcome(user) is None)
        self._counts = Counter(
            one.state for one in map(self._outcome, self._users) if one is not None
        )
        self._tell()
        if not waiting:
            return
        # A worker more would load a base for nobody.
        runner.num_workers = min(runner.num_workers, len(waiting))
        runner.start(plan)
        failing_since: float | None = None
        pauses: Iterator[float] = iter(())
        while waiting or runner.running:
            while waiting and runner.running < runner.num_workers and not self._stop.is_set():
                task = self._task(waiting.popleft())
                if task is not None:
                    runner.submit(task)
            if self._stop.is_set():
                self._end_in_order(runner)
            for task, outcome in runner.wait(POLL_SECONDS):
                if not self._settle(task.user, outcome):
                    waiting.append(task.user)
                if outcome.state is not State.UNAVAILABLE:
                    failing_since = None
                    continue
                if failing_since is None:
                    failing_since = time.monotonic()
                    pauses = itertools.chain(PAUSES_SECONDS, itertools.repeat(PAUSES_SECONDS[-1]))
                self._be_patient(failing_since, next(pauses), outcome.reason)

    def _list_users(self) -> None:
        """Ask the source for its users; whom no store can keep is one of its problems."""
        for user in self._source.users():
            try:
                if not self._keys:
                    self._persist(partial(self._store.prepare, user))
                self._keys[user] = self._persist(partial(self._store.user_key, user))
            except InvalidAdapterError as error:
                self._source.problems[ascii(user)] = str(error)
        self._users = list(self._keys)

    def _task(self, user: str) -> Task | None:
        """Return the task of a user; None where there is nothing to train, which is settled."""
        key = self._keys[user]
        data_seq = self._ledger.data_seq(key)
        if data_seq is None:
            # Before the history is read: an erasure from now on holds against this training.
            data_seq = self._persist(partial(self._store.data_seq, user))
            self._persist(partial(self._ledger.begin, key, data_seq))
        try:
            history = self._persist(partial(self._source.read, user))
        except HistoryError as error:
            self._settle(user, Outcome(State.UNFIT, str(error)))
            return None
        return Task(user, key, history, data_seq, self._ledger.known(key))

    def _settle(self, user: str, outcome: Outcome) -> bool:
        if outcome.state in (State.FAILED, State.UNAVAILABLE):
            self._failures[outcome.reason] += 1
        is_done = self._persist(partial(self._ledger.settle, self._keys[user], outcome))
        if is_done:
            self._settled_now += 1
            self._counts[outcome.state] += 1
        self._tell()
        return is_done

    def _end_in_order(self, runner: Runner) -> None:
        runner.stop()
        while runner.running:
            for task, outcome in runner.wait(POLL_SECONDS):
                self._settle(task.user, outcome)
        raise self._cancelled()

    def _cancelled(self) -> Cancelled:
        if self._deciding:
            return Cancelled(
                "stopped while versions were published: the same command publishes the rest"
            )
        return Cancelled(
            f"stopped; {self._counts.total()} of {len(self._users)} users are done and wait for "
            "the verdict, which comes when all are: nothing was published; the same command goes on"
        )

    # ── verdicts ──

    def decide(self) -> None:
        """Publish those whose gains are no chance among so many, and withdraw the others."""
        self._deciding = True
        tested = [user for user in self._users if self._settled(user).is_tested]
        found = discoveries(p_values([self._settled(user).gains for user in tested]))
        waiting = [
            (user, is_found)
            for user, is_found in zip(tested, found, strict=True)
            if self._settled(user).state is State.CANDIDATE
        ]
        with ThreadPoolExecutor(DECIDING) as threads:
            for start in range(0, len(waiting), NOTED_TOGETHER):
                if self._stop.is_set():
                    raise self._cancelled()
                some = waiting[start : start + NOTED_TOGETHER]
                for (user, _), decided in zip(some, threads.map(self._decided, some), strict=True):
                    self._persist(partial(self._ledger.settle, self._keys[user], decided))
        for user in self._users:
            if self._settled(user).state is State.FAILED:
                self._persist(partial(self._clear, user))

    def _clear(self, user: str) -> None:
        """Withdraw what a worker published and did not live to tell of."""
        candidate = self._store.candidate(user)
        if candidate is not None:
            self._store.withdraw(user, candidate.version, reason="its training failed")

    def _decided(self, candidate: tuple[str, bool]) -> Outcome:
        """Accept or withdraw a user's candidate, and return the outcome; twice does no harm."""
        return self._persist(partial(self._carried_out, *candidate))

    def _carried_out(self, user: str, is_found: bool) -> Outcome:
        outcome = self._settled(user)
        version = outcome.version or ""
        if not is_found:
            self._store.withdraw(user, version, reason="no proof among so many users")
            return replace(
                outcome,
                state=State.UNSURE,
                reason=f"{outcome.reason}; among all users of this fleet that is no proof",
            )
        try:
            candidate = self._store.candidate(user)
            judged_against = candidate.metadata[JUDGED_AGAINST] if candidate else None
            self._store.accept(
                user,
                version,
                expected_active=judged_against,
                reason=outcome.reason[:REASON_CHARACTERS],
            )
        except PublishConflictError as error:
            self._store.withdraw(user, version)
            return replace(outcome, state=State.SUPERSEDED, reason=str(error))
        except AdapterNotFoundError as error:
            return replace(outcome, state=self._gone(user), reason=str(error))
        return replace(outcome, state=State.PUBLISHED)

    def _gone(self, user: str) -> State:
        """Return why a candidate is no longer there."""
        changes = self._store.history(user, limit=1000)
        is_erased = any(change.operation == "erase" for change in changes)
        return State.ERASED if is_erased else State.SUPERSEDED

    # ── around ──

    def finish(self) -> None:
        """Note that verdicts are out."""
        self._persist(self._ledger.finish)

    def report(self, num_workers: int) -> FleetReport:
        """Return what became of everybody."""
        return FleetReport(
            users={user: self._settled(user) for user in self._users},
            unreadable=dict(self._source.problems),
            seconds=time.monotonic() - self._began,
            num_workers=num_workers,
        )

    def _outcome(self, user: str) -> Outcome | None:
        return self._ledger.outcome(self._keys[user])

    def _settled(self, user: str) -> Outcome:
        outcome = self._outcome(user)
        assert outcome is not None
        return outcome

    def _tell(self) -> None:
        seconds = None
        if self._settled_now:
            seconds = (time.monotonic() - self._began) / self._settled_now
        done, total = self._counts.total(), len(self._users)
        self._on_progress(
            FleetProgress(done, total, seconds, self._counts.copy(), self._failures.copy())
        )

    def _persist(self, call: Callable[[], T]) -> T:
        """Return what a call returns, as soon as store, disk and source do what it asks."""
        began = time.monotonic()
        for pause in itertools.chain(PAUSES_SECONDS, itertools.repeat(PAUSES_SECONDS[-1])):
            try:
                return call()
            except Exception as error:
                if not is_of_surroundings(error):
                    raise
                self._be_patient(began, pause, str(error))
        raise AssertionError

    def _be_patient(self, since: float, pause: float, reason: str) -> None:
        """Wait for a store, a disk or a source; raise BackendError where that takes too long."""
        if time.monotonic() - since > self._patience:
            raise BackendError(
                f"{reason}; tried for {self._patience:.0f} s: nothing is lost, the same command "
                "goes on when that is mended"
            )
        if self._stop.wait(pause):
            raise self._cancelled()
