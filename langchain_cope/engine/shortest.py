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


def shortest_texts(schema: dict[str, Any]) -> Iterator[str]:
    """A short value of ``schema`` and of every schema within it, as JSON text."""
    for part in _within(schema):
        yield _shortest(part, schema, _DEPTH)


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


def _shortest(schema: Any, root: dict[str, Any], depth: int) -> str:
    if not isinstance(schema, dict) or depth == 0:
        return "null"
    if "$ref" in schema:
        return _shortest(_resolved(str(schema["$ref"]), root), root, depth - 1)
    if "const" in schema or schema.get("enum"):
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return min((json.dumps(value, ensure_ascii=False) for value in values), key=len)
    for key in ("anyOf", "oneOf"):
        if schema.get(key):
            return min((_shortest(part, root, depth - 1) for part in schema[key]), key=len)
    kinds = schema.get("type", "object" if "properties" in schema else "null")
    kind = "null" if "null" in kinds else kinds[0] if isinstance(kinds, list) else kinds
    if kind == "object":
        properties = schema.get("properties", {})
        parts = [
            f"{json.dumps(name)}: {_shortest(properties.get(name), root, depth - 1)}"
            for name in schema.get("required", ())
        ]
        return "{" + ", ".join(parts) + "}"
    if kind == "array":
        items = [schema.get("items")] * min(int(schema.get("minItems", 0)), 64)
        return "[" + ", ".join(_shortest(item, root, depth - 1) for item in items) + "]"
    if kind == "string":
        text = _FORMATS.get(str(schema.get("format")), "a" * min(int(schema.get("minLength", 0)), 256))
        return json.dumps(text + "a" * 8 * ("pattern" in schema))
    if kind in ("integer", "number"):
        return max((str(schema[key]) for key in ("minimum", "exclusiveMinimum") if schema.get(key, 0) > 0), default="0")
    return "false" if kind == "boolean" else "null"


def _resolved(reference: str, root: dict[str, Any]) -> Any:
    found: Any = root
    for name in reference.removeprefix("#").strip("/").split("/") if reference.strip("#/") else ():
        name = name.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, dict) else None
    return found
