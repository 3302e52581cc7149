"""Text in and out: values shortened for messages, URLs without secrets, JSON strict both ways."""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote


def shorten(value: object, limit: int = 60) -> str:
    """Return the repr of `value`, cut in the middle where it is longer than `limit` characters."""
    # A long text is cut before its repr is made, so that a hostile value costs no memory here.
    try:
        text = repr(value[: 4 * limit] if isinstance(value, str) else value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    if isinstance(value, str) and len(value) > limit:
        return f"{text[: limit // 2]}…' ({len(value)} characters)"
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-limit // 3 :]}"


def value_or_none(value: object) -> str:
    """Return `value` shortened for a message, "none" for None."""
    return "none" if value is None else shorten(value)


def without_secrets(url: str) -> str:
    """Return `url` with its userinfo and its query masked.

    A password may itself hold a slash or a question mark, so everything up to the last @ is masked.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    if "@" in rest:
        rest = "***@" + rest.rpartition("@")[2]
    for mark in "?#":
        if mark in rest:
            rest = rest.partition(mark)[0] + "?***"
    return f"{scheme}://{rest}"


def location(url: str, key: str) -> str:
    """Return where `key` lies, for a message: a plain path, or for other storage a URL.

    The URL is without secrets.
    """
    if url.startswith("file://"):
        return f"{unquote(url.removeprefix('file://'))}/{key}"
    return f"{without_secrets(url).partition('?')[0].rstrip('/')}/{key}"


def to_json(content: Mapping[str, object]) -> bytes:
    """Return `content` as UTF-8 JSON for people and machines: sorted, without NaN, a line a name.

    A list of objects has a line for each. Deeper levels stay in their line: indenting them would
    take most of a publish's time. Raises ValueError, TypeError.
    """
    lines = ",\n ".join(f"{_compact(name)}: {_rows(content[name])}" for name in sorted(content))
    return f"{{\n {lines}\n}}\n".encode()


def to_line(value: object) -> bytes:
    """Return `value` as UTF-8 JSON in one line, sorted, no NaN. Raises ValueError, TypeError."""
    return _compact(value).encode()


def _compact(value: object) -> str:
    return _ENCODER.encode(value)


def _rows(value: object) -> str:
    if not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        return _compact(value)
    rows = ",\n  ".join(_compact(row) for row in value)
    return f"[\n  {rows}\n ]"


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Return the object that UTF-8 JSON holds; ValueError says what is wrong with it."""
    try:
        value = _DECODER.decode(data.decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds a JSON {type(value).__name__} where an object is expected")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Two readers may each take another one of two equal names, so neither is taken.
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return content


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, allow_nan=False)
_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
