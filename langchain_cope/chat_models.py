"""ChatCoPe: a LangChain chat model in one user's own manner.

One straight path: messages → `ChatCoPe._prepare` (user, version, prompt, request) → engine → AIMessageChunk. ``_generate`` is a
fold over ``_stream``, so there is one loop. The user of a call is fixed before anything else (`_pin`), because
LangChain hands ``configurable`` to ``invoke`` and its siblings only, never to ``_stream``.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.exceptions import ContextOverflowError, ModelNotFoundError, ModelTimeoutError
from langchain_core.language_models import LanguageModelInput, ModelProfile
from langchain_core.language_models.chat_models import (
    BaseChatModel,
    _ChatModelBinding,
    agenerate_from_stream,
    generate_from_stream,
)
from langchain_core.load import dumpd
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig, ensure_config
from langchain_core.tools import BaseTool
from pydantic import ConfigDict, Field, SecretStr, field_validator

from adapter_store import AdapterStore, AdapterVersion
from adapter_store.errors import AdapterNotFoundError
from langchain_cope.chat.messages import template_messages
from langchain_cope.chat.profile import profile_of
from langchain_cope.chat.reply import ReplyStream
from langchain_cope.chat.structured_output import Method, structured_output
from langchain_cope.chat.tools import TOOL_OPTIONS, ToolUse, described_tool
from langchain_cope.chat.user import PinnedUser, user_of_run
from langchain_cope.engine import Contrast
from langchain_cope.errors import ContextOverflow, InputError, ModelNotFound
from langchain_cope.settings import BaseSettings
from langchain_cope.stores import open_store
from langchain_cope.tracing import TraceUserId, traced_user

if TYPE_CHECKING:
    from langchain_cope.engine import AdapterSource, Base, Completion, Engine, Piece, Request

_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
_THOUGHT, _NO_THOUGHT = "<think>", "\n</think>\n\n"
_USER = ("user_id", "adapter_version")
_CALL_OPTIONS = (*_SAMPLING, *_USER, *TOOL_OPTIONS, "alpha", "tau", "model", "logprobs", "timeout")
_PINNED = "pinned_user"
_CORE_OPTIONS = (
    "stream",
    "ls_structured_output_format",
    "structured_output_format",
)  # LangChain's own, of no meaning here


class ChatContextOverflow(ContextOverflow, ContextOverflowError):  # noqa: N818
    """A prompt longer than the context: ours, and core's, which summarising middleware retries on."""


class ChatModelNotFound(ModelNotFound, ModelNotFoundError):  # noqa: N818
    """No base of that name: ours, and core's, which fallbacks act on."""


@dataclass(frozen=True)
class _Call:
    """One call, ready to run."""

    engine: "Engine"
    request: "Request"
    metadata: dict[str, Any]
    reply: ReplyStream


