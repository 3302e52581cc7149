"""One personalization from its request to its result, traced through LangChain's callbacks.

`Run.run` is the one straight path: history → split → SFT → negatives → DPO → evaluation →
strength → gate → publishing. Every stage is a child run, so that a trace shows each with its time;
nothing is published unless everything before succeeded.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

from langchain_core.callbacks import CallbackManagerForChainRun, dispatch_custom_event
from langchain_core.runnables import RunnableConfig

from adapter_store import AdapterStore
from langchain_cope.errors import Cancelled, InputError
from langchain_cope.evaluation.comparison import train_and_evaluate
from langchain_cope.history import as_history
from langchain_cope.history.items import Item, UserHistory
from langchain_cope.personalization.choose_strength import recommend, trial_of
from langchain_cope.personalization.gate import Outcome, Publisher, better_adapter
from langchain_cope.personalization.hear import hear
from langchain_cope.personalization.held_out import divide, split
from langchain_cope.personalization.job_folder import (
    Job,
    input_digest,
    resumable_job,
    temporary_job,
)
from langchain_cope.personalization.result import PersonalizeRequest, PersonalizeResult, Sample
from langchain_cope.personalization.settings import PersonalizeSettings
from langchain_cope.stores import open_store
from langchain_cope.tracing import traced_error, traced_user
from langchain_cope.training.progress import Monitor, Progress, Stage
from langchain_cope.training.recipe import Recipe, recipe_for

if TYPE_CHECKING:
    from langchain_cope.engine import Engine
    from langchain_cope.evaluation.evaluate import Evaluation

PROGRESS = "cope.progress"  # the name of the events
WAIT_SECONDS = 0.1  # between two looks at whether to stop, while another training runs

_device_locks: dict[str, threading.Lock] = {}
_device_locks_lock = threading.Lock()


class Run(Monitor):
    """One personalization; a `Monitor` with stages as child runs and steps as events."""

    waits_for_verdict: ClassVar[bool] = False
    """Whether what passes the gate stays a candidate in the store."""
    result: PersonalizeResult
    _callbacks: CallbackManagerForChainRun
    _config: RunnableConfig
    _write_to_graph: Callable[[Any], None]

    def __init__(
        self,
        settings: PersonalizeSettings,
        request: PersonalizeRequest,
        user: str,
        stop_events: Sequence[threading.Event],
    ) -> None:
        super().__init__()
        self.settings = settings
        self.request = request
        self.user = user
        self._stop_events = stop_events
        self._traced_user = traced_user(user, settings.trace_user_id)
        self._publication: tuple[Publisher, Outcome] | None = None

    def should_stop(self) -> bool:
        """Return whether one of the stop events is set."""
        return any(event.is_set() for event in self._stop_events)

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Run the block as a child run: traced, timed and, if it fails, marked with the error."""
        with super().stage(stage):
            children = self._callbacks.get_child()
            child = children.on_chain_start(None, {"stage": stage.value}, name=stage.value)
            try:
                yield
            except BaseException as error:
                child.on_chain_error(traced_error(error, self.settings.trace_user_id))
                raise
        child.on_chain_end({"seconds": self.timings[stage.value]})

    def report(self, progress: Progress) -> None:
        """Send a step as a custom event, and to the LangGraph node that this runs in."""
        facts = asdict(progress) | {"stage": progress.stage.value}
        event = {"user_id": self._traced_user, **facts}
        dispatch_custom_event(PROGRESS, event, config=self._config)
        self._write_to_graph({"event": PROGRESS, **event})

    def traced_input(self) -> Any:
        """Return what a trace shows of the request: user and number of rows, never a text."""
        rows = self.request.history
        num_rows = 0 if rows is None else len(rows)
        return {"user_id": self._traced_user, "num_history_rows": num_rows}

    def traced_config(self, config: RunnableConfig) -> RunnableConfig:
        """Return `config` with this call's metadata, which its child runs share."""
        # The user is named even where it is None: core would fill in a missing one from the
        # configurable and the parent run.
        metadata = {
            "base_model": self.settings.model,
            "gate": self.settings.gate,
            "user_id": self._traced_user,
        }
        for key, value in config["metadata"].items():
            if (key, value) != ("user_id", self.user):
                metadata[key] = value
        config["metadata"] = metadata
        return config

    def traced(
        self, _: Any, run_manager: CallbackManagerForChainRun, config: RunnableConfig
    ) -> Any:
        """Call `run` as the callbacks see it: they are shown what is returned or raised here."""
        self._callbacks, self._config = run_manager, config
        self._write_to_graph = _graph_writer()
        try:
            self.result = self.run()
        except BaseException as error:
            traced = traced_error(error, self.settings.trace_user_id)
            if traced is error:
                raise
            raise traced from None
        figures = {"published", "version", "metrics", "timings", "num_trained", "num_held_out"}
        return {"user_id": self._traced_user, **self.result.model_dump(include=figures)}

    def run(self) -> PersonalizeResult:
        """Personalize the user: the whole path, stage by stage."""
        store = open_store(self.settings.store)
        with self.stage(Stage.HISTORY):
            # Asked first: an erasure from now on holds against this training too.
            data_seq = self._data_seq(store)
            history = self._read_history()
            trained, held_out = split(history.items)
            # Hours of training must not end at a store that cannot be written.
            store.prepare(self.user)
        with self.stage(Stage.LOAD):
            engine = self.settings._engine(holder=self)
            recipe = recipe_for(self.settings.recipe, engine.base, trained)
        with (
            reserved_device(engine.base.device, self),
            self._job(engine, recipe, trained, held_out) as job,
        ):
            notes = _resumption(job)
            training, evaluation = train_and_evaluate(
                engine, trained, held_out, recipe, job.folder, self
            )
            evaluated = [held_out[index] for index in evaluation.indices]
            choosing, judging = divide(evaluated)
            judged = evaluation.on(judging)
            adapter = better_adapter(judged)
            recommended = recommend(
                engine,
                training,
                adapter,
                [evaluated[row] for row in choosing],
                evaluation.on(choosing),
                self,
            )
            with self.stage(Stage.PUBLISH):
                judges = [evaluated[row] for row in judging]
                own = [item.completion for item in history.items]
                trial = trial_of(engine, training, adapter, judges, judged, self)
                recommended, fault = hear(trial, judged, own, recommended)
                publisher = Publisher(
                    store=store,
                    user=self.user,
                    engine=engine,
                    training=training,
                    evaluation=judged,
                    adapter=adapter,
                    recommended=recommended,
                    fault=fault,
                    trained=trained,
                    held_out=judges,
                    num_items=len(trained) + len(held_out),
                    instruction=history.instruction,
                    gate=self.settings.gate,
                    min_gain=self.settings.min_gain,
                    reference_adapter=self.settings.reference_adapter,
                    job_key=job.key,
                    data_seq=data_seq,
                    candidate=self.waits_for_verdict,
                    monitor=self,
                )
                outcome = publisher.publish_if_better()
                self._publication = publisher, outcome
        return PersonalizeResult(
            user_id=self.user,
            published=outcome.version is not None,
            version=outcome.version.version if outcome.version else None,
            reason=outcome.reason,
            verdict=outcome.verdict,
            recommended=recommended,
            metrics=evaluation.metrics,
            timings=self.timings,
            num_trained=len(trained),
            num_held_out=len(held_out),
            notes=[*history.notes, *training.notes, *evaluation.notes, *notes],
            samples=_samples(evaluation, held_out) if self.settings.samples else [],
            recipe=training.recipe.as_dict(),
        )

    def withdraw(self) -> None:
        """Take back what was published in the very moment of a cancel."""
        if self._publication is not None:
            publisher, outcome = self._publication
            publisher.withdraw(outcome)

    def _data_seq(self, store: AdapterStore) -> int:
        return store.data_seq(self.user)

    def _read_history(self) -> UserHistory:
        rows = self.request.history
        if rows is None:
            return self._fetch_history()
        history = as_history(
            rows,
            target=self.settings.target,
            user_id=self.user,
            instruction=self.request.instruction,
        )
        # Rows that were read before have the instruction in their prompts already.
        instruction = history.instruction or self.request.instruction
        return history.model_copy(update={"instruction": instruction})

    def _fetch_history(self) -> UserHistory:
        if self.settings.history is None:
            raise InputError(
                "no history was given: put it into the request, or a ChromaHistory into "
                "PersonalizeUser(history=…)"
            )
        if self.request.instruction is not None:
            raise InputError(
                "the request has an instruction, but a history from Chroma has its own: "
                "give it to ChromaHistory(instruction=…)"
            )
        history: UserHistory = self.settings.history.history(self.user)
        return history

    def _job(
        self, engine: "Engine", recipe: Recipe, trained: list[Item], held_out: list[Item]
    ) -> AbstractContextManager[Job]:
        base = {**engine.base.fingerprint(), "dtype": str(engine.base.dtype)}
        return self._job_of(input_digest(base, recipe, trained, held_out))

    def _job_of(self, digest: str) -> AbstractContextManager[Job]:
        if self.settings.job_dir is None:
            return temporary_job(self.user, digest)
        return resumable_job(self.settings.job_dir, self.user, digest)


