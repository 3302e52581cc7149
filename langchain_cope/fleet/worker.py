"""One user trained, up to the verdict of the gate: what every runner calls, wherever it runs.

A `Worker` loads base, tokenizer and libraries once and then takes users one after another. What
fails is returned, not raised: it is the fleet that decides what a failure means.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

from adapter_store import AdapterStore, AdapterVersion
from adapter_store.errors import UserErasedError
from langchain_cope.errors import Cancelled, HistoryError
from langchain_cope.fleet.tasks import Outcome, Plan, State, Task, is_of_surroundings
from langchain_cope.personalization.gate import published_under
from langchain_cope.personalization.job_folder import Job
from langchain_cope.personalization.result import PersonalizeRequest
from langchain_cope.personalization.run import Run
from langchain_cope.personalization.settings import PersonalizeSettings
from langchain_cope.personalization.voice_gain import voice_gain
from langchain_cope.stores import open_store
from langchain_cope.training.progress import Monitor, Progress


class Worker:
    """A loaded base that trains users one after another."""

    def __init__(self, plan: Plan) -> None:
        """Load the base. Raises what `load_base` raises, and ModelError for a quantized one."""
        from langchain_cope.training.pipeline import check_trainable

        self._settings = PersonalizeSettings(
            model=plan.model,
            task_adapter=plan.task_adapter,
            device=plan.device,
            dtype=plan.dtype,
            store=plan.store,
            recipe=plan.recipe,
            job_dir=plan.job_dir,
        )
        self._engine = self._settings._engine(holder=self)  # for all users, not for each
        check_trainable(self._engine.base)

    def work(self, task: Task, should_stop: Callable[[], bool] = lambda: False) -> Outcome:
        """Return what came of one user; never raises but for the end of the process."""
        try:
            return self._trained(task, should_stop)
        except _Known as known:
            return known.outcome
        except Cancelled:
            return Outcome(State.STOPPED, "stopped")
        except UserErasedError as error:
            return Outcome(State.ERASED, str(error))
        except HistoryError as error:
            return Outcome(State.UNFIT, str(error))
        except Exception as error:
            if is_of_surroundings(error):
                return Outcome(State.UNAVAILABLE, str(error))
            return Outcome(State.FAILED, f"{type(error).__name__}: {error}")

    def _trained(self, task: Task, should_stop: Callable[[], bool]) -> Outcome:
        run = _FleetRun(self._settings, task, should_stop)
        result = run.run()
        verdict, voice = result.verdict, voice_gain(result.samples)
        return Outcome(
            State.CANDIDATE if result.published else State.REFUSED,
            result.reason,
            key=run.key,
            version=result.version,
            verdict=None if verdict is None else verdict.model_dump(),
            voice=None if voice is None else voice.gain,
            metrics=result.metrics,
            timings=result.timings,
            num_trained=result.num_trained,
            num_held_out=result.num_held_out,
        )


class _Known(Exception):  # noqa: N818 - a way out, no error
    """The very same was done before; `outcome` says with what result."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome


class _FleetRun(Run):
    """A personalization without LangChain's callbacks, whose version stays a candidate."""

    waits_for_verdict: ClassVar[bool] = True
    stage = Monitor.stage
    key = ""

    def __init__(
        self, settings: PersonalizeSettings, task: Task, should_stop: Callable[[], bool]
    ) -> None:
        request = PersonalizeRequest(
            user_id=task.user,
            history=list(task.history.items),
            instruction=task.history.instruction,
        )
        super().__init__(settings, request, task.user, ())
        self._task = task
        self._should_stop = should_stop

    def should_stop(self) -> bool:
        return self._should_stop()

    def report(self, progress: Progress) -> None:
        """Say nothing: a fleet counts users, not steps."""

    def _data_seq(self, store: AdapterStore) -> int:
        return self._task.data_seq

    @contextmanager
    def _job_of(self, digest: str) -> Iterator[Job]:
        """Yield the job under a key made of its input, so that a rerun finds what it published."""
        self.key = digest
        if digest in self._task.known:
            raise _Known(Outcome(State.UNCHANGED, "refused before", key=digest))
        earlier = published_under(open_store(self.settings.store), self.user, digest)
        if earlier is not None:
            raise _Known(_outcome_of(earlier, open_store(self.settings.store)))
        with super()._job_of(digest) as job:
            yield replace(job, key=digest)


def _outcome_of(earlier: AdapterVersion, store: AdapterStore) -> Outcome:
    """Return the outcome of a training that left `earlier` in the store."""
    waiting = store.candidate(earlier.user_id)
    is_waiting = waiting is not None and waiting.version == earlier.version
    facts: dict[str, Any] = earlier.metadata
    return Outcome(
        State.CANDIDATE if is_waiting else State.UNCHANGED,
        facts["verdict"]["reason"] if is_waiting else "published before",
        key=earlier.idempotency_key,
        version=earlier.version,
        verdict=facts["verdict"],
        metrics=earlier.metrics,
        num_trained=facts["num_trained"],
        num_held_out=facts["num_held_out"],
    )
