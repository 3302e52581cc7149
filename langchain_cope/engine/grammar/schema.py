"""What an answer may be: JSON of a schema, calls of tools, or free text in which every call that is begun is valid.

A `Grammar` says it and `constraint.py` holds a request to it. Schemas are made ready here, without torch: what cannot be held to
is refused when it is bound. llguidance (extra ``grammar``) does the parsing.
"""

import importlib.util
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from langchain_cope.errors import InputError

CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"
_LIMIT_INTEGER = 2**53 - 1  # what every reader of JSON takes for the same number
_LIMIT_NUMBER = 1e18
_DATE = (
    "[1-9][0-9]{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_KNOWN_FORMATS = (
    "date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
)  # fmt: skip
_LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,58}[a-zA-Z0-9])?"
_FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "hostname": rf"^{_LABEL}(?:\.{_LABEL}){{0,3}}$",
}
"""Days that there are, no leap seconds, labels and names no longer than allowed: what every reader takes."""
_PARSER_SETTINGS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Grammar:
    """What an answer may be: one of the alternatives named here. Schemas are JSON text, as `closed_schema` makes it."""

    calls: tuple[tuple[str, str], ...] = ()
    """(name, schema of the arguments) of each tool; a call is ``<tool_call>\\n{"name": …, "arguments": …}\\n</tool_call>``."""
    several: bool = True
    """More than one call may be made."""
    answer: str | None = None
    """Schema of a JSON answer."""
    text: bool = False
    """Free text, with calls in it or without. It excludes ``answer``."""


def can_constrain() -> bool:
    """Whether llguidance is installed."""
    return importlib.util.find_spec("llguidance") is not None


def closed_schema(schema: dict[str, Any]) -> str:
    """``schema`` as a grammar takes it, JSON text: objects have no properties but those named, numbers an end.

    What fits the result fits ``schema``. Raises ``InputError`` for keywords that no grammar can hold an answer to, by name.
    """
    if not isinstance(schema, dict):
        raise InputError(f"a JSON schema is an object, not {type(schema).__name__}")
    try:
        return _closed_text(json.dumps(schema))
    except InputError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        what = (
            "is nested too deep"
            if isinstance(error, RecursionError)
            else f"cannot be written as JSON: {error}"
        )
        raise InputError(f"a JSON schema is needed, but this one {what}") from error


@lru_cache(maxsize=256)  # a schema is bound once, and asked for in every call
def _closed_text(schema_text: str) -> str:
    parser = llguidance().LLMatcher
    schema = json.loads(schema_text)
    closed = _closed(schema, closes=not _combines(schema))
    text = json.dumps({**closed, "x-guidance": _PARSER_SETTINGS})
    refused, messages = parser.validate_grammar_with_warnings(parser.grammar_from_json_schema(text))
    if refused:
        raise InputError(
            f"the schema asks for something that answers cannot be held to: {first_line(messages[0])}. "
            "Leave it out of the schema and check it in the answer"
        )
    return text


def llguidance() -> Any:
    """The parser's package. Raises ``InputError`` where it is not installed."""
    try:
        import llguidance as found
    except ImportError as error:
        raise InputError(
            "structured output and forced tool calls need llguidance: pip install 'langchain-cope[grammar]'"
        ) from error
    return found


def _closed(schema: Any, closes: bool) -> Any:
    """``schema`` with ends to its numbers, and if it ``closes`` to its objects, at every depth; formats made plain."""
    if isinstance(schema, list):
        return [_closed(part, closes) for part in schema]
    if not isinstance(schema, dict):
        return schema
    values = ("enum", "const", "default", "examples", "example")  # instances, not schemas
    closed = {
        key: part if key in values else _closed_part(key, part, closes)
        for key, part in schema.items()
    }
    if isinstance(names := closed.get("propertyNames"), dict) and isinstance(
        names.get("enum"), list
    ):
        _spell_out_names(closed, closed.pop("propertyNames")["enum"])
    if closes and "properties" in closed and "patternProperties" not in closed:
        closed.setdefault("additionalProperties", False)
    if "format" in closed and closed["format"] not in _KNOWN_FORMATS:
        del closed["format"]  # JSON Schema takes it for a note
    if "pattern" not in closed and closed.get("format") in _FORMATS:
        closed["pattern"] = _FORMATS[closed["format"]]
    if "enum" not in closed and "const" not in closed:
        types = closed.get("type")
        kinds = types if isinstance(types, list) else [types]
        if "integer" in kinds:
            _bound(closed, -_LIMIT_INTEGER, _LIMIT_INTEGER)
        elif "number" in kinds:
            _bound(closed, -_LIMIT_NUMBER, _LIMIT_NUMBER)
    return closed


def _spell_out_names(schema: dict[str, Any], names: list[Any]) -> None:
    """Properties of these names instead of a rule for names."""
    value = schema.get("additionalProperties", True)
    known = schema.get("properties", {})
    schema["properties"] = {name: known.get(name, value) for name in names if isinstance(name, str)}
    schema["additionalProperties"] = False


def _closed_part(key: str, part: Any, closes: bool) -> Any:
    named = key in ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
    if named and isinstance(part, dict):  # names of the user's own, with a schema each
        return {name: _closed(inner, closes) for name, inner in part.items()}
    return _closed(part, closes)


def _bound(schema: dict[str, Any], low: float, high: float) -> None:
    """Give a number an end on the sides where it has none."""
    least = [schema[key] for key in ("minimum", "exclusiveMinimum") if key in schema]
    most = [schema[key] for key in ("maximum", "exclusiveMaximum") if key in schema]
    if not all(isinstance(value, (int, float)) for value in (*least, *most)):
        return
    if not least and low < min(most, default=0):
        schema["minimum"] = low
    if not most and high > max(least, default=0):
        schema["maximum"] = high


def _combines(schema: Any) -> bool:
    """Whether parts of the schema apply to one object together: to close one of them would shut out the others' properties."""
    if isinstance(schema, list):
        return any(map(_combines, schema))
    if not isinstance(schema, dict):
        return False
    alternatives = "properties" in schema and any(key in schema for key in ("anyOf", "oneOf"))
    if "allOf" in schema or alternatives or ("$ref" in schema and "properties" in schema):
        return True
    return any(map(_combines, schema.values()))


def first_line(text: str) -> str:
    """The part of the parser's message that people read."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
    return line.partition(" Enable '")[0].rstrip(".")
