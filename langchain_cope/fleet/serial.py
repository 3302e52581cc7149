"""The simplest runner: one worker, in this process."""

from langchain_cope.fleet.runner import Settled
from langchain_cope.fleet.tasks import Plan, Task
from langchain_cope.fleet.worker import Worker


class SerialRunner:
    """One user after another in this thread; for notebooks and tests.

    `stop` is heard from a signal handler or another thread.
    """

    num_workers = 1

    def __init__(self) -> None:
        self._stopping = False
        self._task: Task | None = None

    def start(self, plan: Plan) -> None:
        """Load the base."""
        self._worker = Worker(plan)

    @property
    def running(self) -> int:
        """1 while a task waits to be run by `wait`."""
        return int(self._task is not None)

    def submit(self, task: Task) -> None:
        """Keep the task for `wait`."""
        self._task = task

    def wait(self, seconds: float) -> list[Settled]:
        """Run the task, however long that takes."""
        if self._task is None:
            return []
        task, self._task = self._task, None
        return [(task, self._worker.work(task, lambda: self._stopping))]

    def stop(self) -> None:
        """Let the task under way stop."""
        self._stopping = True

    def close(self) -> None:
        """Nothing is to end: the task under way runs in `wait`."""