class ChatCoPe(BaseSettings, BaseChatModel):
    """A chat model over one local base model plus the user's adapter, decoding contrastively (CoPe).

    Nothing is loaded until the first call. Instances with the same base share it, and their requests are decoded together.

    Example:
        .. code-block:: python

            chat = ChatCoPe(user_id="alice")
            chat.invoke("Write a headline for: …")
            chat.invoke("…", {"configurable": {"user_id": "bob"}})

    The user of a call: the keyword ``user_id``, else that of the agent's run (`CoPeUserMiddleware`), else
    ``config["configurable"]["user_id"]``, else the constructor's. None is the base alone.

    Errors: ``InputError`` and the store's ``InvalidAdapterError`` for what was given, ``ChatModelNotFound`` for a base that is not
    there, ``ChatContextOverflow`` for a prompt that does not fit, ``adapter_store.AdapterStoreError`` for a store or an adapter
    that cannot be trusted.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    user_id: str | None = None
    """Whose manner; None: the base alone."""
    store: Any = None
    """Folder, ``file://``, ``memory://`` or an ``AdapterStore``; None: ``COPE_STORE``, else the user data folder."""
    alpha: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Weight of the base that is contrasted away; None: what the adapter version recommends, else 0.1. 0 is the adapter alone."""
    tau: float | None = Field(default=None, gt=0, le=1)
    """Plausibility: tokens below this share of the likeliest one's probability are out; None: as for ``alpha``."""
    adapter_version: str | None = None
    """None: the user's active version."""
    authorize: Callable[[str | None, RunnableConfig], None] | None = Field(
        default=None, exclude=True, repr=False
    )
    """Called with the user and the configuration of every call before anything is loaded for it. What it raises, the call raises:
    check here that whoever asks may ask as that user, so that no client can name another one."""
    trace_user_id: TraceUserId = "plain"
    """How traces and ``response_metadata`` show the user. Core itself copies ``configurable`` into the trace's metadata: where that
    matters give the user by `CoPeUserMiddleware` or as a keyword."""
    on_missing_adapter: Literal["base", "error"] = "base"
    """What a user without an adapter gets. A damaged store or a version named and not there is always an error."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """0: always the likeliest token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0: every token."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """1: none; the paper uses 1.2 to 1.3 for long texts."""
    max_tokens: int = Field(default=256, ge=1)
    """Tokens of the answer, at most; the end of the context ends it too."""
    stop: list[str] | str | None = None
    """The answer ends before the first of these."""
    seed: int | None = None
    """For repeatable samples; None: another one each call."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds until a call gives up with core's ``ModelTimeoutError``; None: never."""
    max_retries: int = Field(default=0, ge=0)
    """Accepted so that models can be exchanged. A local model fails the same way twice: nothing is retried."""
    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)
    """Accepted so that models can be exchanged. Nobody is called: it is neither used nor kept in what is written out."""
    streaming: bool = False
    """Stream inside ``invoke`` as well, for callbacks that want tokens."""

    @field_validator("user_id")
    @classmethod
    def _user_is_named_or_none(cls, value: str | None) -> str | None:
        return _checked_user(value)

    # ── what LangChain asks about the model ──

    @property
    def _llm_type(self) -> str:
        return "cope"

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Instances can be written with ``langchain_core.load.dumps``."""
        return True

    @property
    def _identifying_params(self) -> dict[str, Any]:
        names = ("model", "revision", "user_id", "adapter_version", "alpha", "tau", *_SAMPLING)
        return {name: getattr(self, name) for name in names} | {"store": self._store_url()}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        sampling = {
            **{name: getattr(self, name) for name in ("temperature", "max_tokens")},
            **kwargs,
        }
        return {
            **super()._get_ls_params(stop=self._stops(stop) or None, **sampling),
            "ls_provider": "cope",
        }

    def _get_invocation_params(
        self, stop: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        pinned = kwargs.pop(_PINNED, None)
        params = super()._get_invocation_params(stop=stop, **kwargs)
        shown = pinned.to_dict() if isinstance(pinned, PinnedUser) else {}
        return {**params, "user_id": traced_user(self.user_id, self.trace_user_id), **shown}

    @property
    def _serialized(self) -> dict[str, Any]:
        found: dict[str, Any] = dumpd(self)
        if "user_id" in found.get("kwargs", {}):
            found["kwargs"]["user_id"] = traced_user(self.user_id, self.trace_user_id)
        return found

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """Cache key: everything the answer depends on, so that two users, versions or settings never share an entry."""
        pinned = self._pin(kwargs)
        base = self._engine(pinned.get("model")).base
        key = {
            "model": base.fingerprint(),
            "revision": self.revision,
            "device": str(base.device),
            "dtype": str(base.dtype),
            "alpha": self.alpha,
            "tau": self.tau,
            "stop": self._stops(stop),
            **{name: getattr(self, name) for name in _SAMPLING},
            **pinned,
            _PINNED: pinned[_PINNED].key,
        }
        return json.dumps(key, sort_keys=True, default=str)

    def _resolve_model_profile(self) -> ModelProfile | None:
        return profile_of(self.model, self.revision, self.max_tokens)

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of ``text`` in the base's own tokenizer."""
        return list(self._engine().base.tokenizer.encode(text, add_special_tokens=False))

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Tokens of the prompt that ``messages`` and ``tools`` make in the base's chat template."""
        prompt, _ = _prompt(self._engine().base, messages, ToolUse.of({"tools": tools}))
        return len(prompt)

    # ── tools and structured output ──

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The model with tools: functions, Pydantic classes, TypedDicts, JSON schemas or LangChain tools.

        Args:
            tools: what may be called.
            tool_choice: ``auto`` (None too), ``any`` (``required`` or True too), ``none``, or the name of one tool.
            parallel_tool_calls: False: one call at most.
            strict: accepted so that models can be exchanged; calls are always held to their schemas.
            kwargs: further options of a call.

        Calls are valid whatever the weights are; under ``auto`` every call that is begun is. What the token budget cuts off is in
        ``invalid_tool_calls``. Raises ``InputError`` for a schema that no answer can be held to, by the keyword.
        """
        given = {"tools": [described_tool(tool) for tool in tools], "tool_choice": tool_choice}
        if parallel_tool_calls is not None:
            given["parallel_tool_calls"] = parallel_tool_calls
        ToolUse.of({**given, **kwargs}).grammar()
        return self.bind(
            **{name: value for name, value in given.items() if value is not None}, **kwargs
        )

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Answers as objects of ``schema``: a Pydantic class, a TypedDict or a JSON schema.

        Args:
            schema: may be None for ``json_mode`` alone, which then gives any object.
            method: ``json_schema``: the answer; ``function_calling``: arguments of a call; ``json_mode``: any object.
            include_raw: a dict of ``raw`` (the message), ``parsed`` and ``parsing_error`` instead of the object.
            strict: accepted so that models can be exchanged; answers are always held to their schema.
            kwargs: none; they are refused by name.

        Every answer that is not cut at ``max_tokens`` fits the schema, whatever the weights are. Raises ``InputError`` for a schema
        that no answer can be held to, by the keyword; the chain raises core's ``OutputParserException`` for an answer that was cut.
        """
        return structured_output(self, schema, method, include_raw, kwargs)

    def bind(self, **kwargs: Any) -> "BoundChat":
        """The model with these options in every call, tools and structured output bound later included."""
        return BoundChat(bound=self, kwargs=kwargs)

    def with_config(self, config: RunnableConfig | None = None, **kwargs: Any) -> "BoundChat":
        """The model with this configuration in every call; see `bind`."""
        return BoundChat(bound=self, config={**(config or {}), **kwargs})

    # ── the user of a call, resolved once ──

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
        """`invoke` without blocking the event loop; a cancelled task stops within one token."""
        return await super().ainvoke(input, config, stop=stop, **await self._apin(kwargs, config))

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        """`invoke`, piece by piece."""
        yield from super().stream(input, config, stop=stop, **self._pin(kwargs, config))

    async def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """`ainvoke`, piece by piece."""
        async for chunk in super().astream(
            input, config, stop=stop, **await self._apin(kwargs, config)
        ):
            yield chunk

    def stream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Events of a call; version ``v3`` reaches ``_stream`` past `stream`, so its user is resolved here."""
        if kwargs.get("version") == "v3":
            kwargs = self._pin(kwargs, config)
        return super().stream_events(input, config, **kwargs)

    def astream_events(
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Any:
        """`stream_events` for an event loop."""
        if kwargs.get("version") != "v3":
            return super().astream_events(input, config, **kwargs)

        async def pinned() -> Any:
            return await super(ChatCoPe, self).astream_events(
                input, config, **await self._apin(kwargs, config)
            )

        return pinned()

    def generate(
        self, messages: Any, stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        """Answer several conversations of one user."""
        return super().generate(messages, stop, callbacks, **self._pin(kwargs))

    async def agenerate(
        self, messages: Any, stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        """`generate` for an event loop."""
        return await super().agenerate(messages, stop, callbacks, **await self._apin(kwargs))

    def _pin(self, kwargs: dict[str, Any], config: RunnableConfig | None = None) -> dict[str, Any]:
        """``kwargs`` with the user of this call in them, resolved; one that is pinned already stays as it is."""
        if isinstance(kwargs.get(_PINNED), PinnedUser):
            return kwargs
        config = ensure_config(config)
        configured = config.get("configurable") or {}
        otherwise = configured.get("user_id", self.user_id)
        of_run = user_of_run.get()
        user = _checked_user(
            kwargs["user_id"] if "user_id" in kwargs else otherwise if of_run is None else of_run[0]
        )
        if self.authorize is not None:
            self.authorize(user, config)
        version = self._resolve(user, kwargs.get("adapter_version", self.adapter_version), kwargs)
        others = {name: value for name, value in kwargs.items() if name not in _USER}
        return {**others, _PINNED: PinnedUser(user, version, traced_user(user, self.trace_user_id))}

    async def _apin(
        self, kwargs: dict[str, Any], config: RunnableConfig | None = None
    ) -> dict[str, Any]:
        # to_thread copies the context, which is where ensure_config finds the configuration of a surrounding chain.
        return await asyncio.to_thread(self._pin, kwargs, config)

    def _resolve(
        self, user: str | None, version: str | None, kwargs: dict[str, Any]
    ) -> AdapterVersion | None:
        # For every user: the cache key needs the fingerprint, and must not wait for it.
        base = self._engine(kwargs.get("model")).base.fingerprint()
        if user is None:
            return None
        try:
            return self._adapters().resolve(user, version, base=base)
        except AdapterNotFoundError:
            if version is None and self.on_missing_adapter == "base":
                return None
            raise

    # ── one loop ──

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
            for piece in pieces:
                yield from _chunks(piece, call)
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
                for chunk in _chunks(piece, call):
                    yield chunk
        except TimeoutError as error:
            raise ModelTimeoutError(str(error)) from error
        finally:
            await pieces.aclose()

    def _prepare(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]
    ) -> _Call:
        """The engine, the request and the facts of one call."""
        from langchain_cope.engine import Request, Sampling

        unknown = sorted(kwargs.keys() - {_PINNED, *_CALL_OPTIONS, *_CORE_OPTIONS})
        if unknown:
            raise InputError(
                f"ChatCoPe knows no option {', '.join(unknown)}; a call takes {', '.join(_CALL_OPTIONS)} and stop"
            )
        timeout = kwargs.get("timeout", self.timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        pinned = self._pin(kwargs)
        user: PinnedUser = pinned[_PINNED]
        version = user.version
        engine = self._engine(pinned.get("model"))
        use = ToolUse.of(pinned)
        if (grammar := use.grammar()) is not None:
            _ = engine.base.vocabulary  # made now, off the event loop
        prompt, prefix = _prompt(engine.base, messages, use)
        if len(prompt) >= engine.base.context:
            raise ChatContextOverflow(len(prompt), engine.base.context)
        settings = {name: pinned.get(name, getattr(self, name)) for name in _SAMPLING}
        if settings["seed"] is None:
            del settings["seed"]
        request = Request(
            prompt,
            adapter=None if version is None else self._adapter(version),
            contrast=self._contrast(version, pinned.get("alpha"), pinned.get("tau")),
            sampling=Sampling(stop=tuple(self._stops(stop)), **settings),
            deadline=deadline,
            grammar=grammar,
            logprobs=bool(pinned.get("logprobs")),
        )
        metadata = {
            "model_name": engine.base.name,
            "model_provider": "cope",
            "user_id": user.shown,
            "adapter_version": getattr(version, "version", None),
            "adapter_digest": getattr(version, "digest", None),
            "alpha": request.contrast.alpha,
            "tau": request.contrast.tau,
        }
        whole = use.schema is not None and not use.tools
        template = engine.base.reply_format.template
        reply = ReplyStream(template, prefix=prefix, with_calls=bool(use.tools), whole=whole)
        return _Call(engine, request, metadata, reply)

    def _contrast(
        self, version: AdapterVersion | None, alpha: float | None, tau: float | None
    ) -> Contrast:
        """The contrast of one call: what it asks for, else the instance, else the version, else the paper's values."""
        paper = Contrast()
        if version is None:  # nothing to contrast: the base alone, and so it is reported
            return Contrast(0.0, _first(tau, self.tau, paper.tau))
        return Contrast(
            _first(alpha, self.alpha, version.alpha, paper.alpha),
            _first(tau, self.tau, version.tau, paper.tau),
        )

    def _adapter(self, version: AdapterVersion) -> "AdapterSource":
        """The version, to be fetched and verified when no slot of the engine holds it."""
        from langchain_cope.engine import AdapterSource

        store = self._adapters()
        return AdapterSource(version.name, lambda: store.fetch_dir(version))

    def _engine(self, model: str | None = None) -> "Engine":
        try:
            return super()._engine(model)
        except ModelNotFound as error:
            raise ChatModelNotFound(str(error)) from error

    def _adapters(self) -> AdapterStore:
        return open_store(self.store)

    def _store_url(self) -> str | None:
        return None if self.store is None else open_store(self.store).url

    def _stops(self, stop: list[str] | None) -> list[str]:
        chosen = stop if stop is not None else self.stop
        return [chosen] if isinstance(chosen, str) else list(chosen or [])


