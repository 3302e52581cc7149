"""What a chat becomes when options, a configuration, tools, fields or other models are bound to it.

Core's own bindings let go of what they hold when a second thing is bound: the tools reach the model
below, and the user that a configuration names is lost without a word. Those made here keep it, in
whatever order they are made. `BindsTools` is what makes them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import _ChatModelBinding
from langchain_core.messages import AIMessage
from langchain_core.outputs import LLMResult
from langchain_core.runnables import Runnable, RunnableConfig, RunnableWithFallbacks, ensure_config
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.config import (
    get_config_list,
    merge_configs,
    patch_config,
    set_config_context,
)
from langchain_core.runnables.configurable import (
    DynamicRunnable,
    RunnableConfigurableAlternatives,
    RunnableConfigurableFields,
)
from langchain_core.runnables.utils import (
    AnyConfigurableField,
    ConfigurableField,
    coro_with_context,
)
from langchain_core.tools import BaseTool

from langchain_cope.chat.structured_output import Method, structured_output
from langchain_cope.chat.tools import ToolUse, described_tool

Chat = Runnable[LanguageModelInput, AIMessage]
MOST_AT_ONCE = 256
"""Calls of one batch that wait for the engine at the same time, where no `max_concurrency` says."""
_OPTIONS_OF_GENERATE = ("callbacks", "tags", "metadata", "run_name", "run_id")
# `generate` takes these parts of a configuration as options.


class TakesTools(Chat):
    """A chat that tools and schemas are bound to as options, so that it keeps all that it is."""

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Chat:
        """Return the model with tools that it may call.

        Calls are valid with any weights; under `auto` every call that is begun is. What the token
        budget cuts off is in `invalid_tool_calls`.

        Args:
            tools: functions, Pydantic classes, TypedDicts, JSON schemas or LangChain tools.
            tool_choice: `auto` (or None), `any` (or `required`, True), `none`, or a tool's name.
            parallel_tool_calls: False: one call at most.
            strict: changes nothing; calls are always held to their schemas.
            kwargs: further options of a call.

        Raises:
            InputError: no answer can be held to a schema; the message names the schema's keyword.
        """
        options: dict[str, Any] = {"tools": [described_tool(tool) for tool in tools]}
        if tool_choice is not None:
            options["tool_choice"] = tool_choice
        if parallel_tool_calls is not None:
            options["parallel_tool_calls"] = parallel_tool_calls
        ToolUse.of({**options, **kwargs}).grammar()
        return self.bind(**options, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Return a chain that answers with objects of `schema`.

        Every answer that is not cut at `max_tokens` fits the schema, with any weights. For one that
        was cut the chain raises core's `OutputParserException`.

        Args:
            schema: a Pydantic class, a TypedDict or a JSON schema; None for `json_mode` alone.
            method: `json_schema`: the answer; `function_calling`: arguments of a call;
                `json_mode`: any object.
            include_raw: give a dict of `raw` (the message), `parsed` and `parsing_error`.
            strict: changes nothing; answers are always held to their schema.
            kwargs: none; they are refused by name.

        Raises:
            InputError: no answer can be held to the schema; the message names the schema's keyword.
        """
        return structured_output(self, schema, method, include_raw, kwargs)

    def configurable_fields(self, **fields: AnyConfigurableField) -> "ConfigurableChat":
        """Return the model with fields that a configuration can set, also once tools are bound."""
        core = super().configurable_fields(**fields)  # type: ignore[misc]
        return ConfigurableChat(**_fields(core))


class Joins(Chat):
    """A chat that other models can be joined to: fallbacks and alternatives."""

    def with_fallbacks(self, fallbacks: Sequence[Chat], **options: Any) -> "ChatWithFallbacks":
        """Return the model with others that answer when it fails; options as in core."""
        core = super().with_fallbacks(fallbacks, **options)
        return ChatWithFallbacks(**_fields(core))

    def configurable_alternatives(
        self, which: ConfigurableField, **alternatives: Any
    ) -> "ChatAlternatives":
        """Return the model with others that a configuration can choose; options as in core."""
        core = super().configurable_alternatives(which, **alternatives)  # type: ignore[misc]
        return ChatAlternatives(**_fields(core))


