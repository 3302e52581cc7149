"""PersonalizeUser: a history in, a published adapter version out.

One straight path, `_Run.run`: history → split → SFT → negatives → DPO → evaluation → gate → publishing. Every stage is a child
run, so that a trace shows each with its time; nothing is published unless everything before it succeeded.
"""

import asyncio
import contextvars
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.callbacks import CallbackManagerForChainRun, dispatch_custom_event
from langchain_core.runnables import RunnableConfig, RunnableSerializable, ensure_config, patch_config
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapter_store import AdapterStore, AdapterVersion
from adapter_store.errors import AdapterNotFoundError, BaseModelMismatchError, IntegrityError, PublishConflictError
from langchain_cope import held_out
from langchain_cope.bases import BaseSettings
from langchain_cope.errors import Cancelled, InputError, ModelError
from langchain_cope.history import Item, Target, UserHistory, as_history
from langchain_cope.stores import open_store
from langchain_cope.training.progress import Progress
from langchain_cope.training.recipe import Recipe

if TYPE_CHECKING:
    from langchain_cope.engine.engine import Engine
    from langchain_cope.training.encode import Example
    from langchain_cope.training.evaluate import Evaluation
    from langchain_cope.training.pipeline import TrainingResult

PUBLISH_TRIES = 3  # when someone else publishes for the same user meanwhile
_training = threading.Lock()  # one training at a time: two would only slow each other
_workers = ThreadPoolExecutor(max_workers=64, thread_name_prefix="cope-personalize")


class PersonalizeRequest(BaseModel):
    """Whom to personalize, and from what."""

    model_config = ConfigDict(extra="forbid")

    user_id: str
    history: list[Any] | None = None
    """Items, or rows of the forms in `history.py`, oldest first; None: fetched from ``PersonalizeUser.history``."""
    instruction: str | None = None
    """Stands in where an item has no prompt (plain text, a conversation's first turn); kept in the version's metadata."""


class Sample(BaseModel):
    """One held-out item: what was asked, what the user wrote, and what each model answers."""

    prompt: list[dict[str, str]]
    reference: str
    base: str
    sft: str
    dpo: str
    cope: str


class PersonalizeResult(BaseModel):
    """What became of it."""

    user_id: str
    published: bool
    version: str | None
    """The version published; None where the gate refused."""
    reason: str
    """Why it was published or refused, with the numbers."""
    metrics: dict[str, dict[str, float]]
    """``metrics["base" | "sft" | "dpo" | "cope"]``: ``rouge1``, ``rougeL`` and, except for cope, ``nll`` on the held-out items."""
    timings: dict[str, float]
    """Seconds of each stage."""
    num_trained: int
    num_held_out: int
    notes: list[str] = []
    """In words for people: what was cut, dropped, skipped or taken for granted."""
    samples: list[Sample] = []
    """The held-out items with every model's answer."""
    recipe: dict[str, Any] = {}