class BoundChat(_ChatModelBinding):  # type: ignore[no-redef]
    """A `ChatCoPe` with options or a configuration.

    Unlike core's bindings it keeps them when tools or a schema are bound to it: else the user would be lost on the way.
    """

    bound: ChatCoPe

    def bind_tools(
        self, tools: Sequence[Any], **options: Any
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """See `ChatCoPe.bind_tools`."""
        bound = self.bound.bind_tools(tools, **options)
        assert isinstance(bound, BoundChat)
        return BoundChat(
            bound=self.bound, kwargs={**self.kwargs, **bound.kwargs}, config=self.config
        )

    def with_structured_output(
        self,
        schema: Any = None,
        *,
        method: Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **options: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """See `ChatCoPe.with_structured_output`."""
        return structured_output(self, schema, method, include_raw, options)


def _checked_user(user: str | None) -> str | None:
    if user is not None and (not isinstance(user, str) or not user):
        raise InputError(
            f"user_id must be a string that is not empty, or None for the base alone, not {user!r}"
        )
    return user


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _prompt(base: "Base", messages: Sequence[BaseMessage], use: ToolUse) -> tuple[list[int], str]:
    """(token ids, what of the reply they already hold: the mark of a thought, or nothing)."""
    turns, tools = use.prompt(template_messages(messages), base.reply_format.native_tools)
    ids = base.prompt_ids(turns, tools)
    if not str(base.tokenizer.decode(ids[-16:])).rstrip().endswith(_THOUGHT):
        return ids, ""
    if use.forced:  # what the answer is held to leaves no room for thoughts
        return [*ids, *base.tokenizer.encode(_NO_THOUGHT, add_special_tokens=False)], ""
    return ids, _THOUGHT


def _chunks(piece: "Piece | Completion", call: _Call) -> Iterator[ChatGenerationChunk]:
    """What a piece of text adds to the message; at the end also the empty chunk that carries usage and metadata."""
    from langchain_cope.engine import Piece

    found = call.reply.push(piece.text) if isinstance(piece, Piece) else call.reply.finish()
    yield from (ChatGenerationChunk(message=chunk) for chunk in found)
    if not isinstance(piece, Piece):
        yield _last_chunk(piece, call)


def _last_chunk(answer: "Completion", call: _Call) -> ChatGenerationChunk:
    called = answer.finish_reason == "stop" and call.reply.num_calls
    metadata = {
        **call.metadata,
        "finish_reason": "tool_calls" if called else answer.finish_reason,
        "contrast_changed": answer.contrast_changed,
    }
    if call.request.logprobs:
        metadata["logprobs"] = [
            {
                "token": t.text,
                "log_p_user": t.log_p_user,
                "log_p_base": t.log_p_base,
                "reward": t.reward,
            }
            for t in answer.logprobs
        ]
    read, written = len(call.request.prompt), len(answer.token_ids)
    return ChatGenerationChunk(
        message=AIMessageChunk(
            content="",
            response_metadata=metadata,
            usage_metadata=UsageMetadata(
                input_tokens=read, output_tokens=written, total_tokens=read + written
            ),
            chunk_position="last",
        )
    )
