"""Workers as actors of a Ray cluster: the same worker and the same ledger, on many machines.

Actors, not tasks: a task may find a process without a base. They are not restarted by Ray: the
fleet has its own way with workers that die, and a driver that starts a new one knows of it. Each
machine needs this package, the base under the same name, and the store's keys in its environment;
finished stages stay on the machine that did them, unless the fleet's folder is shared. Needs ray
(extra `ray`).
"""

import os
import threading
from dataclasses import replace
from typing import Any

from langchain_cope._ray import import_ray
from langchain_cope.errors import InputError
from langchain_cope.fleet.runner import Pool, Settled, WorkersFailed
from langchain_cope.fleet.tasks import Outcome, Plan, Task

LOCAL = "local"


class RayRunner(Pool["_Actor"]):
    """So many workers on a cluster.

    Args:
        num_workers: Actors; each asks for its share of the cluster's cores, or for a GPU where the
            plan's device is one.
        address: Of the cluster: "auto" finds one on this machine, "local" starts one.
    """

    def __init__(self, num_workers: int, address: str) -> None:
        super().__init__(num_workers)
        self._address = address
        self._ray: Any = import_ray()

    def start(self, plan: Plan) -> None:
        """Connect to the cluster and start the actors."""
        if not self._ray.is_initialized():
            options = {"include_dashboard": False} if self._address == LOCAL else {}
            try:
                self._ray.init(address=self._address, log_to_driver=False, **options)
            except (ConnectionError, RuntimeError) as error:
                raise InputError(
                    f"no Ray cluster at {self._address!r} ({error}): start one (ray start --head), "
                    "or give --ray local"
                ) from error
        cores = int(self._ray.cluster_resources().get("CPU", 1))
        threads = plan.threads or max(1, cores // self.num_workers)
        self._plan = replace(plan, threads=threads)
        self._workers = [self._new_worker() for _ in range(self.num_workers)]

    def wait(self, seconds: float) -> list[Settled]:
        """Return what has been settled; actors that died are replaced."""
        by_ref = {ref: actor for actor in self._workers for ref in actor.awaited()}
        if not by_ref:
            return []
        done, _ = self._ray.wait(list(by_ref), num_returns=1, timeout=seconds)
        settled: list[Settled] = []
        for ref in done:
            actor = by_ref[ref]
            try:
                said = self._ray.get(ref)
            except self._ray.exceptions.RayError as error:
                self._ray.kill(actor.handle)
                how = f"died ({type(error).__name__}): {_first_line(error)}"
                settled += self._replace(actor, how)
                continue
            if ref == actor.ready:
                if said is not None:
                    raise WorkersFailed(f"a worker could not start: {said}")
                self._ready(actor)
            elif actor.task is not None:
                settled.append((actor.task, Outcome(**said)))
                actor.task = None
        return settled

    def stop(self) -> None:
        """Ask all actors to stop."""
        for actor in self._workers:
            actor.handle.stop.options(concurrency_group="stop").remote()

    def close(self) -> None:
        """End the actors."""
        for actor in self._workers:
            self._ray.kill(actor.handle)

    def _new_worker(self) -> "_Actor":
        is_gpu = (self._plan.device or "").startswith("cuda")
        remote = self._ray.remote(
            num_cpus=self._plan.threads,
            num_gpus=1 if is_gpu else 0,
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups={"stop": 1},
        )(RayWorker)
        return _Actor(remote.remote(self._plan))


class RayWorker:
    """A worker in an actor; `ready` says why where it could not start."""

    def __init__(self, plan: Plan) -> None:
        from langchain_cope.fleet.worker import Worker

        self._stopping = threading.Event()
        self._problem: str | None = None
        try:
            self._worker = Worker(plan)
        except Exception as error:
            self._problem = str(error) or type(error).__name__

    def ready(self) -> str | None:
        """Return None once the base is loaded, or why it is not."""
        return self._problem

    def work(self, task: Task) -> dict[str, Any]:
        """Return the fields of what came of one user."""
        return vars(self._worker.work(task, self._stopping.is_set))

    def pid(self) -> int:
        """Return the process that this runs in."""
        return os.getpid()

    def stop(self) -> None:
        """Let the task under way stop at its next step."""
        self._stopping.set()


class _Actor:
    """One actor, seen from the driver."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.ready = handle.ready.remote()
        self.is_ready = False
        self.task: Task | None = None
        self._result: Any = None

    def give(self, task: Task) -> None:
        self.task = task
        self._result = self.handle.work.remote(task)

    def awaited(self) -> list[Any]:
        """Return what is to be waited for: being ready comes first."""
        if not self.is_ready:
            return [self.ready]
        return [] if self.task is None else [self._result]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no reason was given"
