"""About how short a JSON value of a schema can be. Only an estimate: what can be is the grammar's business."""

import json
from collections.abc import Iterator
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
_DEPTH = 12
_LONGEST = 4000


def shortest_texts(schema: dict[str, Any]) -> Iterator[str]:
    """A short value of ``schema`` and of every schema within it, as JSON text of `_LONGEST` characters at most."""
    known: dict[tuple[int, int], str] = {}
    for part in _within(schema):
        yield _shortest(part, schema, _DEPTH, known)


def _within(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, list):
        for part in schema:
            yield from _within(part)
    elif isinstance(schema, dict):
        yield schema
        for key, part in schema.items():
            if key in _PARTS and isinstance(part, dict):
                yield from _within(list(part.values()))
            elif key not in ("enum", "const", "default", "examples", "required"):
                yield from _within(part)


def _shortest(
    schema: Any, root: dict[str, Any], depth: int, known: dict[tuple[int, int], str]
) -> str:
    key = id(schema), depth
    if key not in known:
        known[key] = _made(schema, root, depth, known)[:_LONGEST]
    return known[key]


def _made(schema: Any, root: dict[str, Any], depth: int, known: dict[tuple[int, int], str]) -> str:
    if not isinstance(schema, dict) or depth == 0:
        return "null"

    def shortest(part: Any) -> str:
        return _shortest(part, root, depth - 1, known)

    if "$ref" in schema:
        return shortest(_resolved(str(schema["$ref"]), root))
    if "const" in schema or schema.get("enum"):
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return min((json.dumps(value, ensure_ascii=False) for value in values), key=len)
    for key in ("anyOf", "oneOf"):
        if schema.get(key):
            return min(map(shortest, schema[key]), key=len)
    kinds = schema.get("type", "object" if "properties" in schema else "null")
    kind = "null" if "null" in kinds else kinds[0] if isinstance(kinds, list) else kinds
    if kind == "object":
        properties = schema.get("properties", {})
        parts = [
            f"{json.dumps(name)}: {shortest(properties.get(name))}"
            for name in schema.get("required", ())
        ]
        return "{" + ", ".join(parts) + "}"
    if kind == "array":
        item = shortest(schema.get("items")) + ", "
        return "[" + item * min(int(schema.get("minItems", 0)), _LONGEST // len(item) + 1) + "]"
    if kind == "string":
        text = _FORMATS.get(
            str(schema.get("format")), "a" * min(int(schema.get("minLength", 0)), _LONGEST)
        )
        return json.dumps(text + "a" * 8 * ("pattern" in schema))
    if kind in ("integer", "number"):
        return max(
            (str(schema[key]) for key in ("minimum", "exclusiveMinimum") if schema.get(key, 0) > 0),
            default="0",
        )
    return "false" if kind == "boolean" else "null"


def _resolved(reference: str, root: dict[str, Any]) -> Any:
    found: Any = root
    for name in reference.removeprefix("#").strip("/").split("/") if reference.strip("#/") else ():
        name = name.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, dict) else None
    return found
