"""PersonalizeUser: a history in, a published adapter version out.

The runnable is here: how it is called, in batches, asynchronously and as a tool. What one call does
is `personalization/run.py`, and its options are in `personalization/settings.py`.
"""

import asyncio
import contextvars
import logging
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from langchain_core.runnables import RunnableConfig, RunnableSerializable, ensure_config
from langchain_core.runnables.config import get_config_list
from langchain_core.tools import BaseTool, convert_runnable_to_tool
from pydantic import BaseModel, ConfigDict, ValidationError

from langchain_cope.errors import InputError
from langchain_cope.personalization.result import (
    PersonalizeRequest,
    PersonalizeResult,
    Recommendation,
    Sample,
    Verdict,
)
from langchain_cope.personalization.run import PROGRESS, Run
from langchain_cope.personalization.settings import PersonalizeSettings
from langchain_cope.tracing import TracedError

__all__ = [
    "PROGRESS",
    "PersonalizeRequest",
    "PersonalizeResult",
    "PersonalizeUser",
    "Recommendation",
    "Sample",
    "Verdict",
]

TOOL_NAME = "personalize_user"
TOOL_DESCRIPTION = (
    "Learns a user's own manner of writing from texts that the user wrote, so that later answers "
    "sound like the user. Takes minutes or longer. Tells whether the result was better and is now "
    "in use."
)
_log = logging.getLogger(__name__)


