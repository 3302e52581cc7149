"""A user's history from files and rows, in the formats people have.

    {"prompt": …, "completion": …}                  the completion is what the user wrote
    {"messages": [{"role": …, "content": …}, …]}    a conversation (OpenAI's form); one item a target turn
    {"prompt": …, "chosen": …, "rejected": …}       a preference pair, which DPO takes as it is
    {"user_id": …, "profile": […], "query": …}      LaMP and LongLaMP, a user a line
    {"user_id": …, "history": […], "queries": […]}  a user a line, each with rows of the other forms
    plain text, a file named *.txt                  one text a line

and those in ``history_shapes.FORMATS``: ShareGPT, Alpaca, OpenAI's preference pairs, LangChain's messages, ChatGPT's
export, feedback. One JSON object a line, or a file named *.json that holds a list of them; a list of messages is one
conversation. Rows may carry ``created_at`` (ISO 8601, a date, unix seconds), ``user_id``, ``conversation`` and
``weight`` (0: not learnt). What ``target`` does is told in ``history_formats.RowReader``.
"""

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from langchain_cope.errors import HistoryError
from langchain_cope.history.formats import convert, in_memory, is_conversation
from langchain_cope.history.items import Item, Message, Target, UserHistory, checked_name, settle
from langchain_cope.history.lamp import USER_KEYS, lamp_queries
from langchain_cope.history.reader import Located, RowReader, checked_row, owner_of

__all__ = [
    "Item",
    "Message",
    "Target",
    "UserHistory",
    "as_history",
    "as_items",
    "read_history",
    "read_users",
]

MAX_FILE = 1 << 30  # bytes; read, it takes several times as much memory
MAX_LINE = 64 << 20  # characters; a line holds at most one user

