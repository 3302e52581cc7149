"""`with_structured_output` for ChatCoPe: answers as objects."""

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Literal

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import BaseMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableConfig, RunnableGenerator
from langchain_core.runnables.utils import AddableDict
from langchain_core.utils.pydantic import is_basemodel_subclass

from langchain_cope.chat.tools import described_tool, json_schema
from langchain_cope.engine import closed_schema
from langchain_cope.errors import InputError

Method = Literal["json_schema", "function_calling", "json_mode"]
_METHODS = ("json_schema", "function_calling", "json_mode")


def structured_output(
    model: Any, schema: Any, method: str, include_raw: bool, unknown: Mapping[str, Any]
) -> Runnable[LanguageModelInput, Any]:
    """Return `model` bound to `schema`, followed by what makes an object of its answer.

    Args:
        model: a chat model or a binding of one.
        schema: a Pydantic class, a TypedDict or a JSON schema; None for `json_mode` alone.
        method: one of `Method`.
        include_raw: whether message, object and error come as a dict, instead of the object.
        unknown: further options, which are refused.

    Raises:
        InputError: for `unknown` options, another method, and a schema that is missing or that no
            answer can be held to.
    """
    _check(schema, method, unknown)
    described = {"ls_structured_output_format": {"kwargs": {"method": method}, "schema": schema}}
    is_class = isinstance(schema, type) and is_basemodel_subclass(schema)
    parser: Any
    if method == "function_calling":
        name = described_tool(schema)["function"]["name"]
        bound = model.bind_tools([schema], tool_choice=name, parallel_tool_calls=False, **described)
        if is_class:
            parser = PydanticToolsParser(tools=[schema], first_tool_only=True)
        else:
            parser = JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
    else:
        bound = model.bind(response_format=_response_format(schema), **described)
        parser = PydanticOutputParser(pydantic_object=schema) if is_class else JsonOutputParser()
    parser = RunnableGenerator(_refuse_cut, _arefuse_cut) | parser
    return _with_raw(bound, parser) if include_raw else bound | parser


def _check(schema: Any, method: str, unknown: Mapping[str, Any]) -> None:
    if unknown:
        raise InputError(
            f"with_structured_output has no option {', '.join(sorted(unknown))}; "
            "it takes schema, method, include_raw and strict"
        )
    if method not in _METHODS:
        raise InputError(f"method must be one of {', '.join(_METHODS)}, not {method!r}")
    if schema is None and method != "json_mode":
        raise InputError(
            f"method {method!r} needs a schema: a Pydantic class, a TypedDict or a JSON schema"
        )


def _response_format(schema: Any) -> dict[str, Any]:
    if schema is None:
        return {"type": "json_object"}
    described = json_schema(schema)
    closed_schema(described)  # refuses a schema that cannot be held to now, not at the first call
    named = {"name": described.get("title", "answer"), "schema": described}
    return {"type": "json_schema", "json_schema": named}


def _with_raw(
    bound: Runnable[Any, Any], parser: Runnable[Any, Any]
) -> Runnable[LanguageModelInput, Any]:
    """Return a chain to a dict of `raw` (the message), `parsed` and `parsing_error`.

    The message comes piece by piece. Core's `RunnableMap` and fallbacks would drop a call's
    options, and raise in streams.
    """

    def with_object(
        messages: Iterator[BaseMessage], config: RunnableConfig
    ) -> Iterator[dict[str, Any]]:
        whole: Any = None
        for message in messages:
            whole = message if whole is None else whole + message
            yield AddableDict(raw=message)
        try:
            yield AddableDict(parsed=parser.invoke(whole, config), parsing_error=None)
        except Exception as error:
            yield AddableDict(parsed=None, parsing_error=error)

    async def awith_object(
        messages: AsyncIterator[BaseMessage], config: RunnableConfig
    ) -> AsyncIterator[dict[str, Any]]:
        whole: Any = None
        async for message in messages:
            whole = message if whole is None else whole + message
            yield AddableDict(raw=message)
        try:
            yield AddableDict(parsed=await parser.ainvoke(whole, config), parsing_error=None)
        except Exception as error:
            yield AddableDict(parsed=None, parsing_error=error)

    return bound | RunnableGenerator(with_object, awith_object)  # type: ignore[arg-type]


def _refuse_cut(messages: Iterator[BaseMessage]) -> Iterator[BaseMessage]:
    """Pass on an answer, whole or in chunks, and raise at its end if the token budget ended it."""
    text = ""
    for message in messages:
        yield message
        text += str(message.text)
        _check_whole(message, text)


async def _arefuse_cut(messages: AsyncIterator[BaseMessage]) -> AsyncIterator[BaseMessage]:
    """Do as `_refuse_cut` for an event loop."""
    text = ""
    async for message in messages:
        yield message
        text += str(message.text)
        _check_whole(message, text)


def _check_whole(message: BaseMessage, text: str) -> None:
    """Raise OutputParserException if `message` says that the budget ended the answer `text`."""
    if message.response_metadata.get("finish_reason") == "length":
        raise OutputParserException(
            "the answer was cut at max_tokens before it was whole: "
            "raise max_tokens or ask for less",
            llm_output=text,
        )