class Binds(Joins):
    """A chat that becomes a binding of this module, where core would make one of its own."""

    def _binding(self) -> "BoundOptions":
        return BoundOptions(bound=self)

    def bind(self, **kwargs: Any) -> "BoundOptions":
        """Return the model with these options in every call, also after tools are bound to it."""
        return cast(BoundOptions, self._binding().bind(**kwargs))

    def with_config(self, config: RunnableConfig | None = None, **kwargs: Any) -> "BoundOptions":
        """Return the model with this configuration in every call; see `bind`."""
        return self._binding().with_config(config, **kwargs)

    def with_types(self, **types: Any) -> "BoundOptions":
        """Return the model with other types of input and output; see `bind`."""
        return cast(BoundOptions, self._binding().with_types(**types))

    def with_listeners(self, **listeners: Any) -> "BoundOptions":
        """Return the model with listeners to its runs; see `bind`."""
        return cast(BoundOptions, self._binding().with_listeners(**listeners))

    def with_alisteners(self, **listeners: Any) -> "BoundOptions":
        """Return the model with asynchronous listeners to its runs; see `bind`."""
        return self._binding().with_alisteners(**listeners)


class Together(Chat):
    """A chat whose batches reach the engine together, which decodes them in the same steps."""

    def batch(
        self, inputs: list[LanguageModelInput], config: Any = None, **options: Any
    ) -> list[AIMessage]:
        """Answer all of `inputs` together, `max_concurrency` at a time if it is given."""
        return super().batch(inputs, _together(config, len(inputs)), **options)

    def batch_as_completed(
        self, inputs: Sequence[LanguageModelInput], config: Any = None, **options: Any
    ) -> Iterator[tuple[int, Any]]:
        """Do as `batch`, each answer with its place among `inputs` when it is there."""
        yield from super().batch_as_completed(inputs, _together(config, len(inputs)), **options)


def _together(config: Any, number: int) -> list[RunnableConfig]:
    """Return the configurations of a batch with room for all, up to `MOST_AT_ONCE`."""
    configs = get_config_list(config, number)
    room = max(1, min(number, MOST_AT_ONCE))
    return [
        patch_config(each, max_concurrency=each.get("max_concurrency") or room) for each in configs
    ]


class BindsTools(TakesTools, Binds, Together):
    """A chat that keeps its user, options and fields through all that can be bound to it."""

    def _binding(self) -> "BoundChat":
        return BoundChat(bound=self)


class Written(Chat):
    """A wrapper around a chat, written out as what it is: core's would lose what it holds."""

    @classmethod
    def lc_id(cls) -> list[str]:
        """Return where its class is found when it is read back."""
        return [*cls.__module__.split("."), cls.__name__]


