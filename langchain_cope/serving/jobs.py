"""Personalizations of the server: one after another on a thread, each kept as a record on disk.

    queued → running → succeeded | failed | cancelled

A record outlives the process: what was queued or running when it ended is queued again at the next
start, and goes on after its last finished stage. A refusal by the gate is a success that published
nothing. Read `JobRunner`.
"""

import logging
import queue
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import RunnableConfig

from adapter_store.errors import UserErasedError
from langchain_cope.atomic_files import read_json, write_json
from langchain_cope.errors import Cancelled, CopeError, EngineClosed
from langchain_cope.personalize import PROGRESS, PersonalizeResult, PersonalizeUser
from langchain_cope.serving.errors import ApiError, api_error
from langchain_cope.serving.giving_way import GivesWay, lower_priority
from langchain_cope.serving.voice_score import voice_score
from langchain_cope.training.progress import Stage

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
LIVE: tuple[Status, ...] = ("queued", "running")
WORK = "work"  # the folder of unfinished trainings, beside the records
KEPT_A_USER = 10  # records of a user's finished jobs; older ones are dropped
MAX_QUEUED = 1000
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """One user's personalization, as asked for and as far as it has come."""

    user: str
    id: str = field(default_factory=lambda: f"job_{secrets.token_hex(16)}")
    status: Status = "queued"
    created: float = field(default_factory=time.time)
    """Seconds since 1970."""
    finished: float | None = None
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    stop: threading.Event = field(default_factory=threading.Event, repr=False)
    ending: Status | None = None
    """What it becomes once it has stopped: cancelled by the user, failed by an erasure."""
    steps: list[dict[str, Any]] = field(default_factory=list, repr=False)
    """Progress so far, oldest first; of this process alone."""

    @property
    def is_live(self) -> bool:
        """Whether it waits or runs."""
        return self.status in LIVE

    def shown(self) -> dict[str, Any]:
        """Return what its owner is told."""
        names = ("id", "user", "status", "created", "finished", "result", "error")
        return {name: getattr(self, name) for name in names}


