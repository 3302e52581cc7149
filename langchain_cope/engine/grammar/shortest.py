"""About how short a JSON value of a schema can be: an estimate, for the room kept to close it.

Whether a value is allowed is the grammar's business.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

_FORMATS = {
    "date-time": "2000-01-01T00:00:00Z",
    "date": "2000-01-01",
    "time": "00:00:00Z",
    "duration": "P1D",
    "email": "a@b.co",
    "hostname": "a.co",
    "ipv4": "1.1.1.1",
    "ipv6": "::1",
    "uuid": "00000000-0000-0000-0000-000000000000",
    "uri": "http://a.co",
}
_PARTS = ("properties", "patternProperties", "$defs", "definitions")
_VALUES = ("enum", "const", "default", "examples", "required")
_DEPTH = 12
_LONGEST = 4000
_PATTERN_LENGTH = 8  # characters that a pattern is taken to add

_Cache = dict[tuple[int, int], str]
"""By identity of a schema and depth left."""


def shortest_texts(schema: dict[str, Any]) -> Iterator[str]:
    """Yield a short value of `schema` and of every schema within it.

    Each is JSON text of `_LONGEST` characters at most.
    """
    cache: _Cache = {}
    for part in _within(schema):
        yield _shortest(part, schema, _DEPTH, cache)


def _within(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, list):
        for part in schema:
            yield from _within(part)
    elif isinstance(schema, dict):
        yield schema
        for key, part in schema.items():
            if key in _PARTS and isinstance(part, dict):
                yield from _within(list(part.values()))
            elif key not in _VALUES:
                yield from _within(part)


def _shortest(schema: Any, root: dict[str, Any], depth: int, cache: _Cache) -> str:
    key = id(schema), depth
    if key not in cache:
        cache[key] = _value(schema, root, depth, cache)[:_LONGEST]
    return cache[key]


def _value(schema: Any, root: dict[str, Any], depth: int, cache: _Cache) -> str:
    if not isinstance(schema, dict) or depth == 0:
        return "null"

    def shortest(part: Any) -> str:
        return _shortest(part, root, depth - 1, cache)

    if "$ref" in schema:
        return shortest(_resolve(str(schema["$ref"]), root))
    if "const" in schema:
        return json.dumps(schema["const"], ensure_ascii=False)
    if schema.get("enum"):
        return min((json.dumps(value, ensure_ascii=False) for value in schema["enum"]), key=len)
    for key in ("anyOf", "oneOf"):
        if schema.get(key):
            return min((shortest(part) for part in schema[key]), key=len)
    kind = _kind(schema)
    if kind == "object":
        return _object(schema, shortest)
    if kind == "array":
        return _array(schema, shortest)
    if kind == "string":
        return _string(schema)
    if kind in ("integer", "number"):
        return _number(schema)
    return "false" if kind == "boolean" else "null"


def _kind(schema: dict[str, Any]) -> Any:
    """Return the type of the shortest value."""
    kinds = schema.get("type", "object" if "properties" in schema else "null")
    if "null" in kinds:
        return "null"
    return kinds[0] if isinstance(kinds, list) else kinds


def _object(schema: dict[str, Any], shortest: Callable[[Any], str]) -> str:
    properties = schema.get("properties", {})
    parts = []
    for name in schema.get("required", ()):
        parts.append(f"{json.dumps(name)}: {shortest(properties.get(name))}")
    return "{" + ", ".join(parts) + "}"


def _array(schema: dict[str, Any], shortest: Callable[[Any], str]) -> str:
    item = shortest(schema.get("items")) + ", "
    num_items = min(int(schema.get("minItems", 0)), _LONGEST // len(item) + 1)
    return "[" + item * num_items + "]"


def _string(schema: dict[str, Any]) -> str:
    text = _FORMATS.get(str(schema.get("format")))
    if text is None:
        text = "a" * min(int(schema.get("minLength", 0)), _LONGEST)
    if "pattern" in schema:
        text += "a" * _PATTERN_LENGTH
    return json.dumps(text)


def _number(schema: dict[str, Any]) -> str:
    limits = [schema.get(key, 0) for key in ("minimum", "exclusiveMinimum")]
    return max((str(limit) for limit in limits if limit > 0), default="0")


def _resolve(reference: str, root: dict[str, Any]) -> Any:
    """Return the schema that a reference within `root` names; None where it names nothing."""
    path = reference.removeprefix("#").strip("/")
    schema: Any = root
    for name in path.split("/") if path else ():
        name = name.replace("~1", "/").replace("~0", "~")
        schema = schema.get(name) if isinstance(schema, dict) else None
    return schema
