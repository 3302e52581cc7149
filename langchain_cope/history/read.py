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

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from os import PathLike
from typing import Any

from langchain_cope.errors import HistoryError
from langchain_cope.history.files import file_rows
from langchain_cope.history.formats import convert, unpack, unread_in_lines, user_of
from langchain_cope.history.items import Item, Target, UserHistory, settle
from langchain_cope.history.messages import is_conversation
from langchain_cope.history.order import oldest_first
from langchain_cope.history.reader import RowReader
from langchain_cope.history.rows import Located, Row, checked_id, shown


def read_history(
    path: str | PathLike[str],
    *more: str | PathLike[str],
    target: Target | None = None,
    user_id: str | None = None,
    instruction: str | None = None,
) -> UserHistory:
    """Read one user's history from a file, or from several.

    Args:
        path: A file of any format in the table; see the module's own text. "-" is standard input,
            of JSON or of plain text.
        *more: Further files. The items of all are ordered by their times; a file without times
            comes after those before it.
        target: The side of conversations that is learnt. None: the assistant's in files made for
            training (OpenAI, ShareGPT), the user's in logs (LangChain, ChatGPT's export); the notes
            say which.
        user_id: The user to pick where a file names several, and the user's name where a file
            names no user.
        instruction: Replaces the fixed text that stands in where an item has no prompt.

    Raises:
        HistoryError: A part of a file cannot be read, or a file does not hold exactly one user, or
            not the one asked for. The error names file and line.
    """
    if user_id is not None:
        user_id = checked_id("user", user_id)
    files: list[Sequence[Row]] = []
    first: str | None = None
    for name in (path, *more):
        owner, rows = _rows_of(name, user_id)
        if first not in (None, owner):
            raise HistoryError(
                f"{name}: has the user {owner!r:.80}, but {path} the user {first!r:.80}; "
                "pick one (--user ID)"
            )
        first = owner
        files.append(rows)
    return _read_user(first, files, target, instruction)


def _rows_of(path: str | PathLike[str], user_id: str | None) -> tuple[str, list[Row]]:
    """Return the user of a file, the one asked for or its only one, and that user's rows."""
    users = _rows_by_user(path)
    named = [user for user in users if user is not None]
    if not named:
        if user_id is None:
            raise HistoryError(f"{path}: the file names no user; name one (--user ID)")
        return user_id, users[None]
    if user_id is None:
        if len(named) > 1:
            raise HistoryError(f"{path}: {_listed(named)}; pick one (--user ID)")
        user_id = named[0]
    if user_id not in users:
        raise HistoryError(
            f"{path}: asked for the user {user_id!r:.80}, but the file has {_listed(named)}"
        )
    return user_id, users[user_id]


def read_users(path: str | PathLike[str], *, target: Target | None = None) -> list[UserHistory]:
    """Read every user of a file, in the order of first appearance.

    Rows of one user are put together; a file that names no user is one user, and its `user_id` is
    None. Raises HistoryError as `read_history` does.
    """
    return [_read_user(user_id, [rows], target) for user_id, rows in _rows_by_user(path).items()]


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
    return _read_user(user_id, [in_memory(rows, user_id)], target, instruction)


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
    files: Sequence[Sequence[Row]],
    target: Target | None,
    instruction: str | None = None,
) -> UserHistory:
    """Read all lines of one user, file by file."""
    history_rows: list[Row] = []
    query_rows: list[Row] = []
    ends = [0]  # of each file's rows
    for lines in files:
        for line in lines:
            rows, queries_of_line = unpack(line)
            history_rows += rows
            query_rows += queries_of_line
        ends.append(len(history_rows))
    history = convert(history_rows, target)
    queries = convert(query_rows, target or history.target)
    reader = RowReader(history.target or queries.target or "assistant", instruction)
    items = reader.read_all(_oldest_first(history.by_row, ends))
    all_lines = [line for lines in files for line in lines]
    notes = [*history.notes, *unread_in_lines(all_lines), *reader.notes()]
    queried_items = reader.read_all(queries.rows)
    return settle(
        user_id,
        items,
        queries=queried_items,
        instruction=reader.used_instruction,
        formats=history.formats,
        target=history.target,
        shareable=_all_shareable(all_lines),
        notes=notes,
    )


def _all_shareable(lines: Sequence[Row]) -> bool:
    """Return whether each of a user's lines says that others' models may be trained on it."""
    values = [line.get("shareable", False) for line in lines]
    for line, value in zip(lines, values, strict=True):
        if not isinstance(value, bool):
            raise HistoryError(
                f"{line.where}: shareable is {shown(value)}; expected true (a model that others "
                "use may be trained on this) or false"
            )
    return bool(values) and all(values)


def _oldest_first(by_row: Sequence[Sequence[Row]], ends: Sequence[int]) -> list[Row]:
    """Return the rows of all files in order; `by_row[ends[n]:ends[n + 1]]` came of file n."""
    files = [
        [plain for rows in by_row[start:end] for plain in rows] for start, end in pairwise(ends)
    ]
    return oldest_first(files, Row.time, lambda row: row.get("conversation"))


def _rows_by_user(path: str | PathLike[str]) -> dict[str | None, list[Row]]:
    """Group the rows of a file by user; None stands for the only one of a file without names."""
    users: dict[str | None, list[Row]] = {}
    for row in file_rows(path):
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