class PersonalizeUser(BaseSettings, RunnableSerializable[PersonalizeRequest | dict[str, Any], PersonalizeResult]):
    """Trains one user's adapter on what the user wrote and publishes it where it is better than what is there.

    Example:
        .. code-block:: python

            PersonalizeUser(store="~/adapters").invoke({"user_id": "alice", "history": [{"prompt": "…", "completion": "…"}, …]})

    Progress comes as custom events named ``cope.progress`` (callback handlers' ``on_custom_event``, ``astream_events``).
    A cancelled ``ainvoke`` stops at the next training step; nothing is then published or left behind.

    Raises ``HistoryError`` and ``InputError`` for what was given, ``ModelError`` for a base that cannot be trained, ``Cancelled``,
    and the store's errors; a version refused by the gate is no error.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    store: Any = None
    """As for ``ChatCoPe``."""
    recipe: Recipe | None = None
    """None: ``Recipe.for_model(base, history)``."""
    history: Any = None
    """A ``ChromaHistory`` that a request without a history is filled from."""
    target: Target | None = None
    """Whose turns are learnt where the rows of a request are conversations; None: as is usual for their format. What Chroma holds
    was divided when it was added."""
    gate: Literal["improve", "always"] = "improve"
    """``improve``: publish where the mean held-out NLL is lower than the active version's, else the base's; ``always``: publish."""
    min_gain: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Nats per token by which it must be lower."""

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Instances can be written with ``langchain_core.load.dumps``."""
        return True

    def invoke(
        self, input: PersonalizeRequest | dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> PersonalizeResult:
        """Personalize the user of ``input``."""
        return self._invoke(input, config, lambda: False)

    async def ainvoke(
        self, input: PersonalizeRequest | dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> PersonalizeResult:
        """`invoke` in a thread; cancelling stops it at the next training step and waits for that."""
        stop = threading.Event()
        # Not in the event loop's own pool: trainings that wait for their turn would keep every chat's threads.
        work = asyncio.get_running_loop().run_in_executor(
            _workers, contextvars.copy_context().run, self._invoke, input, ensure_config(config), stop.is_set
        )
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            stop.set()
            await asyncio.wait([work])  # so that after a cancel nothing is still at work
            if not work.cancelled():
                work.exception()  # Cancelled, as asked: retrieved, so that asyncio does not complain
            raise

    def _invoke(
        self,
        given: PersonalizeRequest | dict[str, Any],
        config: RunnableConfig | None,
        should_stop: Callable[[], bool],
    ) -> PersonalizeResult:
        request = _checked(given)
        results: list[PersonalizeResult] = []

        # Traces get the size of a history and the figures that came of it, never a text.
        def run(_: Any, run_manager: CallbackManagerForChainRun, config: RunnableConfig) -> PersonalizeResult:
            results.append(_Run(self, request, run_manager, config, should_stop).run())
            return results[0].model_copy(update={"samples": []})

        redacted = {"user_id": request.user_id, "num_history_rows": len(request.history or [])}
        self._call_with_config(run, redacted, config)
        return results[0]


class _Run:
    """One personalization under way."""

    def __init__(
        self,
        settings: PersonalizeUser,
        request: PersonalizeRequest,
        manager: CallbackManagerForChainRun,
        config: RunnableConfig,
        should_stop: Callable[[], bool],
    ) -> None:
        self.settings = settings
        self.request = request
        self.manager = manager
        self.config = patch_config(config, callbacks=manager.get_child())
        self.should_stop = should_stop
        self.timings: dict[str, float] = {}

    def run(self) -> PersonalizeResult:
        store = open_store(self.settings.store)
        with self.stage("history"):
            history = self.read_history()
            trained, judged = held_out.split(history.items)
            store.prepare(self.request.user_id)  # hours of training must not end at a store that cannot be written
        with self.stage("load"):
            engine = self.settings._engine()
            recipe = self.settings.recipe or Recipe.for_model(engine.base, trained)
        with _one_at_a_time(self.should_stop), tempfile.TemporaryDirectory(prefix="cope-") as folder:
            training, evaluation = train_and_evaluate(
                engine, trained, judged, recipe, Path(folder), self.report, self.should_stop, self.stage
            )
            with self.stage("publish"):
                publisher = _Publisher(self, store, engine, training, evaluation)
                version, reason = publisher.publish_if_better(history, trained, judged)
        return PersonalizeResult(
            user_id=self.request.user_id,
            published=version is not None,
            version=version.version if version else None,
            reason=reason,
            metrics=evaluation.metrics,
            timings=self.timings,
            num_trained=len(trained),
            num_held_out=len(judged),
            notes=[*history.notes, *training.notes, *evaluation.notes],
            samples=[
                Sample(prompt=judged[index].messages, **texts)
                for index, texts in zip(evaluation.indices, evaluation.texts, strict=True)
            ],
            recipe=training.recipe.as_dict(),
        )

    def read_history(self) -> UserHistory:
        user, rows = self.request.user_id, self.request.history
        if rows is not None:
            found = as_history(rows, target=self.settings.target, user_id=user, instruction=self.request.instruction)
            # Rows that were read before have it in their prompts already.
            return found.model_copy(update={"instruction": found.instruction or self.request.instruction})
        if self.settings.history is None:
            raise InputError(
                "no history was given: put it into the request, or a ChromaHistory into PersonalizeUser(history=…)"
            )
        if self.request.instruction is not None:
            raise InputError("a history from Chroma has its own instruction: give it to ChromaHistory(instruction=…)")
        fetched: UserHistory = self.settings.history.history(user)
        return fetched

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A child run: traced, timed and, where it fails, marked with its error."""
        if self.should_stop():
            raise Cancelled(f"stopped on request before {name!r}; nothing was published")
        started = time.monotonic()
        child = self.manager.get_child().on_chain_start(None, {"stage": name}, name=name)
        try:
            yield
        except BaseException as error:
            child.on_chain_error(error)
            raise
        self.timings[name] = round(time.monotonic() - started, 3)
        child.on_chain_end({"seconds": self.timings[name]})

    def report(self, progress: Progress) -> None:
        dispatch_custom_event(
            "cope.progress", {"user_id": self.request.user_id, **asdict(progress)}, config=self.config
        )


