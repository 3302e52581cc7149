"""What an answer may be: JSON of a schema, calls of tools, or free text with valid calls in it.

A `Grammar` says it and `constraint.py` keeps a request to it. Schemas are prepared here, without
torch: one that no answer can be constrained to is refused when it is bound. llguidance (extra
`grammar`) does the parsing.
"""

import importlib.util
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from langchain_cope.engine.grammar.patterns import MOST_PATTERNS, most_patterns
from langchain_cope.errors import InputError

CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"
"""Marks of a call in the text of an answer."""
_DATE = (
    "[1-9][0-9]{3}-(?:"
    "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    "|(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)-02-29"
)
_TIME = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
    r"(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_KNOWN_FORMATS = (
    "date-time",
    "date",
    "time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uuid",
    "uri",
)
_LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_LONGEST_HOSTNAME = 253
_FORMATS = {
    "date": f"^(?:{_DATE})$",
    "time": f"^{_TIME}$",
    "date-time": f"^(?:{_DATE})T{_TIME}$",
    "hostname": rf"^{_LABEL}(?:\.{_LABEL})*$",
}
"""Real days, no leap seconds, labels and names of an allowed length: what every reader takes."""
_PARSER_SETTINGS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_VALUES = ("enum", "const", "default", "examples", "example")
"""Keywords that hold instances, not schemas."""
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords that hold names of the user's own, each with a schema."""


@dataclass(frozen=True)
class Grammar:
    """What an answer may be: one of the alternatives named here.

    Schemas are JSON text, as `closed_schema` makes it.
    """

    calls: tuple[tuple[str, str], ...] = ()
    """(name, schema of the arguments) of each tool.

    A call is `<tool_call>\\n{"name": …, "arguments": …}\\n</tool_call>`.
    """
    several: bool = True
    """Whether more than one call may be made."""
    answer: str | None = None
    """Schema of a JSON answer."""
    text: bool = False
    """Whether the answer is free text, with calls in it or without. It excludes `answer`."""


def can_constrain() -> bool:
    """Return whether llguidance is installed."""
    return importlib.util.find_spec("llguidance") is not None


def closed_schema(schema: dict[str, Any]) -> str:
    """Return `schema` as a grammar takes it, as JSON text.

    Objects get no properties but those named. What fits the result fits `schema`.

    Raises:
        InputError: it is not a JSON schema, or no grammar can constrain an answer to a keyword of
            it, which the message names.
    """
    if not isinstance(schema, dict):
        raise InputError(f"a JSON schema is an object, not {type(schema).__name__}")
    try:
        return _closed_text(json.dumps(schema))
    except InputError:
        raise
    except RecursionError as error:
        raise InputError("a JSON schema is needed, but this one is nested too deep") from error
    except (TypeError, ValueError) as error:
        raise InputError(
            f"a JSON schema is needed, but this one cannot be written as JSON: {error}"
        ) from error


@lru_cache(maxsize=256)  # a schema is bound once, and asked for in every call
def _closed_text(schema_text: str) -> str:
    parser = llguidance().LLMatcher
    schema = json.loads(schema_text)
    if (number := most_patterns(schema)) > MOST_PATTERNS:
        raise InputError(
            f"one text in the schema has to fit {number} patterns and formats at a time; at most "
            f"{MOST_PATTERNS} can be combined: leave the others out and check them in the answer"
        )
    closed = _close(schema, closes=not _combines(schema))
    text = json.dumps({**closed, "x-guidance": _PARSER_SETTINGS})
    refused, messages = parser.validate_grammar_with_warnings(parser.grammar_from_json_schema(text))
    if refused:
        raise InputError(
            "the schema asks for something that answers cannot be constrained to: "
            f"{first_line(messages[0])}. Leave it out of the schema and check it in the answer"
        )
    return text


def llguidance() -> Any:
    """Return the parser's package. Raises InputError where it is not installed."""
    try:
        import llguidance as package
    except ImportError as error:
        raise InputError(
            "structured output and forced tool calls need llguidance: "
            "pip install 'langchain-cope[grammar]'"
        ) from error
    return package


def _close(schema: Any, closes: bool) -> Any:
    """Return `schema` prepared, at every depth; objects are closed only if it `closes`."""
    if isinstance(schema, list):
        return [_close(part, closes) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if isinstance(schema.get("nullable"), bool):  # OpenAPI's word, which JSON Schema ignores
        value = {key: part for key, part in schema.items() if key != "nullable"}
        nullable = {"anyOf": [value, {"type": "null"}]}
        return _close(nullable if schema["nullable"] else value, closes)
    closed = {key: _close_part(key, part, closes) for key, part in schema.items()}
    _spell_out_names(closed)
    if closes and "properties" in closed and "patternProperties" not in closed:
        closed.setdefault("additionalProperties", False)
    _explain_format(closed)
    return closed


def _close_part(key: str, part: Any, closes: bool) -> Any:
    if key in _VALUES:
        return part
    if key in _NAMED_SCHEMAS and isinstance(part, dict):
        return {name: _close(inner, closes) for name, inner in part.items()}
    return _close(part, closes)


def _spell_out_names(schema: dict[str, Any]) -> None:
    """Turn a rule that enumerates names into properties of these names."""
    rule = schema.get("propertyNames")
    if not (isinstance(rule, dict) and isinstance(rule.get("enum"), list)):
        return
    del schema["propertyNames"]
    value = schema.get("additionalProperties", True)
    known = schema.get("properties", {})
    names = [name for name in rule["enum"] if isinstance(name, str)]
    schema["properties"] = {name: known.get(name, value) for name in names}
    schema["additionalProperties"] = False


def _explain_format(schema: dict[str, Any]) -> None:
    """Drop an unknown format, which JSON Schema takes for a note; give some a pattern."""
    if "format" in schema and schema["format"] not in _KNOWN_FORMATS:
        del schema["format"]
    if "pattern" not in schema and schema.get("format") in _FORMATS:
        schema["pattern"] = _FORMATS[schema["format"]]
        if schema["format"] == "hostname":
            schema.setdefault("maxLength", _LONGEST_HOSTNAME)


def _combines(schema: Any) -> bool:
    """Return whether parts of the schema apply to one object together.

    To close one of them would then shut out the properties of the others.
    """
    if isinstance(schema, list):
        return any(_combines(part) for part in schema)
    if not isinstance(schema, dict):
        return False
    if "allOf" in schema:
        return True
    if "properties" in schema and any(key in schema for key in ("anyOf", "oneOf", "$ref")):
        return True
    return any(_combines(part) for part in schema.values())


def first_line(text: str) -> str:
    """Return the part of a message of the parser that people read."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[0] if lines else "no reason given"
    return line.partition(" Enable '")[0].rstrip(".")
