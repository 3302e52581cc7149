"""What a row says beside its format: a system prompt, which leads, and texts that nobody reads.

Knows no format: `formats` says which fields a format reads, and which rows came of a row.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from langchain_cope.history.messages import content_text, plain_message, plain_messages
from langchain_cope.history.rows import TIME_KEYS, USER_KEYS, Located, Row

_SYSTEM_NAMES = ("system", "systemprompt", "systemmessage", "systeminstruction")
# Names of things: they are text, but nothing that anybody wrote.
_NAMES = (*TIME_KEYS, *USER_KEYS, "conversation", "weight", "id", "metadata")
_SHOWN_FIELDS = 10


def with_system(row: Row, plain_rows: Sequence[Row]) -> list[Row]:
    """Return the rows that came of a row, each led by the row's system prompt, if it has one.

    A conversation that begins with the same system message does not get it twice.
    """
    text = _system_text(row)
    if not text:
        return list(plain_rows)
    return [_led_by({"role": "system", "content": text}, plain) for plain in plain_rows]


def hand_down(line: Row, rows: Sequence[Row]) -> list[Row]:
    """Return the rows of a user's line, with the line's system prompt where one has none."""
    inherited = {key: line[key] for key in line.value if _is_system(key)}
    if not inherited:
        return list(rows)
    return [
        row if _system_text(row) else row.with_fields({**row.value, **inherited}) for row in rows
    ]


def unread(row: Row, keys: Iterable[str]) -> list[str]:
    """Return the names of the fields that hold text and are not read; `keys` are those that are."""
    read = {*keys, *_NAMES}
    return [
        key
        for key in row.value
        if isinstance(key, str)
        and key not in read
        and not key.endswith("_id")
        and not _is_system(key)
        and _has_text(row[key])
    ]


def unread_note(fields: Counter[str]) -> list[str]:
    """Return a note that names the fields with text that are not read, if there are any."""
    if not fields:
        return []
    names = [f"{name!r:.40} ({number})" for name, number in list(fields.items())[:_SHOWN_FIELDS]]
    if len(fields) > _SHOWN_FIELDS:
        names.append("…")
    return [f"fields with text that are not read, and their rows: {', '.join(names)}"]


def _is_system(key: Any) -> bool:
    name = key.replace("_", "").lower() if isinstance(key, str) else ""
    return name.removesuffix("s") in _SYSTEM_NAMES


def _system_text(row: Row) -> str:
    """Return the text of the row's system prompts, each once."""
    texts: dict[str, None] = {}
    for key in row.value:
        if _is_system(key):
            text = _text(row.field(key))
            if text.strip():
                texts[text] = None
    return "\n\n".join(texts)


def _text(system: Located) -> str:
    message = plain_message(system.value)
    if isinstance(message, Mapping) and "content" in message:
        system = system.with_value(message["content"])
    text, _ = content_text(system)
    return text


def _led_by(system: dict[str, str], row: Row) -> Row:
    """Return a row in a form that `reader` reads with one system message more at its beginning."""
    key = "messages" if "messages" in row else "prompt"
    asked = plain_messages(row.get(key))
    if key == "prompt" and (asked is None or isinstance(asked, str)):
        is_blank = asked is None or not asked.strip()
        asked = [] if is_blank else [{"role": "user", "content": asked}]
    if not isinstance(asked, list):
        return row  # the reader refuses it
    if asked and isinstance(asked[0], Mapping):
        first = asked[0]
        if (first.get("role"), first.get("content")) == (system["role"], system["content"]):
            return row
    return row.with_fields({**row.value, key: [system, *asked]})


def _has_text(value: Any, depth: int = 4) -> bool:
    """Tell whether a value is or holds text that is not blank, looking a few levels deep."""
    if isinstance(value, str):
        return bool(value.strip())
    if depth == 0:
        return False
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return False
    return any(_has_text(inner, depth - 1) for inner in value)