class _Publisher:
    """The gate, and what is written behind it."""

    def __init__(
        self, run: _Run, store: AdapterStore, engine: "Engine", training: "TrainingResult", evaluation: "Evaluation"
    ) -> None:
        self.settings = run.settings
        self.user = run.request.user_id
        self.store = store
        self.engine = engine
        self.training = training
        self.evaluation = evaluation

    def publish_if_better(
        self, history: UserHistory, trained: list[Item], judged: list[Item]
    ) -> tuple[AdapterVersion | None, str]:
        for _ in range(PUBLISH_TRIES):
            active = self.store.active(self.user)
            better, reason = self.judge(active, judged)
            if not better:
                return None, reason
            try:
                return self.publish(active, history, trained, judged), reason
            except PublishConflictError:
                continue  # someone published meanwhile: judge against that one
        raise PublishConflictError(
            f"user {self.user!r} was published by others {PUBLISH_TRIES} times while this version was; personalize again"
        )

    def judge(self, active: str | None, judged: list[Item]) -> tuple[bool, str]:
        """Whether to publish, and why."""
        new = self.evaluation.metrics["dpo"]["nll"]
        if self.settings.gate == "always":
            base = self.evaluation.metrics["base"]["nll"]
            return (
                True,
                f"published as asked (gate 'always'): held-out NLL {new:.4f} nats a token against {base:.4f} of the base",
            )
        old, against = self.reference(active, judged)
        numbers = f"held-out NLL {new:.4f} nats a token against {old:.4f} of {against}"
        needed = f" by more than {self.settings.min_gain:g}" if self.settings.min_gain else ""
        if new < old - self.settings.min_gain:
            return True, f"better{needed}: {numbers}"
        return False, f"not better{needed}: {numbers}; what is active stays as it is"

    def reference(self, active: str | None, judged: list[Item]) -> tuple[float, str]:
        """The NLL to beat, and whose it is."""
        from langchain_cope.training.evaluate import mean_nll

        base_nll = self.evaluation.metrics["base"]["nll"]
        if active is None:
            return base_nll, "the base"
        try:
            version = self.store.resolve(self.user, active, base=self.engine.base.fingerprint())
        except BaseModelMismatchError:
            return base_nll, f"the base (the active version {active} was trained on another base)"
        except AdapterNotFoundError:
            return base_nll, "the base"  # deleted a moment ago
        seen = held_out.overlap(version.metadata.get("trained_on"), judged)
        if seen:
            return base_nll, f"the base (the active version {active} was trained on {seen} of the held-out items)"
        try:
            adapter = self.engine.load_adapter(self.store.fetch_dir(version))
        except (IntegrityError, ModelError) as error:  # a damaged version must not keep its user from a new one
            return base_nll, f"the base (the active version {active} cannot be used: {error})"
        nll = mean_nll(self.engine, as_examples(judged), self.training.recipe, adapter)
        return nll, f"the active version {active}"

    def publish(
        self, active: str | None, history: UserHistory, trained: list[Item], judged: list[Item]
    ) -> AdapterVersion:
        recipe = self.training.recipe
        return self.store.publish(
            self.user,
            self.training.dpo,
            base=self.engine.base.fingerprint(),
            metrics=self.evaluation.metrics,
            alpha=recipe.alpha,
            tau=recipe.tau,
            metadata={
                "instruction": history.instruction,
                "num_trained": len(trained),
                "num_held_out": len(judged),
                "recipe": recipe.as_dict(),
                "trained_on": held_out.mark(trained),
            },
            expected_active=active,
        )


def train_and_evaluate(
    engine: "Engine",
    trained: Sequence[Item],
    judged: Sequence[Item],
    recipe: Recipe,
    folder: Path,
    on_progress: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    stage: Callable[[str], Any],
) -> "tuple[TrainingResult, Evaluation]":
    """Train on the one list of items in ``folder``, then compare base, SFT, DPO and CoPe on the other."""
    from langchain_cope.training.evaluate import evaluate
    from langchain_cope.training.pipeline import train_user

    training = train_user(
        engine, as_examples(trained), recipe, folder, on_progress=on_progress, should_stop=should_stop, stage=stage
    )
    with stage("evaluate"):
        evaluation = evaluate(
            engine,
            as_examples(judged),
            training.recipe,
            sft=training.sft,
            dpo=training.dpo,
            on_progress=on_progress,
            should_stop=should_stop,
        )
    return training, evaluation


def as_examples(items: Sequence[Item]) -> "list[Example]":
    """The items as the training chain takes them."""
    from langchain_cope.training.encode import Example

    return [Example(item.messages, item.completion, item.rejected) for item in items]


def _checked(given: PersonalizeRequest | dict[str, Any]) -> PersonalizeRequest:
    if isinstance(given, PersonalizeRequest):
        return given
    try:
        return PersonalizeRequest.model_validate(given)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the request'}: {e['msg']}" for e in error.errors())
        raise InputError(f"a request takes user_id, history and instruction ({wrong})") from error


@contextmanager
def _one_at_a_time(should_stop: Callable[[], bool]) -> Iterator[None]:
    while not _training.acquire(timeout=0.2):
        if should_stop():
            raise Cancelled("stopped on request while waiting for another training; nothing was published")
    try:
        yield
    finally:
        _training.release()