class JobRunner:
    """Runs personalizations one after another; a user has one at a time."""

    def __init__(
        self,
        folder: Path,
        personalize: PersonalizeUser | None,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        """Read the records below `folder`, which is made; nothing runs before `start`.

        Args:
            folder: Private: records and unfinished work hold what users wrote.
            personalize: Trains and publishes; None: nothing is trained here.
            is_busy: Tells whether people are being answered; a training then gives way.
        """
        self.folder = folder
        self._is_busy = is_busy
        self._personalize = personalize
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in folder.glob("job_*.json"):
            self._read(file)

    @property
    def work(self) -> Path:
        """The folder of unfinished trainings."""
        return self.folder / WORK

    def start(self) -> None:
        """Run what waits, oldest first, from now on."""
        if self._personalize is None:
            return
        for job in sorted(self._jobs.values(), key=lambda job: job.created):
            if job.is_live:
                self._waiting.put(job)
        self._thread = threading.Thread(target=self._run_all, name="cope-jobs", daemon=True)
        self._thread.start()

    def begin_stop(self) -> None:
        """Begin nothing new, and let the one that runs stop at its next step; it is kept."""
        self._closing.set()
        self._waiting.put(None)
        for job in self._all():
            if job.status == "running":
                job.stop.set()

    def close(self) -> None:
        """Stop, and wait for it."""
        self.begin_stop()
        if self._thread is not None:
            self._thread.join()

    def add(self, user: str) -> Job:
        """Queue a personalization of the user from what the history holds.

        Raises ApiError: 409 while the user has one already, 429 where too many wait, 503 where
        this server trains nothing or is stopping.
        """
        if self._personalize is None:
            raise ApiError(
                503, "training_off", "this server does not train: it was started with --train off"
            )
        with self._lock:
            if self._closing.is_set():
                raise ApiError(503, "stopping", "the server is stopping", retry_after=5)
            if any(job.is_live and job.user == user for job in self._jobs.values()):
                raise ApiError(409, "job_running", "this user is being personalized already")
            if sum(job.is_live for job in self._jobs.values()) >= MAX_QUEUED:
                raise ApiError(429, "queue_full", "too many trainings wait", retry_after=60)
            job = Job(user)
            self._save(job)
            self._jobs[job.id] = job
            self._drop_old(user)
        self._waiting.put(job)
        return job

    def find(self, job_id: str, may_see: Callable[[str], bool]) -> Job:
        """Return a job. Raises ApiError (404) where there is none, or it is of another's user."""
        job = self._jobs.get(job_id)
        if job is None or not may_see(job.user):
            raise ApiError(404, "job_not_found", "there is no such job", param="job")
        return job

    def of_user(self, user: str) -> list[Job]:
        """Return the user's jobs, newest first."""
        jobs = [job for job in self._all() if job.user == user]
        return sorted(jobs, key=lambda job: job.created, reverse=True)

    def cancel(self, job: Job) -> None:
        """Stop a job: at once where it waits, else at its next training step."""
        with self._lock:
            if not job.is_live:
                return
            job.ending = job.ending or "cancelled"
            job.stop.set()
            if job.status == "queued":
                self._end(job, job.ending)
            else:
                self._keep(job)

    def forget(self, user: str, seconds: float = 60.0) -> bool:
        """Stop the user's job and drop all records of the user.

        A training under way cannot publish any more once the store has erased the user; this waits
        up to `seconds` for its end, so that nothing of it is written afterwards. Returns whether it
        has ended; else its record stays.
        """
        error = ApiError(410, "user_erased", "the user was erased").body["error"]
        for job in self.of_user(user):
            job.ending, job.error = "failed", error
            self.cancel(job)
        end = time.monotonic() + seconds
        while any(job.is_live for job in self.of_user(user)) and time.monotonic() < end:
            time.sleep(0.05)
        if any(job.is_live for job in self.of_user(user)):
            return False
        with self._lock:
            for job in [job for job in self._jobs.values() if job.user == user]:
                self._file(job).unlink(missing_ok=True)
                del self._jobs[job.id]
        return True

    def counts(self) -> dict[str, int]:
        """Return the number of known jobs, by status."""
        return dict(Counter(job.status for job in self._all()))

    def _all(self) -> list[Job]:
        return list(self._jobs.values())  # without the lock: a signal's handler may not wait

    def _run_all(self) -> None:
        lower_priority()
        while (job := self._waiting.get()) is not None and not self._closing.is_set():
            with self._lock:
                if job.status != "queued" or job.id not in self._jobs:
                    continue
                job.status = "running"
                self._keep(job)
            self._run(job)

    def _run(self, job: Job) -> None:
        assert self._personalize is not None
        config: RunnableConfig = {"callbacks": [_Steps(job, self._is_busy)]}
        try:
            result = self._personalize.invoke({"user_id": job.user}, config, stop_event=job.stop)
        except (Cancelled, EngineClosed):
            if self._closing.is_set() and job.ending is None:
                job.status = "queued"  # its record still says that it runs: it goes on at a start
                return
            self._finish(job, job.ending or "cancelled")
        except UserErasedError:
            job.error = ApiError(410, "user_erased", "the user was erased").body["error"]
            self._finish(job, "failed")
        except Exception as error:  # whatever it was: the next user's turn comes
            told = api_error(error)
            if not isinstance(error, CopeError):
                _log.error("a personalization failed: %s", type(error).__name__)
            job.error = job.error or told.body["error"]
            self._finish(job, "failed")
        else:
            job.result = result.model_dump(mode="json", exclude={"user_id", "recipe"})
            job.result |= _voice(result)
            self._finish(job, "succeeded")

    def _finish(self, job: Job, status: Status) -> None:
        with self._lock:
            self._end(job, status)

    def _end(self, job: Job, status: Status) -> None:
        job.finished = time.time()
        job.status = status
        if job.id in self._jobs:
            self._keep(job)

    def _drop_old(self, user: str) -> None:
        done = [job for job in self._jobs.values() if job.user == user and not job.is_live]
        for job in sorted(done, key=lambda job: job.created)[:-KEPT_A_USER]:
            self._file(job).unlink(missing_ok=True)
            del self._jobs[job.id]

    def _file(self, job: Job) -> Path:
        return self.folder / f"{job.id}.json"

    def _keep(self, job: Job) -> None:
        """Save a job; a disk that is full ends no other user's training."""
        try:
            self._save(job)
        except OSError as error:
            _log.error("a job's record was not written: %s", type(error).__name__)

    def _save(self, job: Job) -> None:
        write_json(self._file(job), {**job.shown(), "ending": job.ending})

    def _read(self, file: Path) -> None:
        """Take a record from disk; one that cannot be read is passed over, and said."""
        try:
            facts = read_json(file)
            job = Job(**facts)
            if f"{job.id}.json" != file.name or not isinstance(job.user, str):
                raise ValueError("it is another job's")
        except (OSError, ValueError, TypeError) as error:
            _log.warning("%s is no record of a job: %s", file, type(error).__name__)
            return
        if job.is_live:
            job.status = job.ending or "queued"
            job.finished = time.time() if job.ending else None
        self._jobs[job.id] = job


def _voice(result: PersonalizeResult) -> dict[str, Any]:
    """Return the voice score; that it fails fails no training."""
    try:
        return voice_score(result)
    except Exception as error:  # the package that measures it is not installed, say
        _log.warning("no voice score: %s", type(error).__name__)
        return {"voice": None, "voice_note": "it could not be computed"}


class _Steps(BaseCallbackHandler):
    """Writes a run's progress into its job; has the run give way while people are answered."""

    def __init__(self, job: Job, is_busy: Callable[[], bool]) -> None:
        self._job = job
        self._is_busy = is_busy
        self._gives_way = GivesWay()

    def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
        self._gives_way.now(self._is_busy())
        if name == PROGRESS:
            names = ("stage", "step", "total", "loss", "seconds_left")
            facts = {key: data[key] for key in names}
            label = Stage(data["stage"]).label
            self._job.steps.append({"status": "running", "label": label, **facts})
