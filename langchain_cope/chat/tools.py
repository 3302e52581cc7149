"""Tools and response formats of a call: what the prompt says of them, and what the answer is held to."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from pydantic import BaseModel
from pydantic.v1 import BaseModel as BaseModelV1

from langchain_cope.chat.messages import without_tool_roles
from langchain_cope.errors import InputError

if TYPE_CHECKING:
    from langchain_cope.engine import Grammar

TOOL_OPTIONS = ("tools", "tool_choice", "parallel_tool_calls", "response_format", "strict")
"""What a call may be given. ``strict`` changes nothing: answers are always held to their schemas."""
_INSTRUCTIONS = """\
You may call tools. To call one, write its name and arguments as JSON between marks, in just this form:
<tool_call>
{"name": "the tool's name", "arguments": {"argument": "value"}}
</tool_call>
What it returns comes back between <tool_response> and </tool_response>. The tools, a JSON object a line:
"""
_JSON_INSTRUCTIONS = (
    "Answer with one JSON value and nothing else. It has to fit this JSON schema:\n"
)


@dataclass(frozen=True)
class ToolUse:
    """Tools and response format of one call."""

    tools: tuple[dict[str, Any], ...] = ()
    """In OpenAI's form; empty where ``tool_choice`` is ``none``."""
    choice: str = "auto"
    """``auto``, ``any`` or a tool's name."""
    several: bool = True
    schema: dict[str, Any] | None = None
    """What a JSON answer has to fit."""
    shows_schema: bool = False
    """The prompt tells it."""

    @classmethod
    def of(cls, options: dict[str, Any]) -> "ToolUse":
        """From a call's keywords, of which it takes `TOOL_OPTIONS`. Raises ``InputError`` for what they cannot mean."""
        tools = tuple(described_tool(tool) for tool in options.get("tools") or ())
        choice = _choice(options.get("tool_choice"), [tool["function"]["name"] for tool in tools])
        several = options.get("parallel_tool_calls")
        schema, shows = _response_schema(options.get("response_format"))
        return cls(() if choice == "none" else tools, choice, several is not False, schema, shows)

    @property
    def forced(self) -> bool:
        """Whether free text is no answer."""
        return self.schema is not None or bool(self.tools and self.choice != "auto")

    def grammar(self) -> "Grammar | None":
        """What the answer is held to; None where nothing is asked, or calls may be made and llguidance is not there to hold them.

        Raises ``InputError`` for schemas that no answer can be held to, by the keyword.
        """
        from langchain_cope.engine import Grammar, can_constrain, closed_schema

        if not self.tools and self.schema is None:
            return None
        if not self.forced and not can_constrain():
            return None
        offered = [tool["function"] for tool in self.tools]
        if self.choice not in ("auto", "any"):
            offered = [function for function in offered if function["name"] == self.choice]
        calls = tuple((function["name"], _closed(function, closed_schema)) for function in offered)
        answer = None if self.schema is None else closed_schema(self.schema)
        return Grammar(calls, self.several, answer, text=not self.forced)

    def prompt(
        self, messages: list[dict[str, Any]], native: bool
    ) -> tuple[list[dict[str, Any]], tuple[dict[str, Any], ...]]:
        """The messages with what has to be said of tools and schema in them, and the tools that the chat template presents."""
        shown = list(messages)
        if self.schema is not None and self.shows_schema:
            shown = _with_system(
                shown, _JSON_INSTRUCTIONS + json.dumps(self.schema, ensure_ascii=False)
            )
        if native:
            return shown, self.tools
        if self.tools:
            lines = "\n".join(
                json.dumps(tool["function"], ensure_ascii=False) for tool in self.tools
            )
            shown = _with_system(shown, _INSTRUCTIONS + lines)
        return without_tool_roles(shown), ()


def described_tool(tool: Any) -> dict[str, Any]:
    """``tool`` in OpenAI's form. Raises ``InputError`` for what is no tool, or a tool without a proper name."""
    try:
        described = convert_to_openai_tool(tool)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"a tool is a function, a class, a LangChain tool or a schema, not {tool!r}: {error}"
        ) from error
    function = described.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if (
        not isinstance(function, dict)
        or not isinstance(name, str)
        or not name.isprintable()
        or not name
    ):
        raise InputError(
            f"a tool needs a name that can be printed, but this is {tool!r}: only functions can be called here"
        )
    if schema := _schema_of_class(tool):  # core's own way loses what refers to itself
        function = {
            **function,
            "parameters": {k: v for k, v in schema.items() if k not in ("title", "description")},
        }
    return {**described, "function": function}


def json_schema(schema: Any) -> dict[str, Any]:
    """The JSON schema of a Pydantic class, a TypedDict, a function in OpenAI's form, or a JSON schema as it is."""
    if found := _schema_of_class(schema):
        return found
    if isinstance(schema, dict) and not ("parameters" in schema or "function" in schema):
        return schema
    try:
        return convert_to_json_schema(schema)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"a schema is a Pydantic class, a TypedDict or a JSON schema, not {schema!r}: {error}"
        ) from error


def _schema_of_class(kind: Any) -> dict[str, Any] | None:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind.model_json_schema()
    if isinstance(kind, type) and issubclass(kind, BaseModelV1):
        return kind.schema()
    return None


def _closed(function: dict[str, Any], closed_schema: Any) -> str:
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    try:
        return str(closed_schema(schema))
    except InputError as error:
        raise InputError(f"tool {function['name']!r}: {error}") from error


def _choice(choice: Any, names: Sequence[str]) -> str:
    """One of ``auto``, ``any``, ``none`` or a name that is among ``names``."""
    if isinstance(choice, dict):
        inner = choice.get("function", choice)
        choice = inner.get("name", choice) if isinstance(inner, dict) else inner
    if choice is None or choice is False:
        return "auto"
    if choice is True or choice == "required":
        choice = "any"
    if choice in ("auto", "none") or choice in names:
        return str(choice)
    if choice == "any":
        if not names:
            raise InputError(
                "tool_choice 'any' was asked for, but no tools were given: bind some with bind_tools"
            )
        return "any"
    raise InputError(
        f"tool_choice must be 'auto', 'any', 'none' or the name of a tool ({', '.join(names) or 'none given'}), not {choice!r}"
    )


def _response_schema(response_format: Any) -> tuple[dict[str, Any] | None, bool]:
    """(schema, whether the prompt shows it) of OpenAI's ``response_format``, or of a schema in any form LangChain takes."""
    if response_format is None or response_format == {"type": "text"}:
        return None, False
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "json_object":
        return {"type": "object"}, False
    if kind == "json_schema" and "json_schema" in response_format:
        inner = response_format["json_schema"]
        schema = inner.get("schema") if isinstance(inner, dict) else None
        if not isinstance(schema, dict):
            raise InputError(
                "response_format of type json_schema needs {'json_schema': {'schema': {…}}}"
            )
        return schema, True
    if isinstance(response_format, (dict, type)):
        return json_schema(response_format), True
    raise InputError(
        f"response_format must be a JSON schema, a Pydantic class or OpenAI's form, not {response_format!r}"
    )


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """``messages`` with ``text`` at the end of the system message, which is made where there is none."""
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
