"""What a fleet asks of a runner, wherever its workers live."""

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from langchain_cope.errors import CopeError
from langchain_cope.fleet.tasks import Outcome, Plan, State, Task

_MOST_DEATHS = 3  # of workers in a row that never became ready

Settled = tuple[Task, Outcome]


class WorkersFailed(CopeError):  # noqa: N818 - named for what happened
    """No worker can start, or stay alive: it is not one user's fault."""


class Runner(Protocol):
    """Some workers, each with a base loaded, that train one user at a time.

    A worker that dies is replaced, and its user comes back as failed. `WorkersFailed` is raised
    where workers cannot start.
    """

    num_workers: int

    def start(self, plan: Plan) -> None:
        """Start the workers; returns before their bases are loaded."""
        ...

    @property
    def running(self) -> int:
        """How many tasks are under way."""
        ...

    def submit(self, task: Task) -> None:
        """Hand a task to an idle worker; there must be one."""
        ...

    def wait(self, seconds: float) -> Sequence[Settled]:
        """Return what has been settled, waiting up to so long for the first."""
        ...

    def stop(self) -> None:
        """Ask the tasks under way to stop at their next step."""
        ...

    def close(self) -> None:
        """End the workers, whatever they do."""
        ...


class Member(Protocol):
    """A worker that lives elsewhere, seen from the driver."""

    task: Task | None
    """What it is at work on."""
    is_ready: bool
    """Whether its base is loaded."""

    def give(self, task: Task) -> None:
        """Hand it a task."""
        ...


M = TypeVar("M", bound=Member)


class Pool(Generic[M]):
    """So many workers that live elsewhere: which of them are idle, and what comes of their deaths.

    `start` of a subclass fills `_workers`.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._workers: list[M] = []
        self._deaths = 0

    @property
    def running(self) -> int:
        """How many tasks are under way."""
        return sum(worker.task is not None for worker in self._workers)

    def submit(self, task: Task) -> None:
        """Hand the task to an idle worker, one that is ready before one that still loads."""
        idle = [worker for worker in self._workers if worker.task is None]
        max(idle, key=lambda worker: worker.is_ready).give(task)

    def _ready(self, worker: M) -> None:
        worker.is_ready, self._deaths = True, 0

    def _replace(self, worker: M, how: str) -> list[Settled]:
        """Put a new worker in the place of one that died, and return what that settles."""
        self._deaths += not worker.is_ready
        if self._deaths >= _MOST_DEATHS:
            raise WorkersFailed(
                f"{self._deaths} workers in a row {how} while they loaded the base: is there "
                "memory for so many? Try fewer --workers"
            )
        self._workers[self._workers.index(worker)] = self._new_worker()
        return [] if worker.task is None else [(worker.task, died(how))]

    def _new_worker(self) -> M:
        raise NotImplementedError


def died(how: str) -> Outcome:
    """Return the outcome of a user whose worker died."""
    return Outcome(State.FAILED, f"its worker {how}")
