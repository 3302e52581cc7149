"""ChatCoPe: a LangChain chat model in one user's own manner.

One straight path: messages → `ChatCoPe._prepare` (user, prompt, request) → engine → `Call.chunks` →
AIMessageChunk. `_generate` is a fold over `_stream`, so there is one loop. The user of a call is
fixed before anything else (`_pin`), because LangChain hands `configurable` to `invoke` and its
siblings only, never to `_stream`. This module is LangChain's surface; the parts are in `chat/`, one
call in `chat/call.py` and its user in `chat/user.py`.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.exceptions import ModelTimeoutError
from langchain_core.language_models import LanguageModelInput, ModelProfile
from langchain_core.language_models.chat_models import (
    BaseChatModel,
    agenerate_from_stream,
    generate_from_stream,
)
from langchain_core.load import dumpd
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import RunnableConfig, ensure_config
from langchain_core.runnables.config import get_executor_for_config
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from langchain_cope.chat.bindings import MOST_AT_ONCE, BindsTools
from langchain_cope.chat.call import (
    SAMPLING_OPTIONS,
    Call,
    ChatContextOverflow,
    ChatModelNotFound,
    check_options,
    contrast_of,
    deadline_of,
    prompt_of,
    reply_parts,
    tokens_in,
    without_none,
)
from langchain_cope.chat.messages import template_messages
from langchain_cope.chat.profile import profile_of
from langchain_cope.chat.retrieval import examples_for, items_of, with_examples
from langchain_cope.chat.tools import ToolUse
from langchain_cope.chat.user import (
    PINNED,
    USER_OPTIONS,
    PinnedUser,
    checked_user,
    find_version,
    user_of_call,
)
from langchain_cope.engine import (
    LARGEST_STRENGTH,
    ContrastRule,
    check_adapter_scale,
    check_alpha,
    check_option,
    check_tau,
    is_whole,
)
from langchain_cope.errors import EngineClosed, ModelNotFound
from langchain_cope.settings import BaseSettings
from langchain_cope.stores import open_store
from langchain_cope.strength import Strength, strength_for
from langchain_cope.tracing import TraceUserId, traced_user

if TYPE_CHECKING:
    from adapter_store import AdapterVersion
    from langchain_cope.engine import Contrast, Engine, Sampling

_STRENGTH: dict[str, Any] = {"minimum": 0, "maximum": LARGEST_STRENGTH}  # in a JSON schema
_CHECKS: dict[str, Callable[[object], None]] = {
    "alpha": check_alpha,
    "tau": check_tau,
    "adapter_scale": check_adapter_scale,
}

__all__ = ["ChatCoPe", "ChatContextOverflow", "ChatModelNotFound"]


class ChatCoPe(BaseSettings, BindsTools, BaseChatModel):
    """A chat model over one local base model and the user's adapter, decoding contrastively (CoPe).

    Nothing is loaded until the first call. Instances with the same base share it, and their
    requests are decoded together.

    ```python
    chat = ChatCoPe(user_id="alice")
    chat.invoke("Write a headline for: …")
    chat.invoke("…", {"configurable": {"user_id": "bob"}})
    ```

    The user of a call: the keyword `user_id`, else that of the agent's run (`CoPeUserMiddleware`),
    else `config["configurable"]["user_id"]`, else the constructor's. None is the base alone.

    Errors: `InputError` and the store's `InvalidAdapterError` for what was given,
    `ChatModelNotFound` for a base that is not there, `ChatContextOverflow` for a prompt that does
    not fit, `adapter_store.AdapterStoreError` for a store or an adapter that cannot be trusted.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    user_id: str | None = None
    """The user who is answered; None: the base alone."""
    store: Any = None
    """Folder, URL or `AdapterStore`; None: the environment's `COPE_STORE`, else the data folder."""
    alpha: float | None = Field(default=None, json_schema_extra=_STRENGTH)
    """Weight of the base that is contrasted away, 0 to 1000; 0: no contrast.

    None: what the adapter version recommends, else what users of the base were measured to need,
    else 0.1, the paper's value.
    """
    tau: float | None = Field(default=None, json_schema_extra={"exclusiveMinimum": 0, "maximum": 1})
    """Tokens below this share of the likeliest one's probability are out, 0 < τ ≤ 1.

    None: as for `alpha`.
    """
    contrast: ContrastRule = "adaptive"
    """`fixed`: the paper's, the same α for every token.

    `adaptive`: α acts only in answers in which adapter and base differ, not where the answer has to
    be exact, and never in calls and JSON; and the adapter itself steps back where all questions of
    the conversation are unlike those of the history (`relevance` in `response_metadata`).
    """
    adapter_scale: float | None = Field(default=None, json_schema_extra=_STRENGTH)
    """What the adapter's own changes are multiplied with, 0 to 1000; 0 is the base alone.

    The adaptive contrast multiplies it with the conversation's relevance. None: what the adapter
    version recommends, else what users of the base need, else 1.
    """
    retrieve: int = Field(default=0, ge=0)
    """How many of the user's own items, those most like the question, the user's model reads first.

    The base that is contrasted reads the question alone. Items that share next to nothing with the
    question, or leave no room for the answer, are left out.
    """
    history: Any = Field(default=None, exclude=True, repr=False)
    """Where `retrieve` finds items: a `ChromaHistory`, or the `UserHistory` of one user."""
    adapter_version: str | None = None
    """None: the user's active version."""
    authorize: Callable[[str | None, RunnableConfig], None] | None = Field(
        default=None, exclude=True, repr=False
    )
    """Called with the user and the configuration of every call before anything is loaded for it.

    What it raises, the call raises: check here that the client may ask as that user.
    """
    trace_user_id: TraceUserId = "plain"
    """How traces and `response_metadata` show the user.

    Core itself copies `configurable` into the trace's metadata: where that matters name the user
    through `CoPeUserMiddleware` or as a keyword.
    """
    on_missing_adapter: Literal["base", "error"] = "base"
    """What a user without an adapter gets.

    A damaged store, or a version that is named and not there, is always an error.
    """
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """0: always the likeliest token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that have this share of the probability together."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many of the likeliest tokens; 0: from all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Sample from tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """1: none; the paper uses 1.2 to 1.3 for long texts."""
    max_tokens: int = Field(default=256, ge=1)
    """Tokens of the answer, at most; the end of the context ends it too."""
    stop: list[str] | str | None = None
    """The answer ends before the first of these."""
    seed: int | None = None
    """For repeatable samples; None: another one each call."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds until a call gives up with core's `ModelTimeoutError`; None: never.

    Loading the base, at the first call, does not count; see `load`.
    """
    max_retries: int = Field(default=0, ge=0)
    """Accepted so that models can be exchanged. A local model would fail the same way twice."""
    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)
    """Accepted so that models can be exchanged. It is neither used nor written out."""
    streaming: bool = False
    """Stream inside `invoke` as well, for callbacks that want tokens."""
    _closed: bool = PrivateAttr(default=False)

    @field_validator("user_id")
    @classmethod
    def _check_user(cls, value: str | None) -> str | None:
        return checked_user(value)

    @field_validator(*_CHECKS)
    @classmethod
    def _check_contrast(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None:
            try:
                _CHECKS[str(info.field_name)](value)
            except ValueError as error:  # as pydantic's own, so that its errors() stay plain data
                reason = {"reason": str(error)}
                raise PydanticCustomError("out_of_range", "{reason}", reason) from None
        return value

    # ── how long the base is held ──

    def load(self) -> None:
        """Load the base now rather than at the first call; also opens a closed chat again.

        Raises what a call would raise where the base cannot be loaded.
        """
        self._closed = False
        self._engine().base.fingerprint()  # reads all the weights, once a base

    async def aload(self) -> None:
        """Do as `load` without blocking the event loop."""
        await asyncio.to_thread(self.load)

    def close(self) -> None:
        """Let go of the base; safe to call twice.

        The base leaves memory unless another chat that was used and is not closed, or a training,
        has it still; those go on. The chat's own calls, those under way too, raise `EngineClosed`.
        """
        self._closed = True
        from langchain_cope.engine import Engine

        Engine.release(self)

    async def aclose(self) -> None:
        """Do as `close` without blocking the event loop."""
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Self:
        """Load the base."""
        self.load()
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the base."""
        self.close()

    async def __aenter__(self) -> Self:
        """Load the base."""
        await self.aload()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Let go of the base."""
        await self.aclose()

    # ── what LangChain asks about the model ──

    @property
    def _llm_type(self) -> str:
        return "cope"

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Return True: instances can be written with `langchain_core.load.dumps`."""
        return True

    @property
    def _identifying_params(self) -> dict[str, Any]:
        names = ("model", "revision", "user_id", "adapter_version", "alpha", "tau")
        how = ("contrast", "adapter_scale", "retrieve", *SAMPLING_OPTIONS)
        params = {name: getattr(self, name) for name in (*names, *how)}
        params["store"] = None if self.store is None else open_store(self.store).url
        return params

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        own = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        params = super()._get_ls_params(stop=self._stops(stop) or None, **{**own, **kwargs})
        return {**params, "ls_provider": "cope"}

    def _get_invocation_params(
        self, stop: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        pinned = kwargs.pop(PINNED, None)
        params = super()._get_invocation_params(stop=stop, **kwargs)
        params["user_id"] = traced_user(self.user_id, self.trace_user_id)
        if isinstance(pinned, PinnedUser):
            params.update(pinned.to_dict())
        return params

    @property
    def _serialized(self) -> dict[str, Any]:
        written: dict[str, Any] = dumpd(self)
        if "user_id" in written.get("kwargs", {}):
            written["kwargs"]["user_id"] = traced_user(self.user_id, self.trace_user_id)
        return written

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """Return a cache key of everything that the answer depends on.

        Two users, two versions or two settings never share an entry.
        """
        options = self._pin(kwargs)
        user: PinnedUser = options[PINNED]
        base = user.engine.base
        others = {name: value for name, value in options.items() if name != "model"}
        key = {
            "model": base.fingerprint(),
            "revision": self.revision,
            "device": str(base.device),
            "dtype": str(base.dtype),
            # As used: what a version recommends counts, and what a later release knows of the base.
            "strength": [asdict(self._contrast(user, options)), self._adapter_scale(user, options)],
            "retrieve": self.retrieve,
            "stop": self._stops(stop),
            **{name: getattr(self, name) for name in SAMPLING_OPTIONS},
            **others,
            PINNED: user.key,
        }
        return json.dumps(key, sort_keys=True, default=str)

    def _resolve_model_profile(self) -> ModelProfile | None:
        return profile_of(self.model, self.revision, self.max_tokens)

    def get_token_ids(self, text: str) -> list[int]:
        """Return the token ids of `text` in the base's own tokenizer."""
        return self._engine().base.chat_template.text_ids(text)

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Return how many tokens the prompt of `messages` and `tools` has.

        A part of a conversation has a count, too, also where the base's template refuses it as a
        prompt: that of the part between empty turns of the user, or of its texts. None has 0.
        """
        return tokens_in(self._engine().base, messages, ToolUse.of({"tools": tools}))

    # ── the ways in, each of which fixes the user of its call ──

    def invoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        """Answer in the manner of the call's user."""
        return super().invoke(input, config, stop=stop, **self._pin(kwargs, config))

    async def ainvoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        """Answer without blocking the event loop; a cancelled task stops within one token."""
        return await super().ainvoke(input, config, stop=stop, **await self._apin(kwargs, config))

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        """Answer as `invoke` does, piece by piece."""
        yield from super().stream(input, config, stop=stop, **self._pin(kwargs, config))

    async def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """Answer as `ainvoke` does, piece by piece."""
        pinned = await self._apin(kwargs, config)
        async for chunk in super().astream(input, config, stop=stop, **pinned):
            yield chunk

    def stream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Yield the events of a call; version `v3` reaches `_stream` past `stream`."""
        if kwargs.get("version") == "v3":
            kwargs = self._pin(kwargs, config)
        return super().stream_events(input, config, **kwargs)

    def astream_events(
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Any:
        """Do as `stream_events` for an event loop."""
        if kwargs.get("version") != "v3":
            return super().astream_events(input, config, **kwargs)
        events = super().astream_events

        async def with_user() -> Any:
            return await events(input, config, **await self._apin(kwargs, config))

        return with_user()

    def generate(
        self, messages: Any, stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        """Answer several conversations of one user together."""
        run_id = kwargs.pop("run_id", None)
        ask: Callable[..., LLMResult] = partial(
            super().generate, stop=stop, callbacks=callbacks, **self._pin(kwargs)
        )
        if len(messages) < 2:
            return ask(messages, run_id=run_id)
        run_ids = [run_id, *[None] * (len(messages) - 1)]
        at_once: RunnableConfig = {"max_concurrency": min(len(messages), MOST_AT_ONCE)}
        with get_executor_for_config(at_once) as executor:
            answers = executor.map(lambda turns, id_: ask([turns], run_id=id_), messages, run_ids)
            results = list(answers)
        return LLMResult(
            generations=[result.generations[0] for result in results],
            llm_output=self._combine_llm_outputs([result.llm_output for result in results]),
            run=[run for result in results for run in result.run or ()] or None,
        )

    async def agenerate(
        self, messages: Any, stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        """Do as `generate` for an event loop."""
        return await super().agenerate(messages, stop, callbacks, **await self._apin(kwargs))

    def _pin(self, kwargs: dict[str, Any], config: RunnableConfig | None = None) -> dict[str, Any]:
        """Return `kwargs` with the call's `PinnedUser` in them; one that is there already stays."""
        if isinstance(kwargs.get(PINNED), PinnedUser):
            return kwargs
        kwargs = without_none(kwargs)
        config = ensure_config(config)
        user_id = user_of_call(kwargs, config.get("configurable") or {}, self.user_id)
        if self.authorize is not None:
            self.authorize(user_id, config)
        engine = self._engine(kwargs.get("model"))
        version = kwargs.get("adapter_version", self.adapter_version)
        others = {name: value for name, value in kwargs.items() if name not in USER_OPTIONS}
        retrieve = kwargs.get("retrieve", self.retrieve)
        check_option("retrieve", retrieve, "an integer ≥ 0", is_whole(retrieve, least=0))
        return {**others, PINNED: self._resolve(engine, user_id, version, retrieve)}

    async def _apin(
        self, kwargs: dict[str, Any], config: RunnableConfig | None = None
    ) -> dict[str, Any]:
        # to_thread copies the context, where ensure_config finds the surrounding chain's config.
        return await asyncio.to_thread(self._pin, kwargs, config)

    def _resolve(
        self, engine: "Engine", user_id: str | None, version: str | None, retrieve: int
    ) -> PinnedUser:
        # Computed for every user: the cache key needs it, and is made on the event loop.
        fingerprint = engine.base.fingerprint()
        shown = traced_user(user_id, self.trace_user_id)
        if user_id is None:
            return PinnedUser(engine, None, None, None, shown)
        store = open_store(self.store)
        required = self.on_missing_adapter == "error"
        match = find_version(store, user_id, version, base=fingerprint, required=required)
        items = items_of(self.history, user_id) if retrieve else ()
        return PinnedUser(engine, store, user_id, match, shown, items)

    # ── one loop ──

    def pin(self, config: RunnableConfig | None = None, **kwargs: Any) -> PinnedUser:
        """Return the user of a call, with the version that answers: all that asks the store.

        For servers that wait for a store elsewhere than where they compute: `prepare` takes it as
        `pinned_user`, and asks for nothing more.
        """
        user: PinnedUser = self._pin(kwargs, config)[PINNED]
        return user

    def prepare(
        self,
        messages: list[BaseMessage],
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Call:
        """Return a call, ready to run on its engine: for servers of another protocol.

        They read the engine's pieces themselves: no callbacks, no traces and no cache of LangChain
        have a part in it. It takes what `invoke` takes, and raises as that does.
        """
        return self._prepare(messages, stop, self._pin(kwargs, config))

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, run_manager, **kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await agenerate_from_stream(self._astream(messages, stop, run_manager, **kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call = self._prepare(messages, stop, kwargs)
        pieces = call.engine.stream(call.request)
        try:
            self._check_open()  # `close` ends the requests that it finds
            for piece in pieces:
                yield from call.chunks(piece)
        except TimeoutError as error:
            raise ModelTimeoutError(str(error)) from error
        finally:
            pieces.close()

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        call = await asyncio.to_thread(self._prepare, messages, stop, kwargs)
        pieces = call.engine.astream(call.request)
        try:
            async for piece in pieces:
                self._check_open()
                for chunk in call.chunks(piece):
                    yield chunk
        except TimeoutError as error:
            raise ModelTimeoutError(str(error)) from error
        finally:
            await pieces.aclose()

    def _prepare(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]
    ) -> Call:
        """Return the call of these messages and keywords, ready to run."""
        from langchain_cope.engine import Engine, Request

        self._check_open()
        kwargs = without_none(kwargs)
        check_options(kwargs)
        deadline = deadline_of(kwargs.get("timeout", self.timeout))
        options = self._pin(kwargs)
        user: PinnedUser = options[PINNED]
        base = user.engine.base
        use = ToolUse.of(options)
        grammar = use.grammar()
        prompt, opened = prompt_of(base, messages, use)
        if len(prompt) >= base.context:
            raise ChatContextOverflow(len(prompt), base.context)
        sampling = self._sampling(stop, options)
        contrast, scale = self._contrast(user, options), self._adapter_scale(user, options)
        is_adaptive = contrast.rule == "adaptive"
        relevance = user.relevance(template_messages(messages)) if is_adaptive else None
        personal, num_retrieved = list[int](), 0
        if relevance != 0:
            personal, num_retrieved = self._with_own_items(user, messages, use, options, sampling)
        request = Request(
            personal or prompt,
            adapter=user.adapter,
            adapter_scale=scale if relevance is None else scale * relevance,
            contrast=contrast,
            sampling=sampling,
            deadline=deadline,
            grammar=grammar,
            parts=reply_parts(use, opened),
            logprobs=bool(options.get("logprobs")),
            base_prompt=prompt if num_retrieved else None,
            holder=self,
        )
        # A new one, where it was closed meanwhile.
        engine = Engine.of(base, self.engine_options, holder=self)
        return Call(user, engine, request, num_retrieved, relevance)

    def _with_own_items(
        self,
        user: PinnedUser,
        messages: list[BaseMessage],
        use: ToolUse,
        options: dict[str, Any],
        sampling: "Sampling",
    ) -> tuple[list[int], int]:
        """Return the prompt with the user's items most like it, and their number; none: ([], 0).

        The least alike are left out as long as prompt and answer do not fit the context.
        """
        base, number = user.engine.base, options.get("retrieve", self.retrieve)
        examples = examples_for(messages, user.items, number) if number and user.items else []
        for first in range(len(examples)):
            shown = examples[first:]
            prompt, _ = prompt_of(base, with_examples(messages, shown), use)
            if len(prompt) + sampling.max_tokens <= base.context:
                return prompt, len(shown)
        return [], 0

    def _contrast(self, user: PinnedUser, options: dict[str, Any]) -> "Contrast":
        """Return the call's α and τ, else the model's, else those that suit the version."""
        rule = options.get("contrast", self.contrast)
        call = (options.get("alpha"), options.get("tau"))
        model = (self.alpha, self.tau)
        if user.version is None:
            nothing_to_contrast = (0.0, None)
            return contrast_of(nothing_to_contrast, call, model, rule=rule)
        strength = _strength_of(user.engine, user.version)
        return contrast_of(call, model, (strength.alpha, strength.tau), rule=rule)

    def _adapter_scale(self, user: PinnedUser, options: dict[str, Any]) -> float:
        """Return the call's scale of the adapter, else the model's, else the one that suits it.

        It is 0 without a version.
        """
        if user.version is None:
            return 0.0
        suits = _strength_of(user.engine, user.version).adapter_scale
        levels = (options.get("adapter_scale"), self.adapter_scale)
        return next((scale for scale in levels if scale is not None), suits)

    def _sampling(self, stop: list[str] | None, options: dict[str, Any]) -> "Sampling":
        from langchain_cope.engine import Sampling

        values = {name: options.get(name, getattr(self, name)) for name in SAMPLING_OPTIONS}
        if values["seed"] is None:
            del values["seed"]
        return Sampling(stop=tuple(self._stops(stop)), **values)

    def _stops(self, stop: list[str] | None) -> list[str]:
        texts: Any = self.stop if stop is None else stop
        if texts is None:
            return []
        is_one = isinstance(texts, str) or not isinstance(texts, Iterable)
        return [texts] if is_one else list(texts)

    def _engine(self, model: str | None = None, holder: object = None) -> "Engine":
        self._check_open()
        try:
            engine = super()._engine(model, holder)
        except ModelNotFound as error:
            raise ChatModelNotFound(str(error)) from error
        if self._closed:  # while it was loaded
            self.close()
            self._check_open()
        return engine

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed(
                "this ChatCoPe is closed: `load()` opens it again, or make another one"
            )


def _strength_of(engine: "Engine", version: "AdapterVersion") -> Strength:
    """Return how strongly a version acts where neither the call nor the model says it."""
    fingerprint = engine.base.fingerprint()
    return strength_for(fingerprint, version.alpha, version.tau, version.metadata)
