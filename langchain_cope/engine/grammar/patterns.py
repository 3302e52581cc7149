"""How many patterns one text has to fit at a time, told before llguidance combines them.

It finds out whether anything fits them all, and has no bound on that: with each pattern more it
takes about twice as long, so that a request with twenty would hold up a server for seconds, one
with forty for good.
"""

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

MOST_PATTERNS = 8


def most_patterns(schema: Any) -> int:
    """Return the most patterns and formats that any one text of a JSON schema has to fit.

    A reference that is no path within the schema counts as all patterns of it.
    """
    nodes = list(_nodes(schema))
    in_all = sum(map(_own, nodes))
    known: dict[int, int] = {}

    def count(node: Any) -> int:
        if not isinstance(node, dict):
            return 0
        if id(node) not in known:
            known[id(node)] = 0  # for a schema that is a part of itself
            number = _own(node) + sum(map(count, _parts(node, "allOf")))
            number += max(map(count, [*_parts(node, "anyOf"), *_parts(node, "oneOf")]), default=0)
            if "$ref" in node:
                target = _target(schema, node["$ref"])
                number += in_all if target is None else count(target)
            known[id(node)] = number
        return known[id(node)]

    return max(map(count, nodes), default=0)


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every object in a JSON value."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _nodes(part)


def _own(node: dict[str, Any]) -> int:
    return sum(isinstance(node.get(key), str) for key in ("pattern", "format"))


def _parts(node: dict[str, Any], key: str) -> list[Any]:
    parts = node.get(key)
    return parts if isinstance(parts, list) else []


def _target(schema: Any, reference: Any) -> dict[str, Any] | None:
    """Return the object that a path such as `#/$defs/name` leads to; None where there is none."""
    if not isinstance(reference, str) or not f"{reference}/".startswith("#/"):
        return None
    value = schema
    for part in unquote(reference).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        try:
            value = value[int(name) if isinstance(value, list) else name]
        except (LookupError, TypeError, ValueError):
            return None
    return value if isinstance(value, dict) else None
