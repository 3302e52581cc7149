"""Tools and response formats of a call: what the prompt says of them and the answer is held to."""

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from pydantic import BaseModel, PydanticUserError
from pydantic.v1 import BaseModel as BaseModelV1

from langchain_cope.chat.typed_dicts import is_typed_dict, typed_dict_schema
from langchain_cope.engine import Grammar, can_constrain, closed_schema
from langchain_cope.errors import InputError

TOOL_OPTIONS = ("tools", "tool_choice", "parallel_tool_calls", "response_format", "strict")
"""Keywords of a call. `strict` changes nothing: answers are always held to their schemas."""
_TOOL_INSTRUCTIONS = (
    "You may call tools. To call one, write its name and arguments as JSON between marks, "
    "in just this form:\n"
    "<tool_call>\n"
    '{"name": "the tool\'s name", "arguments": {"argument": "value"}}\n'
    "</tool_call>\n"
    "What it returns comes back between <tool_response> and </tool_response>. "
    "The tools, a JSON object a line:\n"
)
_JSON_INSTRUCTIONS = (
    "Answer with one JSON value and nothing else. It has to fit this JSON schema:\n"
)
_NO_SCHEMA = (ValueError, TypeError, KeyError, NameError, PydanticUserError)
"""What is raised for something that has no JSON schema."""


@dataclass(frozen=True)
class ToolUse:
    """Tools and response format of one call."""

    tools: tuple[dict[str, Any], ...] = ()
    """In OpenAI's form; empty where `tool_choice` is `none`."""
    choice: str = "auto"
    """`auto`, `any` or a tool's name."""
    several: bool = True
    """Whether an answer may hold more than one call."""
    schema: dict[str, Any] | None = None
    """What a JSON answer has to fit."""
    shows_schema: bool = False
    """Whether the prompt shows the schema."""

    @classmethod
    def of(cls, options: dict[str, Any]) -> "ToolUse":
        """Return what a call's keywords say, of which it reads `TOOL_OPTIONS`.

        Raises:
            InputError: a value has no meaning as a tool, a choice or a format.
        """
        tools = tuple(described_tool(tool) for tool in options.get("tools") or ())
        choice = _tool_choice(options.get("tool_choice"), [_name(tool) for tool in tools])
        schema, shows_schema = _response_schema(options.get("response_format"))
        return cls(
            tools=() if choice == "none" else tools,
            choice=choice,
            several=options.get("parallel_tool_calls") is not False,
            schema=schema,
            shows_schema=shows_schema,
        )

    @property
    def forced(self) -> bool:
        """Whether free text is no valid answer."""
        return self.schema is not None or bool(self.tools and self.choice != "auto")

    def grammar(self) -> Grammar | None:
        """Return what the answer is held to.

        None where nothing is asked of it, or calls are optional and llguidance is not installed.

        Raises:
            InputError: no answer can be held to a schema; the message names the schema's keyword.
        """
        if not self.tools and self.schema is None:
            return None
        if not self.forced and not can_constrain():
            return None
        functions = [tool["function"] for tool in self.tools]
        if self.choice not in ("auto", "any"):
            functions = [function for function in functions if function["name"] == self.choice]
        return Grammar(
            calls=tuple((function["name"], _arguments(function)) for function in functions),
            several=self.several,
            answer=None if self.schema is None else closed_schema(self.schema),
            text=not self.forced,
        )

    def instructions(self, *, native_tools: bool) -> list[str]:
        """Return what the prompt has to say of the schema, and of tools where no template does.

        `native_tools` says that the base's chat template presents the tools itself.
        """
        texts = []
        if self.schema is not None and self.shows_schema:
            texts.append(_JSON_INSTRUCTIONS + _json(self.schema))
        if self.tools and not native_tools:
            lines = [_json(tool["function"]) for tool in self.tools]
            texts.append(_TOOL_INSTRUCTIONS + "\n".join(lines))
        return texts


