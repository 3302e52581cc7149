"""PersonalizeUser: a history in, a published adapter version out.

One straight path, `_Run.run`: history → split → SFT → negatives → DPO → evaluation → gate → publishing. Every stage is a child
run, so that a trace shows each with its time; nothing is published unless everything before it succeeded.
"""

import asyncio
import contextvars
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.callbacks import CallbackManagerForChainRun, dispatch_custom_event
from langchain_core.runnables import RunnableConfig, RunnableSerializable, ensure_config
from langchain_core.runnables.config import get_config_list
from langchain_core.tools import BaseTool, convert_runnable_to_tool
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from langchain_cope.errors import Cancelled, InputError
from langchain_cope.evaluation.comparison import as_examples, train_and_evaluate
from langchain_cope.history import Item, Target, UserHistory, as_history
from langchain_cope.personalization import held_out
from langchain_cope.personalization.gate import Outcome, Publisher
from langchain_cope.personalization.job_folder import Job, digest_of, kept_job, passing_job
from langchain_cope.personalization.turns import turn_on
from langchain_cope.settings import BaseSettings
from langchain_cope.stores import open_store
from langchain_cope.tracing import TracedError, TraceUserId, traced_error, traced_user
from langchain_cope.training.progress import Progress
from langchain_cope.training.recipe import Recipe

if TYPE_CHECKING:
    from langchain_cope.engine import Engine

PROGRESS = "cope.progress"
TOOL_NAME = "personalize_user"
TOOL_DESCRIPTION = (
    "Learns a user's own manner of writing from texts that the user wrote, so that later answers sound like the user. "
    "Takes minutes or longer. Tells whether the result was better and is now in use."
)
_log = logging.getLogger(__name__)


class PersonalizeRequest(BaseModel):
    """Whom to personalize, and from what."""

    model_config = ConfigDict(extra="forbid")

    user_id: str | None = None
    """None: the ``user_id`` of the config's ``configurable``. Where both name a user, they must agree."""
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
    """The held-out items with every model's answer; none where ``PersonalizeUser.samples`` is False."""
    recipe: dict[str, Any] = {}

    def __str__(self) -> str:
        """What a model that used this as a tool is told."""
        if self.published:
            return f"published version {self.version} for {self.user_id!r}: {self.reason}"
        return f"nothing was published for {self.user_id!r}: {self.reason}"


