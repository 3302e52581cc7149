"""Which format a row has, told by its shape, and the row in the forms that ``history_formats`` reads.

``FORMATS`` is the table: what a row of each format holds, what it is called, and whose turns it is usually learnt for.
A row is of the first format whose keys it has; a row of none is refused with what it holds and what was expected.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from langchain_cope.errors import HistoryError
from langchain_cope.history.chatgpt import chatgpt_rows
from langchain_cope.history.items import Item, Target, shown
from langchain_cope.history.lamp import lamp_history
from langchain_cope.history.messages import is_langchain, is_message, plain_messages
from langchain_cope.history.pairs import (
    alpaca_rows,
    feedback_rows,
    openai_pair_rows,
    pair_rows,
    preference_rows,
    text_rows,
    traced_rows,
)
from langchain_cope.history.reader import (
    Located,
    checked_row,
    content_text,
    is_role,
    named,
    owner_of,
)

Row = Mapping[str, Any]


class Format(NamedTuple):
    """``target``: whose turns are learnt where nobody says; None where that is no question.

    A row of a log (``is_log``) without a turn of that side is left out; in a file made for training it is an error.
    """

    name: str
    keys: tuple[str, ...]
    rows: Callable[[Row, str], list[Located]]
    target: Target | None = None
    is_log: bool = False


def _chat(key: str) -> Callable[[Row, str], list[Located]]:
    return lambda row, where: [(where, {**row, "messages": plain_messages(row[key])})]


_LANGCHAIN = Format("LangChain messages", ("messages",), _chat("messages"), "user", is_log=True)
FORMATS = (
    Format("ChatGPT export", ("mapping",), chatgpt_rows, "user", is_log=True),
    Format("LaMP profile", ("profile",), lamp_history),
    Format("Alpaca", ("instruction", "output"), alpaca_rows),
    Format(
        "OpenAI preference pairs",
        ("input", "preferred_output", "non_preferred_output"),
        openai_pair_rows,
    ),
    Format("chosen and rejected", ("chosen", "rejected"), preference_rows),
    Format("feedback", ("prompt", "answer", "score"), feedback_rows),
    Format("feedback", ("prompt", "answer", "correction"), feedback_rows),
    Format("feedback on traced runs", ("inputs", "outputs", "score"), traced_rows),
    Format("feedback on traced runs", ("inputs", "outputs", "correction"), traced_rows),
    Format("ShareGPT", ("conversations",), _chat("conversations"), "assistant"),
    _LANGCHAIN,
    Format("OpenAI messages", ("messages",), _chat("messages"), "assistant"),
    Format("prompt and completion", ("completion",), pair_rows),
    Format("plain text", ("text",), text_rows),
)
_EXPECTED = (
    "expected the keys prompt and completion, or messages, or prompt, chosen and rejected, or input, preferred_output "
    "and non_preferred_output, or conversations, or instruction and output, or mapping, or prompt, answer and score, "
    "or text, or user_id with history or profile"
)


@dataclass
class Converted:
    """Rows in the forms that ``history_formats`` reads, and how they came to be."""

    rows: list[Located] = field(default_factory=list)
    formats: dict[str, int] = field(default_factory=dict)
    """Rows of each format."""
    target: Target | None = None
    """Whose turns of conversations are learnt; None where there are none."""
    notes: list[str] = field(default_factory=list)


def convert(rows: Sequence[Located], target: Target | None = None) -> Converted:
    """Recognise ``rows`` and put them into the forms that ``history_formats`` reads.

    ``target`` None is each format's usual one. Raises HistoryError for a row of no known format, and where formats of
    both targets meet and nobody says which.
    """
    if target not in ("assistant", "user", None):
        raise HistoryError(f"target is {shown(target)}; expected 'assistant' or 'user'")
    found = [(where, row, format_of(row, where)) for where, row in rows]
    made = Converted(target=target or _usual(found))
    if all(kind.target is None for _, _, kind in found):
        made.target = None
    elif target is None:
        kinds = ", ".join(dict.fromkeys(kind.name for _, _, kind in found if kind.target))
        other = "user" if made.target == "assistant" else "assistant"
        made.notes.append(
            f"the {made.target}'s turns are learnt, as is usual for {kinds}; the {other}'s are with --target {other}"
        )
    empty: Counter[str] = Counter()
    for where, row, kind in found:
        try:
            given = kind.rows(row, where)
        except RecursionError:  # from comparing two sides of a pair, say
            raise HistoryError(f"{where}: nested too deeply") from None
        if kind.is_log:
            given = [(here, one) for here, one in given if not _is_silent(one, made.target, here)]
        made.rows += given
        empty[kind.name] += not given
    made.formats = dict(Counter(kind.name for _, _, kind in found))
    for name, number in empty.items():
        if number:
            made.notes.append(
                f"rows left out, as nothing in them can be learnt: {number} of {made.formats[name]} ({name})"
            )
    return made


def format_of(row: Any, where: str) -> Format:
    """Return the format of a row; raises HistoryError that says what was found and what was expected."""
    row = checked_row(row, where)
    for kind in FORMATS:
        if all(key in row for key in kind.keys) and (
            kind is not _LANGCHAIN or is_langchain(row["messages"])
        ):
            return kind
    alone = (
        "; a message alone is no row, put a conversation's into {'messages': […]}"
        if is_message(row)
        else ""
    )
    raise HistoryError(f"{where}: no text to learn from: {_EXPECTED}; found {named(row)}{alone}")


def in_memory(rows: Any, user_id: str | None = None) -> list[Located]:
    """Locate rows that are already in memory as "history[3]"; raise HistoryError where two users meet.

    LangChain's messages, and an object that holds some as ``messages``, are one conversation.
    """
    rows = getattr(rows, "messages", rows)
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise HistoryError(f"history must be a list of rows, not {type(rows).__name__}")
    rows = list(rows)
    if is_conversation(rows):
        return [("history", {"messages": rows})]
    located = []
    for index, row in enumerate(rows):
        where = f"history[{index}]"
        plain = row.model_dump() if isinstance(row, Item) else checked_row(row, where)
        owner = owner_of(plain, where)
        user_id = user_id or owner
        if owner not in (None, user_id):
            raise HistoryError(
                f"{where}: belongs to the user {owner!r:.80}, not to {user_id!r:.80}"
            )
        located.append((where, plain))
    return located


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, as LangChain's ``messages_to_dict`` returns one."""
    return isinstance(value, list) and bool(value) and is_message(value[0])


def _usual(found: Sequence[tuple[str, Any, Format]]) -> Target | None:
    first: dict[Target, tuple[str, Format]] = {}
    for where, _, kind in found:
        if kind.target:
            first.setdefault(kind.target, (where, kind))
    if len(first) == 2:
        seen = [
            f"{where} ({kind.name}: usually the {side}'s)" for side, (where, kind) in first.items()
        ]
        raise HistoryError(
            f"{' and '.join(seen)}: say whose turns are to be learnt (--target user or assistant)"
        )
    return next(iter(first), None)


def _is_silent(row: Row, target: Target | None, where: str) -> bool:
    """Whether the side that is to be learnt says nothing; what is no message at all is left to the reader to refuse."""
    messages = row["messages"]
    if not all(
        isinstance(message, Mapping) and is_role(message.get("role")) for message in messages
    ):
        return False
    return not any(
        message["role"] == target
        and content_text(message.get("content"), f"{where}: messages[{index}]")[0].strip()
        for index, message in enumerate(messages)
    )