class Generates(Written):
    """A wrapper around a chat: `generate` and its siblings heed what it holds."""

    def generate(
        self, messages: Any, stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        """Do as `ChatCoPe.generate`, with what is bound here."""
        chat, config, options = _settled(self, stop, callbacks, kwargs)
        with set_config_context(config) as context:  # where the model looks for its user
            return cast(LLMResult, context.run(chat.generate, messages, **options))

    async def agenerate(
        self, messages: Any, stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        """Do as `ChatCoPe.agenerate`, with what is bound here."""
        chat, config, options = _settled(self, stop, callbacks, kwargs)
        with set_config_context(config) as context:
            answers = coro_with_context(chat.agenerate(messages, **options), context)
            return cast(LLMResult, await answers)

    def generate_prompt(
        self, prompts: Any, stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        """Do as `generate`, of prompts."""
        messages = [prompt.to_messages() for prompt in prompts]
        return self.generate(messages, stop, callbacks, **kwargs)

    async def agenerate_prompt(
        self, prompts: Any, stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        """Do as `agenerate`, of prompts."""
        messages = [prompt.to_messages() for prompt in prompts]
        return await self.agenerate(messages, stop, callbacks, **kwargs)

    def get_num_tokens_from_messages(self, messages: Any, tools: Any = None) -> int:
        """Return how many tokens the prompt has, with the tools that are bound here."""
        chat, _, options = _settled(self, None, None, {})
        number = chat.get_num_tokens_from_messages(messages, tools or options.get("tools"))
        return cast(int, number)


def _settled(
    chat: Any, stop: list[str] | None, callbacks: Any, kwargs: dict[str, Any]
) -> tuple[Any, RunnableConfig, dict[str, Any]]:
    """Return (the model below `chat`, the configuration of its call, the options of its call)."""
    options = kwargs if stop is None else {**kwargs, "stop": stop}
    config: RunnableConfig = {} if callbacks is None else {"callbacks": callbacks}
    while True:
        if isinstance(chat, RunnableBindingBase):
            config, options = chat._merge_configs(config), {**chat.kwargs, **options}
            chat = chat.bound
        elif isinstance(chat, DynamicRunnable):
            chat, config = chat.prepare(config)
        elif isinstance(chat, RunnableWithFallbacks):
            chat = chat.runnable
        else:
            break
    config = ensure_config(config)
    of_config: dict[str, Any] = {
        name: value for name, value in config.items() if value and name in _OPTIONS_OF_GENERATE
    }
    return chat, config, {**of_config, **options}


class BoundOptions(Generates, Joins, _ChatModelBinding):  # type: ignore[no-redef]
    """Options and a configuration, around whatever becomes of the model below.

    Raises AttributeError for tools where the model below takes none, like core.
    """

    def with_config(self, config: RunnableConfig | None = None, **kwargs: Any) -> "BoundOptions":
        """Return the model with this configuration as well: the users that the first named stay."""
        merged = merge_configs(self.config, config, cast(RunnableConfig, kwargs))
        return self._around(self.bound, config=merged)

    def with_alisteners(self, **listeners: Any) -> "BoundOptions":
        """Return the model with asynchronous listeners to its runs."""
        [factory] = super().with_alisteners(**listeners).config_factories  # type: ignore[attr-defined]
        return self._around(self.bound, config_factories=[factory, *self.config_factories])

    def bind_tools(self, tools: Sequence[Any], **options: Any) -> Chat:
        """Return this around the model below with tools."""
        return self._around(cast(Any, self.bound).bind_tools(tools, **options))

    def with_structured_output(
        self, schema: Any = None, **options: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """Return this around the model below with a schema."""
        return self._around(cast(Any, self.bound).with_structured_output(schema, **options))

    def _around(self, bound: Any, **changes: Any) -> "BoundOptions":
        return type(self)(**{**_fields(self), "bound": bound, **changes})


class BoundChat(TakesTools, BoundOptions):  # type: ignore[no-redef]
    """A chat with options or a configuration, which tools and schemas join."""


class PreparesChat(Generates, DynamicRunnable):  # type: ignore[type-arg]
    """A chat that is settled by the configuration of a call."""

    def stream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Do as `ChatCoPe.stream_events`."""
        chat, config = self.prepare(config)
        return chat.stream_events(input, config, **kwargs)

    def astream_events(
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Any:
        """Do as `ChatCoPe.astream_events`."""
        chat, config = self.prepare(config)
        return chat.astream_events(input, config, **kwargs)


class ConfigurableChat(PreparesChat, BindsTools, RunnableConfigurableFields):  # type: ignore[type-arg]
    """A chat with fields that the configuration of a call can set."""

    def _prepare(self, config: RunnableConfig | None = None) -> tuple[Chat, RunnableConfig]:
        """Return (the chat as it is configured, the configuration)."""
        chat: Any
        chat, config = super()._prepare(config)
        if chat is not self.default:  # core makes it of the fields alone: closed is closed
            chat.__pydantic_private__ = self.default.__pydantic_private__
        return chat, config


class ChatAlternatives(PreparesChat, Binds, Together, RunnableConfigurableAlternatives):  # type: ignore[type-arg]
    """Chats of which the configuration of a call chooses one. Tools are bound to each of them."""

    def bind_tools(self, tools: Sequence[Any], **options: Any) -> Chat:
        """Return the alternatives, each with tools as it takes them."""
        return self._each(lambda chat: chat.bind_tools(tools, **options))

    def with_structured_output(
        self, schema: Any = None, **options: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """Return the alternatives, each with a schema as it takes it."""
        return self._each(lambda chat: chat.with_structured_output(schema, **options))

    def _each(self, changed: Callable[[Any], Any]) -> "ChatAlternatives":
        others = {
            key: changed(chat) if isinstance(chat, Runnable) else _later(chat, changed)
            for key, chat in self.alternatives.items()
        }
        return ChatAlternatives(
            **{**_fields(self), "default": changed(self.default), "alternatives": others}
        )


def _later(make: Callable[[], Any], changed: Callable[[Any], Any]) -> Callable[[], Any]:
    return lambda: changed(make())


class ChatWithFallbacks(Written, Binds, RunnableWithFallbacks):  # type: ignore[type-arg]
    """A chat with others that answer when it fails. Core binds tools to each of them."""


def _fields(runnable: Any) -> dict[str, Any]:
    return {name: getattr(runnable, name) for name in type(runnable).model_fields}