@contextmanager
def reserved_device(device: object, monitor: Monitor) -> Iterator[None]:
    """Wait until no other training of this process is on `device`, and keep others off it.

    Two at once would only slow each other, and draw from each other's random numbers. Raises
    `Cancelled` where `monitor` asks for a stop meanwhile.
    """
    with _device_locks_lock:
        lock = _device_locks.setdefault(str(device), threading.Lock())
    while not lock.acquire(timeout=WAIT_SECONDS):
        if monitor.should_stop():
            raise Cancelled(
                "stopped on request while waiting for another training; nothing was published"
            )
    try:
        yield
    finally:
        lock.release()


def _resumption(job: Job) -> list[str]:
    """Return a note on the stages that an earlier run of the job has finished."""
    stages = job.finished_stages()
    return [f"done before and not run again: {', '.join(stages)}"] if stages else []


def _samples(evaluation: "Evaluation", held_out: Sequence[Item]) -> list[Sample]:
    return [
        Sample.model_validate({"prompt": held_out[index].messages, **texts})
        for index, texts in zip(evaluation.indices, evaluation.texts, strict=True)
    ]


def _graph_writer() -> Callable[[Any], None]:
    """Return the stream writer of the LangGraph node around this; else one that does nothing."""
    if "langgraph" in sys.modules:  # a graph that is running has imported it
        from langgraph.config import get_stream_writer

        with suppress(RuntimeError, KeyError):  # raised outside of a node
            return get_stream_writer()
    return lambda _: None