class PersonalizeUser(
    PersonalizeSettings,
    RunnableSerializable[PersonalizeRequest | dict[str, Any], PersonalizeResult],
):
    """Trains one user's adapter on what the user wrote, and publishes it where it is better.

    Better than the user's active version, or else than the base. The options are the fields of
    `PersonalizeSettings` and `BaseSettings`.

    ```python
    personalize = PersonalizeUser(store="~/adapters")
    personalize.invoke({"user_id": "alice", "history": [{"prompt": "…", "completion": "…"}, …]})
    ```

    It composes like any runnable. Trainings on one device wait for each other, so a batch is one
    user after another, whatever its `max_concurrency`; with `return_exceptions` a failure does not
    keep the other users from theirs:

    ```python
    learn = personalize.with_retry(retry_if_exception_type=(BackendError,))
    chain = read_texts | learn | tell_the_user
    personalize.batch([{"user_id": "alice", …}, {"user_id": "bob", …}], return_exceptions=True)
    load_all_users | personalize.map()
    ```

    **Progress** comes as custom events named `cope.progress` (callback handlers' `on_custom_event`,
    `astream_events`), and in a LangGraph node through the stream writer, with `"event":
    "cope.progress"` added: user_id, stage, step, total, loss and seconds_left. Every stage is a
    child run with its time or its error:

    ```python
    for chunk in graph.stream({"user_id": "alice"}, stream_mode="custom"):
        print(chunk["stage"], chunk["step"], chunk["total"])
    ```

    **Stopping**: a cancelled `ainvoke`, or a `threading.Event` given as `stop_event`, ends it
    within one training step (or once the base is loaded, where that is under way). Nothing is then
    published or left behind, neither a thread nor a file; `Cancelled` is raised, or asyncio's own
    error:

    ```python
    stop = threading.Event()
    personalize.invoke(request, stop_event=stop)  # in a chain: personalize.bind(stop_event=stop)
    ```

    **Resuming**: with `job_dir` the finished stages of a run that was stopped or killed are kept
    there, and the same request goes on after the last of them; another history, recipe or base
    starts anew. The folder is removed when the run is done.

    **As a tool**: in an agent take the user from the config, not from the model:

    ```python
    class Nothing(BaseModel):
        "Takes no arguments: the user and the texts are known."

    tool = PersonalizeUser(history=ChromaHistory("chroma")).as_tool(Nothing)
    agent.invoke(messages, {"configurable": {"user_id": "alice"}})
    ```

    **Traces** hold counts and figures, never a text, and the user as `trace_user_id` says. What is
    passed between the steps of a chain is traced by core, not here: a chain's own input, and the
    `samples` in the result unless they are switched off.

    Raises `HistoryError` and `InputError` for a wrong request, `ModelError` for a base that cannot
    be trained, `Cancelled`, and the store's errors; a version refused by the gate is no error.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Return True: instances can be written with `langchain_core.load.dumps`."""
        return True

    @property
    def InputType(self) -> type[PersonalizeRequest]:  # noqa: N802 - core's name
        """The form of a request, for schemas and tools."""
        return PersonalizeRequest

    def invoke(
        self,
        input: PersonalizeRequest | dict[str, Any],
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> PersonalizeResult:
        """Personalize one user and return what became of it.

        Args:
            input: The user, and what to learn from.
            config: As for any runnable.
            **kwargs: `stop_event`, a `threading.Event` that stops it when set.
        """
        return self._start(input, config, **kwargs).result

    async def ainvoke(
        self,
        input: PersonalizeRequest | dict[str, Any],
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> PersonalizeResult:
        """`invoke` in a thread; a cancel stops it at the next training step and waits for that."""
        cancelled = threading.Event()
        work = partial(self._start, input, ensure_config(config), cancelled=cancelled, **kwargs)
        # A thread of its own, which ends with it: trainings that wait for the device would fill the
        # event loop's pool.
        with ThreadPoolExecutor(1, thread_name_prefix="cope-personalize") as thread:
            run_in_thread = partial(asyncio.get_running_loop().run_in_executor, thread)
            run = run_in_thread(contextvars.copy_context().run, work)
            try:
                return (await asyncio.shield(run)).result
            except asyncio.CancelledError:
                cancelled.set()
                await _wait_despite_cancel(run)  # so that afterwards nothing is still at work
                if run.exception() is None:  # it was done in that very moment
                    withdrawal = run_in_thread(run.result().withdraw)
                    await _wait_despite_cancel(withdrawal)
                    error = withdrawal.exception()
                    if error is not None:
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
        """Personalize one user after another; without `return_exceptions` a failure ends it."""
        results = self.batch_as_completed(
            inputs, config, return_exceptions=return_exceptions, **kwargs
        )
        return [result for _, result in results]

    async def abatch(
        self,
        inputs: list[PersonalizeRequest | dict[str, Any]],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[PersonalizeResult]:
        """`batch` for an event loop; a cancel stops the training under way and starts no other."""
        results = self.abatch_as_completed(
            inputs, config, return_exceptions=return_exceptions, **kwargs
        )
        return [result async for _, result in results]

    def batch_as_completed(
        self,
        inputs: Sequence[PersonalizeRequest | dict[str, Any]],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> Iterator[tuple[int, Any]]:
        """`batch`, each user's index and result as soon as it is there."""
        configs = get_config_list(config, len(inputs))
        for index, (request, its_config) in enumerate(zip(inputs, configs, strict=True)):
            try:
                result: Any = self.invoke(request, its_config, **kwargs)
            except Exception as error:
                if not return_exceptions:
                    raise
                result = error
            yield index, result

    async def abatch_as_completed(
        self,
        inputs: Sequence[PersonalizeRequest | dict[str, Any]],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> AsyncIterator[tuple[int, Any]]:
        """`abatch`, each user's index and result as soon as it is there."""
        configs = get_config_list(config, len(inputs))
        for index, (request, its_config) in enumerate(zip(inputs, configs, strict=True)):
            try:
                result: Any = await self.ainvoke(request, its_config, **kwargs)
            except Exception as error:
                if not return_exceptions:
                    raise
                result = error
            yield index, result

    def as_tool(
        self,
        args_schema: type[BaseModel] | None = None,
        *,
        name: str | None = None,
        description: str | None = None,
        arg_types: dict[str, type] | None = None,
    ) -> BaseTool:
        """Return a tool that personalizes.

        With `args_schema` a model is asked for those fields of the request alone.
        """
        return convert_runnable_to_tool(
            self.model_copy(update={"samples": False}),
            args_schema,
            name=name or self.name or TOOL_NAME,
            description=description or TOOL_DESCRIPTION,
            arg_types=arg_types,
        )

    def _start(
        self,
        input: PersonalizeRequest | dict[str, Any],
        config: RunnableConfig | None,
        *,
        stop_event: threading.Event | None = None,
        cancelled: threading.Event | None = None,
    ) -> Run:
        config = ensure_config(config)
        request = _as_request(input)
        user = _requested_user(request, config)
        if self.authorize is not None:
            self.authorize(user, config)
        stop_events = [event for event in (stop_event, cancelled) if event is not None]
        run = Run(self, request, user, stop_events)
        try:
            self._call_with_config(run.traced, run.traced_input(), run.traced_config(config))
            return run
        except TracedError as traced:
            error = traced.error
        raise error  # here, where nothing is being handled: it keeps its own cause and context


def _as_request(input: PersonalizeRequest | dict[str, Any]) -> PersonalizeRequest:
    if isinstance(input, PersonalizeRequest):
        return input
    try:
        return PersonalizeRequest.model_validate(input)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            field = ".".join(str(part) for part in problem["loc"])
            problems.append(f"{field or 'the request'}: {problem['msg']}")
        raise InputError(
            f"a request takes user_id, history and instruction ({'; '.join(problems)})"
        ) from error


def _requested_user(request: PersonalizeRequest, config: RunnableConfig) -> str:
    """Return the user of the request, else of the config.

    Where both name one they must agree: a request may come from a model.
    """
    configured = config["configurable"].get("user_id")
    if request.user_id is None:
        if configured is None:
            raise InputError(
                "no user was named: put user_id into the request, or into the config's configurable"
            )
        if not isinstance(configured, str):
            raise InputError(
                f"the config's user_id is {configured!r:.80}, expected a string: "
                "put the user's id there, or into the request"
            )
        return configured
    if configured not in (None, request.user_id):
        raise InputError(
            f"the request names the user {request.user_id!r:.80}, but the config the user "
            f"{configured!r:.80}: name one, or the same"
        )
    return request.user_id


async def _wait_despite_cancel(work: "asyncio.Future[Any]") -> None:
    """Wait until `work` is done, however often the waiting task is cancelled meanwhile."""
    while not work.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([work])
