"""What a fleet asks of a runner, wherever its workers live."""

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from langchain_cope.errors import CopeError
from langchain_cope.fleet.tasks import Outcome, Plan, State, Task

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

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the workers, whatever they do."""
        ...


def died(how: str) -> Outcome:
    """Return the outcome of a user whose worker died."""
    return Outcome(State.FAILED, f"its worker {how}")
