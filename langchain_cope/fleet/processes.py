"""Workers in spawned processes of this machine, each with a base of its own.

Not a pool of the standard library's: one that is killed would take the whole pool down with it. A
process is never forked, since a loaded torch does not survive that. Driver and worker talk over one
pipe; where it closes, the other side is gone: a worker then ends at once, and never outlives a
driver that was killed.
"""

import os
import queue
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from langchain_cope.fleet.runner import Pool, Settled, WorkersFailed
from langchain_cope.fleet.tasks import Outcome, Plan, Task

_GONE = (EOFError, OSError)
_ENDING = {signal.SIGINT, signal.SIGTERM}


class ProcessRunner(Pool["_Process"]):
    """So many workers, each in a process.

    Where the plan does not say with how many threads they compute, the cores are divided: two
    processes with a thread each train more of a small model than one with two.
    """

    def start(self, plan: Plan) -> None:
        """Start the processes."""
        threads = plan.threads or max(1, (os.cpu_count() or 1) // self.num_workers)
        self._plan = replace(plan, threads=threads)
        self._workers = [self._new_worker() for _ in range(self.num_workers)]

    def wait(self, seconds: float) -> list[Settled]:
        """Return what has been settled; workers that died are replaced."""
        by_pipe = {worker.pipe: worker for worker in self._workers}
        settled: list[Settled] = []
        for pipe in wait(list(by_pipe), seconds):
            worker = by_pipe[pipe]  # type: ignore[index]
            try:
                said = worker.pipe.recv()
            except _GONE:
                settled += self._replace(worker, worker.end())
                continue
            if said is None:
                self._ready(worker)
            elif isinstance(said, str):
                raise WorkersFailed(f"a worker could not start: {said}")
            elif worker.task is not None:
                settled.append((worker.task, said))
                worker.task = None
        return settled

    def stop(self) -> None:
        """Ask all workers to stop; those that still load their base have nothing to lose."""
        _end([worker for worker in self._workers if not worker.is_ready])
        self._workers = [worker for worker in self._workers if worker.is_ready]
        for worker in self._workers:
            worker.ask_to_stop()

    def close(self) -> None:
        """End the processes."""
        _end(self._workers)

    def _new_worker(self) -> "_Process":
        return _Process(self._plan)


class _Process:
    """One worker's process, seen from the driver."""

    def __init__(self, plan: Plan) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.task: Task | None = None
        self.is_ready = False
        self._process: BaseProcess = context.Process(
            target=_serve, args=(theirs, plan), name="cope-fleet-worker", daemon=True
        )
        with _deaf():
            self._process.start()
        theirs.close()

    def give(self, task: Task) -> None:
        self.task = task
        self._send(task)

    def ask_to_stop(self) -> None:
        self._send(None)

    def end(self) -> str:
        """End the process, and return how it ended for people."""
        self.pipe.close()  # which tells it to end
        self._process.join(1)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        code = self._process.exitcode or 0
        if code == -signal.SIGKILL:
            return "was killed (signal 9), as the system does where memory runs out"
        return f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"

    def _send(self, message: Task | None) -> None:
        with suppress(*_GONE):  # `wait` finds out
            self.pipe.send(message)


def _end(workers: Sequence[_Process]) -> None:
    for worker in workers:
        worker.pipe.close()  # they end at once, even where a signal interrupts what follows
    for worker in workers:
        worker.end()


@contextmanager
def _deaf() -> Iterator[None]:
    """Let processes that start in this block be deaf to the signals that end a fleet in order.

    A terminal sends its Ctrl-C to all of them. They would hear it while they import, before they
    can say that they do not want to, and their users would count as failed.
    """
    resource_tracker.ensure_running()  # whose own start would let signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)  # which they inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, plan: Plan) -> None:
    """Work in a worker's process until the pipe closes; the driver alone hears signals."""
    os.environ["OMP_NUM_THREADS"] = str(plan.threads)  # before torch is loaded
    tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
    stopping = threading.Event()
    threading.Thread(target=_listen, args=(pipe, tasks, stopping), daemon=True).start()
    from langchain_cope.fleet.worker import Worker

    try:
        worker = Worker(plan)
    except Exception as error:
        _say(pipe, str(error) or type(error).__name__)
        time.sleep(60)  # until the driver has heard, and closes the pipe
        return
    _say(pipe, None)
    while True:
        _say(pipe, worker.work(tasks.get(), stopping.is_set))


def _listen(pipe: Connection, tasks: "queue.SimpleQueue[Task]", stopping: threading.Event) -> None:
    while True:
        try:
            said = pipe.recv()
        except _GONE:
            os._exit(0)  # the driver is gone: nobody wants what is under way
        if said is None:
            stopping.set()
        else:
            tasks.put(said)


def _say(pipe: Connection, message: Outcome | str | None) -> None:
    try:
        pipe.send(message)
    except _GONE:
        os._exit(0)
