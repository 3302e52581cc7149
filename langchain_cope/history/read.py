"""A user's history from files and rows, in the formats people have.

    {"prompt": …, "completion": …}                  the completion is what the user wrote
    {"messages": [{"role": …, "content": …}, …]}    a conversation; one item a target turn (OpenAI)
    {"prompt": …, "chosen": …, "rejected": …}       a preference pair, which DPO takes as it is
    {"user_id": …, "profile": […], "query": …}      LaMP and LongLaMP, a user a line
    {"user_id": …, "history": […], "queries": […]}  a user a line, each with rows of the other forms
    plain text, a file named *.txt                  one text a line

and the others in `formats.FORMATS`: ShareGPT, Alpaca, OpenAI's preference pairs, LangChain's
messages, ChatGPT's export, feedback. One JSON object a line, or a file named *.json that holds a
list of them; a list of messages is one conversation. Rows may carry `created_at` (ISO 8601, a date,
unix seconds), `user_id`, `conversation` and `weight` (0: not learnt). `reader.RowReader` tells what
`target` does.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from langchain_cope.errors import HistoryError
from langchain_cope.history.formats import convert, unpack, unread_in_lines, user_of
from langchain_cope.history.items import Item, Target, UserHistory, settle
from langchain_cope.history.messages import is_conversation
from langchain_cope.history.reader import RowReader
from langchain_cope.history.rows import Located, Row, checked_id

MAX_FILE = 1 << 30  # bytes; read, it takes several times as much memory
MAX_LINE = 64 << 20  # characters; a line holds at most one user

# What a file that is not text begins with, and what it is then.
_SIGNATURES = {
    b"\xff\xfe": "UTF-16; save the file as UTF-8",
    b"\xfe\xff": "UTF-16; save the file as UTF-8",
    b"PK\x03\x04": "a ZIP archive; unpack it (of ChatGPT's export, give conversations.json)",
    b"\x1f\x8b": "compressed with gzip; unpack it",
    b"PAR1": "a Parquet file; save its rows as JSONL",
}


def read_history(
    path: str | PathLike[str],
    *,
    target: Target | None = None,
    user_id: str | None = None,
    instruction: str | None = None,
) -> UserHistory:
    """Read one user's history from a file.

    Args:
        path: A file of any format in the table; see the module's own text.
        target: The side of conversations that is learnt. None: the assistant's in files made for
            training (OpenAI, ShareGPT), the user's in logs (LangChain, ChatGPT's export); the notes
            say which.
        user_id: The user to pick where the file names several, and the user's name where the file
            names no user.
        instruction: Replaces the fixed text that stands in where an item has no prompt.

    Raises:
        HistoryError: A part of the file cannot be read, or the file does not hold exactly one user,
            or not the one asked for. The error names file and line.
    """
    users = _rows_by_user(path)
    if user_id is not None:
        user_id = checked_id("user", user_id)
    named = [user for user in users if user is not None]
    if not named:
        if user_id is None:
            raise HistoryError(f"{path}: the file names no user; name one (--user ID)")
        return _read_user(user_id, users[None], target, instruction)
    if user_id is None:
        if len(named) > 1:
            raise HistoryError(f"{path}: {_listed(named)}; pick one (--user ID)")
        user_id = named[0]
    if user_id not in users:
        raise HistoryError(
            f"{path}: asked for the user {user_id!r:.80}, but the file has {_listed(named)}"
        )
    return _read_user(user_id, users[user_id], target, instruction)


def read_users(path: str | PathLike[str], *, target: Target | None = None) -> list[UserHistory]:
    """Read every user of a file, in the order of first appearance.

    Rows of one user are put together; a file that names no user is one user, and its `user_id` is
    None. Raises HistoryError as `read_history` does.
    """
    return [_read_user(user_id, rows, target) for user_id, rows in _rows_by_user(path).items()]


def as_history(
    rows: Sequence[Any],
    *,
    target: Target | None = None,
    user_id: str | None = None,
    instruction: str | None = None,
) -> UserHistory:
    """Return the history in rows that are already in memory.

    Args:
        rows: Items, rows of any format, or one conversation as LangChain's messages.
        target: As for `read_history`.
        user_id: The user of the rows; a row may name no other.
        instruction: As for `read_history`.

    Raises:
        HistoryError: A row is wrong or belongs to another user. The error names it ("history[3]").
    """
    return _read_user(user_id, in_memory(rows, user_id), target, instruction)


def in_memory(rows: Any, user_id: str | None = None) -> list[Row]:
    """Locate rows that are already in memory, as "history[3]".

    LangChain's messages, and an object that holds some as `messages`, are one conversation. Raises
    HistoryError where rows of two users meet.
    """
    rows = getattr(rows, "messages", rows)
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise HistoryError(f"history must be a list of rows, not {type(rows).__name__}")
    rows = list(rows)
    if is_conversation(rows):
        return [Row("history", {"messages": rows})]
    located = []
    for entry in Located("history", rows).entries():
        if isinstance(entry.value, Item):
            entry = entry.with_value(entry.value.model_dump())
        row = entry.row()
        owner = row.user()
        user_id = user_id or owner
        if owner not in (None, user_id):
            raise HistoryError(
                f"{row.where}: belongs to the user {owner!r:.80}, not to {user_id!r:.80}"
            )
        located.append(row)
    return located


def _read_user(
    user_id: str | None,
    lines: Sequence[Row],
    target: Target | None,
    instruction: str | None = None,
) -> UserHistory:
    """Read all lines of one user."""
    history_rows: list[Row] = []
    query_rows: list[Row] = []
    for line in lines:
        rows, queries_of_line = unpack(line)
        history_rows += rows
        query_rows += queries_of_line
    history = convert(history_rows, target)
    queries = convert(query_rows, target or history.target)
    reader = RowReader(history.target or queries.target or "assistant", instruction)
    items = reader.read_all(history.rows)
    notes = [*history.notes, *unread_in_lines(lines), *reader.notes()]
    queried_items = reader.read_all(queries.rows)
    return settle(
        user_id,
        items,
        queries=queried_items,
        instruction=reader.used_instruction,
        formats=history.formats,
        target=history.target,
        notes=notes,
    )


def _rows_by_user(path: str | PathLike[str]) -> dict[str | None, list[Row]]:
    """Group the rows of a file by user; None stands for the only one of a file without names."""
    users: dict[str | None, list[Row]] = {}
    for row in _file_rows(path):
        users.setdefault(user_of(row), []).append(row)
    if None in users and len(users) > 1:
        unnamed = users[None][0]
        named = next(rows[0] for user, rows in users.items() if user is not None)
        raise HistoryError(
            f"{unnamed.where}: names no user, while {named.where} does; name one on every line"
        )
    return users


def _listed(users: Sequence[str]) -> str:
    if len(users) == 1:
        return f"the user {users[0]!r:.80}"
    names = [f"{user!r:.80}" for user in users[:5]]
    if len(users) > 5:
        names.append("…")
    return f"{len(users)} users: {', '.join(names)}"


def _file_rows(path: str | PathLike[str]) -> list[Row]:
    """Return the rows of a file, at least one."""
    text = _text(path)
    lines = _lines(text, path)
    if not lines:
        raise HistoryError(
            f"{path}: the file is empty; "
            "expected one JSON object a line, or a .txt with one text a line"
        )
    suffix = Path(path).suffix.lower()
    if suffix == ".txt":
        return [Row(line.where, {"text": line.value}) for line in lines]
    values = _json_values(text, path) if suffix == ".json" else None
    if values is None:
        values = [_parsed(line) for line in lines]
    if not values:
        raise HistoryError(f"{path}: the list in the file is empty; expected one object or more")
    return [_row(value) for value in values]


def _lines(text: str, path: str | PathLike[str]) -> list[Located]:
    """Return the lines that are not blank."""
    lines = []
    # Not splitlines(): U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        stripped = line.strip()
        if stripped:
            lines.append(Located(f"{path}:{number}", stripped))
    return lines


def _json_values(text: str, path: str | PathLike[str]) -> list[Located] | None:
    """Return the rows of a file that is one JSON value, None where it holds several, one a line."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        raise _broken(f"{path}:{error.lineno}", error) from None
    except (ValueError, RecursionError) as error:
        raise _broken(str(path), error) from None
    located = Located(str(path), value)
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


def _text(path: str | PathLike[str]) -> str:
    """Return the text of a file, which must be UTF-8."""
    raw = _bytes(path)
    for signature, kind in _SIGNATURES.items():
        if raw.startswith(signature):
            raise HistoryError(f"{path}:1: not UTF-8 but {kind}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise HistoryError(
            f"{path}:{line}: not UTF-8 but another encoding; save the file as UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise HistoryError(
            f"{path}:{line}: not text but binary, or UTF-16 without its mark; "
            "save the file as UTF-8"
        )
    return text


def _bytes(path: str | PathLike[str]) -> bytes:
    """Return what a file holds, at most `MAX_FILE` bytes."""
    try:
        with Path(path).expanduser().open("rb") as file:
            raw = file.read(MAX_FILE + 1)
    except FileNotFoundError:
        raise HistoryError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise HistoryError(f"{path}: is a folder; name a file in it") from None
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise HistoryError(f"{path}: cannot be read: {reason}") from None
    if len(raw) > MAX_FILE:
        raise HistoryError(
            f"{path}: larger than the {MAX_FILE >> 20} MiB that are read at once: split it"
        )
    return raw