_Rows = list[Located]
_SIGNATURES = {  # what a file begins with, and what it is then
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

    ``target`` says whose turns of conversations are learnt; None: the assistant's in files made for training (OpenAI,
    ShareGPT), the user's in logs (LangChain, ChatGPT's export), and the notes say which. ``user_id`` picks a user where
    the file names several, and names the user where it names none. ``instruction`` replaces the fixed text that stands
    in where an item has no prompt. Raises HistoryError, which names file and line,
    for what cannot be read, and for a file that does not hold exactly one user, or not the one asked for.
    """
    users = _users(path)
    named = [name for name in users if name is not None]
    if user_id is not None:
        user_id = checked_name(user_id, "the user id", "user_id")
    if not named and user_id is None:
        raise HistoryError(f"{path}: the file names no user; name one (--user ID)")
    if named and user_id is None:
        if len(named) > 1:
            raise HistoryError(f"{path}: {_listed(named)}; pick one (--user ID)")
        user_id = named[0]
    if named and user_id not in named:
        raise HistoryError(
            f"{path}: asked for the user {user_id!r:.80}, but the file has {_listed(named)}"
        )
    return _read_user(user_id, users[user_id if named else None], target, instruction)


def read_users(
    path: str | PathLike[str], *, target: Target | None = None, instruction: str | None = None
) -> list[UserHistory]:
    """Read every user of a file, in the order of first appearance; rows of one user are put together.

    A file that names no user is one user whose ``user_id`` is None. Raises HistoryError as ``read_history`` does.
    """
    return [
        _read_user(user_id, rows, target, instruction) for user_id, rows in _users(path).items()
    ]


def as_items(rows: Sequence[Any], target: Target | None = None) -> list[Item]:
    """Return the items of rows that are already in memory; see ``as_history``."""
    return as_history(rows, target=target).items


def as_history(
    rows: Sequence[Any],
    *,
    target: Target | None = None,
    user_id: str | None = None,
    instruction: str | None = None,
) -> UserHistory:
    """Return the history that ``rows`` hold: Items, rows of any format, or one conversation as LangChain's messages.

    ``target`` and ``instruction`` are as for ``read_history``.
    Raises HistoryError that names the row ("history[3]") where one is wrong, or belongs to another user.
    """
    return _read_user(user_id, in_memory(rows, user_id), target, instruction)


def _read_user(
    user_id: str | None, rows: _Rows, target: Target | None, instruction: str | None
) -> UserHistory:
    """Read all rows of one user: history and queries of user rows, the items of the others."""
    history: _Rows = []
    queries: _Rows = []
    for where, row in rows:
        if (
            "history" in row and "instruction" not in row
        ):  # with it, it is Alpaca's, and earlier turns
            history += _nested(row["history"], f"{where}: history")
            queries += _nested(row.get("queries") or [], f"{where}: queries")
        else:
            history.append((where, row))
            queries += lamp_queries(row, where) if "profile" in row else []
    found = convert(history, target)
    asked = convert(queries, target or found.target)
    reader = RowReader(found.target or asked.target or "assistant", instruction)
    items = reader.read_all(found.rows)
    notes = [*found.notes, *reader.notes()]
    return settle(
        user_id,
        items,
        queries=reader.read_all(asked.rows),
        instruction=reader.used_instruction,
        formats=found.formats,
        target=found.target,
        notes=notes,
    )


def _nested(rows: Any, where: str) -> _Rows:
    if not isinstance(rows, list):
        raise HistoryError(f"{where} must be a list, not {type(rows).__name__}")
    if is_conversation(rows):
        return [(where, {"messages": rows})]
    return [(f"{where}[{index}]", row) for index, row in enumerate(rows)]


def _users(path: str | PathLike[str]) -> dict[str | None, _Rows]:
    """Group the rows of a file by user."""
    users: dict[str | None, _Rows] = {}
    first_of: dict[bool, str] = {}
    for where, row in _rows(path):
        owner = owner_of(row, where, USER_KEYS) if "profile" in row else owner_of(row, where)
        first_of.setdefault(owner is None, where)
        users.setdefault(owner, []).append((where, row))
    if len(first_of) == 2:
        raise HistoryError(
            f"{first_of[True]}: names no user, while {first_of[False]} does; name one on every line"
        )
    return users


def _listed(users: Sequence[str]) -> str:
    if len(users) == 1:
        return f"the user {users[0]!r:.80}"
    shown = ", ".join(f"{user!r:.80}" for user in users[:5])
    return f"{len(users)} users: {shown}{', …' if len(users) > 5 else ''}"


def _rows(path: str | PathLike[str]) -> _Rows:
    """Return the rows of a file, each a mapping, with the place that an error names."""
    text = _text(path)
    suffix = Path(path).suffix.lower()
    lines = text.split("\n")  # not splitlines(): U+2028 and its kin may stand inside a JSON string
    located = [
        (f"{path}:{number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not located:
        raise HistoryError(
            f"{path}: the file is empty; expected one JSON object a line, or a .txt with one text a line"
        )
    if suffix == ".txt":
        return [(where, {"text": line}) for where, line in located]
    rows = _json_rows(text, path) if suffix == ".json" else None
    if rows is None:
        rows = [(where, _parsed(line, where)) for where, line in located]
    return [(where, _row(row, where)) for where, row in rows]


def _json_rows(text: str, path: str | PathLike[str]) -> _Rows | None:
    """Rows of a file that is one JSON value; None where it holds several, one a line after all."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        raise _broken(f"{path}:{error.lineno}", error) from None
    except (ValueError, RecursionError) as error:
        raise _broken(str(path), error) from None
    if not isinstance(value, list) or is_conversation(value):
        return [(str(path), value)]
    return [(f"{path}[{index}]", row) for index, row in enumerate(value)]


def _row(value: Any, where: str) -> Mapping[str, Any]:
    return {"messages": value} if is_conversation(value) else checked_row(value, where)


def _parsed(line: str, where: str) -> Any:
    if len(line) > MAX_LINE:
        raise HistoryError(
            f"{where}: a line of {len(line):,} characters; expected at most {MAX_LINE:,}: "
            "put a row on each line, or name the file .json"
        )
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _broken(where, error) from None


def _broken(where: str, error: ValueError | RecursionError) -> HistoryError:
    if isinstance(error, json.JSONDecodeError):
        return HistoryError(f"{where}: broken JSON: {error.msg} at character {error.colno}")
    why = (
        "nested too deeply" if isinstance(error, RecursionError) else str(error)
    )  # or a number of 5 000 digits
    return HistoryError(f"{where}: JSON that cannot be read: {why}")


def _text(path: str | PathLike[str]) -> str:
    try:
        with Path(path).expanduser().open("rb") as file:
            raw = file.read(MAX_FILE + 1)
    except FileNotFoundError:
        raise HistoryError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise HistoryError(f"{path}: is a folder; name a file in it") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise HistoryError(
            f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    if len(raw) > MAX_FILE:
        raise HistoryError(
            f"{path}: larger than the {MAX_FILE >> 20} MiB that are read at once: split it"
        )
    foreign = next((kind for start, kind in _SIGNATURES.items() if raw.startswith(start)), None)
    if foreign:
        raise HistoryError(f"{path}:1: not UTF-8 but {foreign}")
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
            f"{path}:{line}: not text but binary, or UTF-16 without its mark; save the file as UTF-8"
        )
    return text