class PersonalizeUser(
    BaseSettings, RunnableSerializable[PersonalizeRequest | dict[str, Any], PersonalizeResult]
):
    """Trains one user's adapter on what the user wrote and publishes it where it is better than what is there.

    Example:
        .. code-block:: python

            personalize = PersonalizeUser(store="~/adapters")
            personalize.invoke({"user_id": "alice", "history": [{"prompt": "…", "completion": "…"}, …]})

    It composes like any runnable. Trainings on one device take turns, so a batch is one user after another, whatever its
    ``max_concurrency``; with ``return_exceptions`` a failure does not keep the other users from theirs:

        .. code-block:: python

            chain = read_texts | personalize.with_retry(retry_if_exception_type=(BackendError,)) | tell_the_user
            personalize.batch([{"user_id": "alice", …}, {"user_id": "bob", …}], return_exceptions=True)
            load_all_users | personalize.map()

    **Progress** comes as custom events named ``cope.progress`` (callback handlers' ``on_custom_event``, ``astream_events``), and
    in a LangGraph node through the stream writer, with ``"event": "cope.progress"`` added: user_id, stage, step, total, loss and
    seconds_left. Every stage is a child run with its time or its error:

        .. code-block:: python

            for chunk in graph.stream({"user_id": "alice"}, stream_mode="custom"):
                print(chunk["stage"], chunk["step"], chunk["total"])

    **Stopping**: a cancelled ``ainvoke``, or a ``threading.Event`` given as ``stop_event``, ends it within one training step
    (or once the base is loaded, where that is under way). Nothing is then published or left behind, neither a thread nor a
    file; `Cancelled` is raised, or asyncio's own error:

        .. code-block:: python

            stop = threading.Event()
            personalize.invoke(request, stop_event=stop)  # in a chain: personalize.bind(stop_event=stop)

    **Resuming**: with ``job_dir`` the finished stages of a run that was stopped or killed are kept there, and the same request goes
    on after the last of them; another history, recipe or base starts anew. The folder is removed when the run is done.

    **As a tool**: in an agent take the user from the config, not from the model:

        .. code-block:: python

            class Nothing(BaseModel):
                "Takes no arguments: the user and the texts are known."

            tool = PersonalizeUser(history=ChromaHistory("chroma")).as_tool(Nothing)
            agent.invoke(messages, {"configurable": {"user_id": "alice"}})

    **Traces** hold counts and figures, never a text, and the user as ``trace_user_id`` says. What is passed between the steps
    of a chain is traced by core, not here: a chain's own input, and the ``samples`` in the result unless they are switched off.

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
    job_dir: str | os.PathLike[str] | None = None
    """A folder for unfinished runs, each user's in a folder of its own. It holds what users wrote: keep it private."""
    samples: bool = True
    """Whether the result holds the held-out items with every model's answer. A tool's result never does."""
    authorize: Callable[[str, RunnableConfig], None] | None = Field(
        default=None, exclude=True, repr=False
    )
    """Called with the user and the configuration of every call before anything is read, trained or traced for it. What it raises,
    the call raises: check here that whoever asks may have that user personalized."""
    trace_user_id: TraceUserId = "plain"
    """How runs, metadata and events name the user: ``plain``, ``hashed`` or ``omitted``. Error messages may name the user: unless
    it is plain, a trace shows of an error its class alone."""

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Instances can be written with ``langchain_core.load.dumps``."""
        return True

    @property
    def InputType(self) -> type[PersonalizeRequest]:  # noqa: N802 - core's name
        """What a request looks like, for schemas and tools."""
        return PersonalizeRequest

    def invoke(
        self,
        input: PersonalizeRequest | dict[str, Any],
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> PersonalizeResult:
        """Personalize the user of ``input``. ``stop_event``, a ``threading.Event``, stops it when set."""
        return self._start(input, config, **kwargs).result

    async def ainvoke(
        self,
        input: PersonalizeRequest | dict[str, Any],
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> PersonalizeResult:
        """`invoke` in a thread; cancelling stops it at the next training step and waits for that."""
        cancelled = threading.Event()
        work = partial(self._start, input, ensure_config(config), cancelled=cancelled, **kwargs)
        # A thread of its own, which ends with it: trainings that wait for their turn would fill the event loop's pool.
        with ThreadPoolExecutor(1, thread_name_prefix="cope-personalize") as thread:
            run_in_thread = partial(asyncio.get_running_loop().run_in_executor, thread)
            run = run_in_thread(contextvars.copy_context().run, work)
            try:
                return (await asyncio.shield(run)).result
            except asyncio.CancelledError:
                cancelled.set()
                await _end(run)  # so that after a cancel nothing is still at work
                if run.exception() is None:  # it was done in that very moment
                    withdrawal = run_in_thread(run.result().withdraw)
                    await _end(withdrawal)
                    if (error := withdrawal.exception()) is not None:
                        _log.warning(
                            "cancelled too late: what was just published stays active (%s)", error
                        )
                raise
            finally:
                cancelled.set()  # also where the event loop is gone and nothing can be awaited

    def batch(
        self,
        inputs: list[PersonalizeRequest | dict[str, Any]],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[PersonalizeResult]:
        """Personalize one user after another. The first failure ends it, unless ``return_exceptions``."""
        done = self.batch_as_completed(
            inputs, config, return_exceptions=return_exceptions, **kwargs
        )
        return [result for _, result in done]

    async def abatch(
        self,
        inputs: list[PersonalizeRequest | dict[str, Any]],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[PersonalizeResult]:
        """`batch` for an event loop; cancelling stops the training under way and starts no other."""
        done = self.abatch_as_completed(
            inputs, config, return_exceptions=return_exceptions, **kwargs
        )
        return [result async for _, result in done]

    def batch_as_completed(
        self,
        inputs: Sequence[PersonalizeRequest | dict[str, Any]],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> Iterator[tuple[int, Any]]:
        """`batch`, each user's place and result as soon as it is there."""
        for place, (request, its_config) in enumerate(
            zip(inputs, get_config_list(config, len(inputs)), strict=True)
        ):
            try:
                result: Any = self.invoke(request, its_config, **kwargs)
            except Exception as error:
                if not return_exceptions:
                    raise
                result = error
            yield place, result

    async def abatch_as_completed(
        self,
        inputs: Sequence[PersonalizeRequest | dict[str, Any]],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> AsyncIterator[tuple[int, Any]]:
        """`abatch`, each user's place and result as soon as it is there."""
        for place, (request, its_config) in enumerate(
            zip(inputs, get_config_list(config, len(inputs)), strict=True)
        ):
            try:
                result: Any = await self.ainvoke(request, its_config, **kwargs)
            except Exception as error:
                if not return_exceptions:
                    raise
                result = error
            yield place, result

    def as_tool(
        self,
        args_schema: type[BaseModel] | None = None,
        *,
        name: str | None = None,
        description: str | None = None,
        arg_types: dict[str, type] | None = None,
    ) -> BaseTool:
        """A tool that personalizes; with ``args_schema`` a model is asked for those fields of the request alone."""
        return convert_runnable_to_tool(
            self.model_copy(update={"samples": False}),
            args_schema,
            name=name or self.name or TOOL_NAME,
            description=description or TOOL_DESCRIPTION,
            arg_types=arg_types,
        )

    def _start(
        self,
        given: PersonalizeRequest | dict[str, Any],
        config: RunnableConfig | None,
        *,
        stop_event: threading.Event | None = None,
        cancelled: threading.Event | None = None,
    ) -> "_Run":
        config = ensure_config(config)
        request = _checked(given)
        user = _whom(request, config)
        if self.authorize is not None:
            self.authorize(user, config)
        events = [event for event in (stop_event, cancelled) if event is not None]
        run = _Run(self, request, user, lambda: any(event.is_set() for event in events))
        try:
            self._call_with_config(run.traced, run.traced_input(), run.traced_config(config))
            return run
        except TracedError as shown:
            error = shown.error
        raise error  # here, where nothing is being handled: it keeps its own cause and context


class _Run:
    """One personalization."""

    result: PersonalizeResult
    manager: CallbackManagerForChainRun
    config: RunnableConfig
    tell_graph: Callable[[Any], None]

    def __init__(
        self,
        settings: PersonalizeUser,
        request: PersonalizeRequest,
        user: str,
        should_stop: Callable[[], bool],
    ) -> None:
        self.settings = settings
        self.request = request
        self.user = user
        self.traced_user = traced_user(user, settings.trace_user_id)
        self.should_stop = should_stop
        self.timings: dict[str, float] = {}
        self.published: list[tuple[Publisher, Outcome]] = []

    def traced_input(self) -> Any:
        """Whose history, and how large; never a text of it."""
        rows = self.request.history
        return {"user_id": self.traced_user, "num_history_rows": 0 if rows is None else len(rows)}

    def traced_config(self, config: RunnableConfig) -> RunnableConfig:
        """``config`` with this call's metadata, which its child runs share."""
        # The user is said even where it is None: what is missing core fills in from the configurable and the parent run.
        ours = {
            "base_model": self.settings.model,
            "gate": self.settings.gate,
            "user_id": self.traced_user,
        }
        theirs = {
            key: value
            for key, value in config["metadata"].items()
            if (key, value) != ("user_id", self.user)
        }
        config["metadata"] = {**ours, **theirs}
        return config

    def traced(
        self, _: Any, run_manager: CallbackManagerForChainRun, config: RunnableConfig
    ) -> Any:
        """`run` as the callbacks see it: what is returned or raised here is what they are shown."""
        self.manager, self.config = run_manager, config
        self.tell_graph = _graph_writer()
        try:
            self.result = self.run()
        except BaseException as error:
            shown = traced_error(error, self.settings.trace_user_id)
            if shown is error:
                raise
            raise shown from None
        figures = {"published", "version", "metrics", "timings", "num_trained", "num_held_out"}
        return {"user_id": self.traced_user, **self.result.model_dump(include=figures)}

    def run(self) -> PersonalizeResult:
        store = open_store(self.settings.store)
        with self.stage("history"):
            data_seq = store.data_seq(
                self.user
            )  # an erasure from now on holds against this training too
            history = self.read_history()
            trained, judged = held_out.split(history.items)
            store.prepare(
                self.user
            )  # hours of training must not end at a store that cannot be written
        with self.stage("load"):
            engine = self.settings._engine()
            recipe = self.settings.recipe or Recipe.for_model(engine.base, trained)
        with (
            turn_on(engine.base.device, self.should_stop),
            self.job(engine, recipe, trained, judged) as job,
        ):
            resumed = [f"done before and not run again: {', '.join(job.finished())}"] * bool(
                job.finished()
            )
            training, evaluation = train_and_evaluate(
                engine,
                trained,
                judged,
                recipe,
                job.folder,
                self.report,
                self.should_stop,
                self.stage,
            )
            with self.stage("publish"):
                publisher = Publisher(
                    store=store,
                    user=self.user,
                    engine=engine,
                    training=training,
                    evaluation=evaluation,
                    trained=trained,
                    judged=judged,
                    examples=as_examples(judged),
                    instruction=history.instruction,
                    gate=self.settings.gate,
                    min_gain=self.settings.min_gain,
                    job=job.key,
                    data_seq=data_seq,
                    should_stop=self.should_stop,
                )
                outcome = publisher.publish_if_better()
                self.published.append((publisher, outcome))
        samples = (
            zip(evaluation.indices, evaluation.texts, strict=True) if self.settings.samples else ()
        )
        return PersonalizeResult(
            user_id=self.user,
            published=outcome.version is not None,
            version=outcome.version.version if outcome.version else None,
            reason=outcome.reason,
            metrics=evaluation.metrics,
            timings=self.timings,
            num_trained=len(trained),
            num_held_out=len(judged),
            notes=[*history.notes, *training.notes, *evaluation.notes, *resumed],
            samples=[Sample(prompt=judged[index].messages, **texts) for index, texts in samples],
            recipe=training.recipe.as_dict(),
        )

    def withdraw(self) -> None:
        """Take back what was published in the very moment of a cancel."""
        for publisher, outcome in self.published:
            publisher.withdraw(outcome)

    def read_history(self) -> UserHistory:
        rows = self.request.history
        if rows is not None:
            found = as_history(
                rows,
                target=self.settings.target,
                user_id=self.user,
                instruction=self.request.instruction,
            )
            # Rows that were read before have it in their prompts already.
            return found.model_copy(
                update={"instruction": found.instruction or self.request.instruction}
            )
        if self.settings.history is None:
            raise InputError(
                "no history was given: put it into the request, or a ChromaHistory into PersonalizeUser(history=…)"
            )
        if self.request.instruction is not None:
            raise InputError(
                "a history from Chroma has its own instruction: give it to ChromaHistory(instruction=…)"
            )
        fetched: UserHistory = self.settings.history.history(self.user)
        return fetched

    def job(
        self, engine: "Engine", recipe: Recipe, trained: list[Item], judged: list[Item]
    ) -> AbstractContextManager[Job]:
        if self.settings.job_dir is None:
            return passing_job()
        base = {**engine.base.fingerprint(), "dtype": str(engine.base.dtype)}
        digest = digest_of(base, recipe, as_examples(trained), as_examples(judged))
        return kept_job(self.settings.job_dir, self.user, digest)

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
            child.on_chain_error(traced_error(error, self.settings.trace_user_id))
            raise
        self.timings[name] = round(time.monotonic() - started, 3)
        child.on_chain_end({"seconds": self.timings[name]})

    def report(self, progress: Progress) -> None:
        told = {"user_id": self.traced_user, **asdict(progress)}
        dispatch_custom_event(PROGRESS, told, config=self.config)
        self.tell_graph({"event": PROGRESS, **told})


def _checked(given: PersonalizeRequest | dict[str, Any]) -> PersonalizeRequest:
    if isinstance(given, PersonalizeRequest):
        return given
    try:
        return PersonalizeRequest.model_validate(given)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'the request'}: {e['msg']}" for e in error.errors()
        )
        raise InputError(f"a request takes user_id, history and instruction ({wrong})") from error


def _whom(request: PersonalizeRequest, config: RunnableConfig) -> str:
    """The user of the request, else of the config. Where both name one they must agree: a request may come from a model."""
    configured = config["configurable"].get("user_id")
    if request.user_id is None and configured is None:
        raise InputError(
            "no user was named: put user_id into the request, or into the config's configurable"
        )
    if request.user_id is None and not isinstance(configured, str):
        raise InputError(f"the config's user_id is {configured!r:.80}, expected a string")
    if request.user_id is not None and configured not in (None, request.user_id):
        raise InputError(
            f"the request names the user {request.user_id!r:.80}, but the config the user {configured!r:.80}: "
            "name one, or the same"
        )
    return request.user_id or str(configured or "")


def _graph_writer() -> Callable[[Any], None]:
    """The stream writer of the LangGraph node that this runs in; elsewhere one that does nothing."""
    if "langgraph" in sys.modules:  # where a graph is running it was imported
        from langgraph.config import get_stream_writer

        with suppress(RuntimeError, KeyError):  # no node
            return get_stream_writer()
    return lambda _: None


async def _end(work: "asyncio.Future[Any]") -> None:
    """Wait until ``work`` is done, however often the waiting task is cancelled meanwhile."""
    while not work.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([work])
