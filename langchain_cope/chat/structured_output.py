"""``with_structured_output`` for ChatCoPe: answers as objects."""

from collections.abc import AsyncIterator, Iterator, Mapping
from operator import itemgetter
from typing import Any, Literal

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import BaseMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableGenerator, RunnableMap, RunnablePassthrough
from langchain_core.utils.pydantic import is_basemodel_subclass

from langchain_cope.chat.tools import described_tool, json_schema
from langchain_cope.errors import InputError

Method = Literal["json_schema", "function_calling", "json_mode"]
_METHODS = ("json_schema", "function_calling", "json_mode")


def structured_output(
    model: Any, schema: Any, method: str, include_raw: bool, unknown: Mapping[str, Any]
) -> Runnable[LanguageModelInput, Any]:
    """``model``, a chat model or a binding of one, bound to ``schema`` and followed by what makes an object of its answer.

    Raises ``InputError`` for ``unknown`` options, a method that there is not, and a schema that is missing or cannot be held to.
    """
    if unknown:
        raise InputError(f"with_structured_output knows no option {', '.join(sorted(unknown))}")
    if method not in _METHODS:
        raise InputError(f"method must be one of {', '.join(_METHODS)}, not {method!r}")
    if schema is None and method != "json_mode":
        raise InputError(
            f"method {method!r} needs a schema: a Pydantic class, a TypedDict or a JSON schema"
        )
    described = {"ls_structured_output_format": {"kwargs": {"method": method}, "schema": schema}}
    is_class = isinstance(schema, type) and is_basemodel_subclass(schema)
    parser: Any
    bound: Any
    if method == "function_calling":
        name = described_tool(schema)["function"]["name"]
        bound = model.bind_tools([schema], tool_choice=name, parallel_tool_calls=False, **described)
        parser = (
            PydanticToolsParser(tools=[schema], first_tool_only=True)
            if is_class
            else JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
        )
    else:
        bound = model.bind(response_format=_response_format(schema), **described)
        parser = PydanticOutputParser(pydantic_object=schema) if is_class else JsonOutputParser()
    parser = RunnableGenerator(_refuse_cut, _arefuse_cut) | parser
    return _with_raw(bound, parser) if include_raw else bound | parser


def _response_format(schema: Any) -> dict[str, Any]:
    if schema is None:
        return {"type": "json_object"}
    described = json_schema(schema)
    from langchain_cope.engine import closed_schema

    closed_schema(
        described
    )  # refuses, now and not at the first call, what no answer can be held to
    return {
        "type": "json_schema",
        "json_schema": {"name": described.get("title", "answer"), "schema": described},
    }


def _with_raw(
    bound: Runnable[Any, Any], parser: Runnable[Any, Any]
) -> Runnable[LanguageModelInput, Any]:
    parsed = RunnablePassthrough.assign(
        parsed=itemgetter("raw") | parser, parsing_error=lambda _: None
    )
    unparsed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=bound) | parsed.with_fallbacks([unparsed], exception_key="parsing_error")


def _refuse_cut(messages: Iterator[BaseMessage]) -> Iterator[BaseMessage]:
    """Pass on an answer, whole or in chunks, and raise at its end where the budget ended it."""
    text = ""
    for message in messages:
        yield message
        text = _checked(message, text)


async def _arefuse_cut(messages: AsyncIterator[BaseMessage]) -> AsyncIterator[BaseMessage]:
    """`_refuse_cut` for an event loop."""
    text = ""
    async for message in messages:
        yield message
        text = _checked(message, text)


def _checked(message: BaseMessage, text: str) -> str:
    text += str(message.text)
    if message.response_metadata.get("finish_reason") == "length":
        raise OutputParserException(
            "the answer was cut at max_tokens before it was whole: raise max_tokens or ask for less",
            llm_output=text,
        )
    return text