def described_tool(tool: Any) -> dict[str, Any]:
    """Return `tool` in OpenAI's form. Raises InputError if it is no tool or has no proper name."""
    try:
        schema = _schema_of_class(tool)
        if is_typed_dict(tool):
            described = _described(tool.__name__, inspect.cleandoc(tool.__doc__ or ""))
        else:
            described = convert_to_openai_tool(tool)
    except (*_NO_SCHEMA, AttributeError) as error:
        raise InputError(
            f"a tool is a function, a class, a LangChain tool or a schema, not {tool!r}: {error}"
        ) from error
    function = described.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    is_named = isinstance(name, str) and name != "" and name.isprintable()
    if not isinstance(function, dict) or not is_named:
        raise InputError(
            f"a tool needs a name that can be printed, but this is {tool!r}: "
            "only functions can be called here"
        )
    if schema is not None:  # LangChain's own conversion loses schemas that refer to themselves
        parameters = {
            key: value for key, value in schema.items() if key not in ("title", "description")
        }
        function = {**function, "parameters": parameters}
    return {**described, "function": function}


def json_schema(schema: Any) -> dict[str, Any]:
    """Return the JSON schema of a Pydantic class, a TypedDict or a function in OpenAI's form.

    A JSON schema is returned as it is. Raises InputError for anything else.
    """
    if isinstance(schema, dict) and "parameters" not in schema and "function" not in schema:
        return schema
    try:
        return _schema_of_class(schema) or convert_to_json_schema(schema)
    except _NO_SCHEMA as error:
        raise InputError(
            f"a schema is a Pydantic class, a TypedDict or a JSON schema, not {schema!r}: {error}"
        ) from error


def _schema_of_class(kind: Any) -> dict[str, Any] | None:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind.model_json_schema()
    if isinstance(kind, type) and issubclass(kind, BaseModelV1):
        return kind.schema()
    return typed_dict_schema(kind) if is_typed_dict(kind) else None


def _described(name: str, description: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": description}}


def _name(tool: dict[str, Any]) -> str:
    return str(tool["function"]["name"])


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)


def _arguments(function: dict[str, Any]) -> str:
    """Return the schema of a function's arguments as a grammar takes it."""
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    try:
        return closed_schema(schema)
    except InputError as error:
        raise InputError(f"tool {function['name']!r}: {error}") from error


def _tool_choice(choice: Any, names: Sequence[str]) -> str:
    """Return `auto`, `any`, `none` or one of `names`."""
    if isinstance(choice, dict):
        function = choice.get("function", choice)
        choice = function.get("name", choice) if isinstance(function, dict) else function
    if choice is None or choice is False:
        return "auto"
    if choice is True or choice == "required":
        choice = "any"
    if choice in ("auto", "none") or choice in names:
        return str(choice)
    if choice == "any" and names:
        return "any"
    if choice == "any":
        raise InputError(
            "tool_choice 'any' was asked for, but no tools were given: bind some with bind_tools"
        )
    raise InputError(
        "tool_choice must be 'auto', 'any', 'none' or the name of a tool "
        f"({', '.join(names) or 'none given'}), not {choice!r}"
    )


def _response_schema(response_format: Any) -> tuple[dict[str, Any] | None, bool]:
    """Return (schema, whether the prompt shows it) of a call's `response_format`.

    It is OpenAI's form, or a schema in any form that LangChain takes.
    """
    if response_format is None or response_format == {"type": "text"}:
        return None, False
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "json_object":
        return {"type": "object"}, False
    if kind == "json_schema" and "json_schema" in response_format:
        described = response_format["json_schema"]
        schema = described.get("schema") if isinstance(described, dict) else None
        if not isinstance(schema, dict):
            raise InputError(
                "response_format of type json_schema needs {'json_schema': {'schema': {…}}}"
            )
        return schema, True
    if isinstance(response_format, (dict, type)):
        return json_schema(response_format), True
    raise InputError(
        "response_format must be a JSON schema, a Pydantic class or OpenAI's form, "
        f"not {response_format!r}"
    )
