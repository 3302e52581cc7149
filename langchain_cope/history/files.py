"""Files and standard input as rows, each with its file and line; what holds none is named.

Knows no formats: a row is an object of JSON, a conversation, or a line of plain text as
`{"text": …}`. `foreign` tells what else a file looks like.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from langchain_cope.errors import HistoryError
from langchain_cope.history.foreign import (
    READ,
    look_of_bytes,
    look_of_name,
    look_of_text,
    seems_json,
)
from langchain_cope.history.messages import is_conversation
from langchain_cope.history.rows import Located, Row

MAX_FILE = 1 << 30  # bytes; read, it takes several times as much memory
MAX_LINE = 64 << 20  # characters; a line holds at most one user
STANDARD_INPUT = "-"

_JSON_NAMES = (".json", ".jsonl", ".ndjson")


def file_rows(path: str | os.PathLike[str]) -> list[Row]:
    """Return the rows of a file, or of standard input where the path is "-"; at least one.

    Raises HistoryError, with file and line, for what cannot be read.
    """
    is_input = os.fspath(path) == STANDARD_INPUT
    name = "standard input" if is_input else str(path)
    suffix = "" if is_input else Path(path).suffix.lower()
    text = _text(_bytes(path, name), name, suffix)
    lines = _lines(text, name)
    if not lines:
        raise HistoryError(
            f"{name}: the file is empty; "
            "expected one JSON object a line, or a .txt with one text a line"
        )
    if suffix == ".txt" or (is_input and not seems_json(text)):
        _refuse(name, look_of_text(text))
        return [Row(line.where, {"text": line.value}) for line in lines]
    if not seems_json(text):
        look = look_of_text(text)
        _refuse(name, look if suffix in _JSON_NAMES else look or look_of_name(suffix))
    return _json_rows(text, name, lines, is_one_value=suffix == ".json" or is_input)


def _refuse(name: str, look: str | None) -> None:
    """Raise HistoryError where a file looks like something that is not read."""
    if look is not None:
        raise HistoryError(f"{name}: looks like {look}; {READ}")


def _json_rows(text: str, name: str, lines: Sequence[Located], *, is_one_value: bool) -> list[Row]:
    values = _json_values(text, name) if is_one_value else None
    if values is None:
        values = [_parsed(line) for line in lines]
    if not values:
        raise HistoryError(f"{name}: the list in the file is empty; expected one object or more")
    if any(isinstance(value.value, Mapping) and "mapping" in value.value for value in values):
        # ChatGPT's export, in which a conversation may be anything.
        values = [_conversation(value) for value in values]
    return [_row(value) for value in values]


def _conversation(located: Located) -> Located:
    is_named = isinstance(located.value, Mapping)
    return located if is_named else located.with_value({"mapping": located.value})


def _lines(text: str, name: str) -> list[Located]:
    """Return the lines that are not blank."""
    lines = []
    # Not splitlines(): U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        stripped = line.strip()
        if stripped:
            lines.append(Located(f"{name}:{number}", stripped))
    return lines


def _json_values(text: str, name: str) -> list[Located] | None:
    """Return the rows of a file that is one JSON value, None where it holds several, one a line."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        raise _broken(f"{name}:{error.lineno}", error) from None
    except (ValueError, RecursionError) as error:
        raise _broken(name, error) from None
    located = Located(name, value)
    if not isinstance(value, list) or is_conversation(value):
        return [located]
    return located.entries()


def _row(located: Located) -> Row:
    if is_conversation(located.value):
        return Row(located.where, {"messages": located.value})
    return located.row()


def _parsed(line: Located) -> Located:
    if len(line.value) > MAX_LINE:
        raise HistoryError(
            f"{line.where}: a line of {len(line.value):,} characters; "
            f"expected at most {MAX_LINE:,}: put a row on each line, or name the file .json"
        )
    try:
        return line.with_value(json.loads(line.value))
    except (ValueError, RecursionError) as error:
        raise _broken(line.where, error) from None


def _broken(where: str, error: ValueError | RecursionError) -> HistoryError:
    if isinstance(error, json.JSONDecodeError):
        return HistoryError(f"{where}: broken JSON: {error.msg} at character {error.colno}")
    if isinstance(error, RecursionError):
        return HistoryError(f"{where}: JSON that cannot be read: nested too deeply")
    return HistoryError(f"{where}: JSON that cannot be read: {error}")  # a number of 5 000 digits


def _text(raw: bytes, name: str, suffix: str) -> str:
    """Return the text of a file, which must be UTF-8, without its byte-order marks.

    They stand at the beginning of a file, and of each line or text that was the beginning of one.
    """
    look = look_of_bytes(raw, suffix)
    if look is not None:
        raise HistoryError(f"{name}:1: not UTF-8 but {look}; {READ}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise HistoryError(
            f"{name}:{line}: not UTF-8 but another encoding; save the file as UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise HistoryError(
            f"{name}:{line}: not text but binary, or UTF-16 without its mark; "
            "save the file as UTF-8"
        )
    return text.replace("\ufeff", "")


def _bytes(path: str | os.PathLike[str], name: str) -> bytes:
    """Return what a file or standard input holds, at most `MAX_FILE` bytes."""
    try:
        if os.fspath(path) == STANDARD_INPUT:
            raw = sys.stdin.buffer.read(MAX_FILE + 1)
        else:
            with Path(path).expanduser().open("rb") as file:
                raw = file.read(MAX_FILE + 1)
    except FileNotFoundError:
        raise HistoryError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise HistoryError(f"{name}: is a folder; name a file in it, or several; {READ}") from None
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise HistoryError(f"{name}: cannot be read: {reason}") from None
    if len(raw) > MAX_FILE:
        raise HistoryError(
            f"{name}: larger than the {MAX_FILE >> 20} MiB that are read at once: split it"
        )
    return raw
