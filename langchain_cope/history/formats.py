"""Which format a row has, told by its fields, and the row in the forms that `reader` reads.

`FORMATS` is the table: a new format is one entry in it and the function that converts its rows. A
row is of the first format that it matches; a row of none is refused with what it holds and what
was expected.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

from langchain_cope.errors import HistoryError
from langchain_cope.history.chatgpt import chatgpt_left_out, chatgpt_rows
from langchain_cope.history.fields import hand_down, unread, unread_note, with_system
from langchain_cope.history.items import Target
from langchain_cope.history.lamp import LAMP_USER_KEYS, lamp_queries, lamp_rows
from langchain_cope.history.messages import (
    content_text,
    is_conversation,
    is_langchain,
    is_message,
    is_role,
    plain_messages,
)
from langchain_cope.history.pairs import (
    alpaca_rows,
    feedback_rows,
    openai_pair_rows,
    pair_rows,
    preference_rows,
    text_rows,
    traced_rows,
)
from langchain_cope.history.reader import check_conversation
from langchain_cope.history.rows import USER_KEYS, Located, Row, first_time, shown


def _any_row(row: Row) -> bool:
    return True


def _no_queries(row: Row) -> list[Row]:
    return []


def _nothing(row: Row) -> Counter[str]:
    return Counter()


@dataclass(frozen=True)
class Format:
    """One way in which people write down a history, a row at a time."""

    name: str
    keys: tuple[str, ...]
    """The fields that every row of the format has."""
    rows: Callable[[Row], list[Row]]
    """Returns a row in the forms that `reader` reads; nothing where nothing in it can be learnt."""
    _: KW_ONLY
    optional_keys: tuple[str, ...] = ()
    """Fields that most rows have as well, named where an error lists what was expected."""
    condition: Callable[[Row], bool] = _any_row
    """What a row of the format fulfils besides having the fields."""
    queries: Callable[[Row], list[Row]] = _no_queries
    """Returns the newer items in a row, which are never trained on."""
    user_keys: tuple[str, ...] = USER_KEYS
    """Where a row in a file may name its user."""
    target: Target | None = None
    """The side that is learnt by default; None for a format without conversations."""
    other_keys: tuple[str, ...] | None = ()
    """Fields that are read besides, or say nothing new; None where other programs' fields abound.
    A field with text that is neither named nor known to all formats is named in a note."""
    is_log: bool = False
    """Whether a row without a turn of the target is left out; made for training, it is an error."""
    left_out: Callable[[Row], Counter[str]] = _nothing
    """Returns what in a row is not read, by its kind."""
    is_export: bool = False
    """Whether a row that cannot be read is passed over, as long as others can: nobody wrote it by
    hand, or can mend it."""

    def matches(self, row: Row) -> bool:
        """Tell whether a row has this format."""
        return row.value.keys() >= set(self.keys) and self.condition(row)

    def unread(self, row: Row) -> list[str]:
        """Return the fields of a row that hold text and are not read."""
        if self.other_keys is None:
            return []
        return unread(row, (*self.keys, *self.optional_keys, *self.other_keys))


def _conversation(key: str) -> Callable[[Row], list[Row]]:
    """Return the row function of a format that has a conversation in the field `key`."""

    def rows(row: Row) -> list[Row]:
        fields = {**row.value, "messages": plain_messages(row[key])}
        if row.time() is None:
            fields["created_at"] = first_time(row[key])
        return [row.with_fields(fields)]

    return rows


# The simplest come last: a row of a format further up may have their fields too.
FORMATS = (
    Format(
        "ChatGPT export",
        ("mapping",),
        chatgpt_rows,
        left_out=chatgpt_left_out,
        target="user",
        other_keys=None,
        is_log=True,
        is_export=True,
    ),
    Format(
        "LaMP profile",
        ("profile",),
        lamp_rows,
        optional_keys=("user_id",),
        queries=lamp_queries,
        user_keys=LAMP_USER_KEYS,
        other_keys=(*LAMP_USER_KEYS, "query", "input", "output", "gold"),
    ),
    Format(
        "Alpaca",
        ("instruction", "output"),
        alpaca_rows,
        other_keys=("input", "history", "text"),  # the text is instruction and output once more
    ),
    Format(
        "OpenAI preference pairs",
        ("input", "preferred_output", "non_preferred_output"),
        openai_pair_rows,
    ),
    Format(
        "chosen and rejected",
        ("chosen", "rejected"),
        preference_rows,
        optional_keys=("prompt",),
        other_keys=("messages",),  # UltraFeedback's: the prompt and the chosen answer once more
    ),
    Format("feedback", ("prompt", "answer", "correction"), feedback_rows, other_keys=("score",)),
    Format("feedback", ("prompt", "answer", "score"), feedback_rows),
    Format(
        "feedback on traced runs",
        ("inputs", "outputs", "correction"),
        traced_rows,
        other_keys=None,
    ),
    Format("feedback on traced runs", ("inputs", "outputs", "score"), traced_rows, other_keys=None),
    Format("ShareGPT", ("conversations",), _conversation("conversations"), target="assistant"),
    Format(
        "LangChain messages",
        ("messages",),
        _conversation("messages"),
        condition=lambda row: is_langchain(row["messages"]),
        target="user",
        is_log=True,
    ),
    Format("OpenAI messages", ("messages",), _conversation("messages"), target="assistant"),
    Format(
        "prompt and completion",
        ("completion",),
        pair_rows,
        optional_keys=("prompt",),
        other_keys=("rejected",),
    ),
    Format("plain text", ("text",), text_rows),
)


def _listed(keys: Sequence[str]) -> str:
    """Return the keys as "a", "a and b" or "a, b and c"."""
    *others, last = keys
    return f"{', '.join(others)} and {last}" if others else last


def _expected() -> str:
    """Return the fields of every format, the simplest first, and those of a user a line."""
    alternatives = [_listed([*kind.optional_keys, *kind.keys]) for kind in reversed(FORMATS)]
    alternatives.append("user_id and history")
    return ", or ".join(dict.fromkeys(alternatives))


_EXPECTED = _expected()
_USER_LINE_KEYS = ("history", "queries")


@dataclass
class Converted:
    """Rows in the forms that `reader` reads, and how they came to be."""

    by_row: list[list[Row]] = field(default_factory=list)
    """What came of each row that was given, in their order."""
    formats: dict[str, int] = field(default_factory=dict)
    """Number of rows of each format."""
    target: Target | None = None
    """The side of the conversations that is learnt; None without conversations."""
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        """All rows that came of those given."""
        return [plain for rows in self.by_row for plain in rows]


def format_of(row: Row) -> Format:
    """Return the format of a row.

    Raises HistoryError, with what was found and what was expected, for a row of no known format.
    """
    kind = _match(row)
    if kind is not None:
        return kind
    hint = ""
    if is_message(row.value):
        hint = "; a message alone is not a row, put a conversation's into {'messages': […]}"
    raise HistoryError(
        f"{row.where}: no text to learn from: expected the keys {_EXPECTED}; "
        f"found {row.field_names()}{hint}"
    )


def user_of(line: Row) -> str | None:
    """Return the user that a line of a file names, None where it names no user."""
    kind = _match(line)
    return line.user(kind.user_keys if kind else USER_KEYS)


def unpack(line: Row) -> tuple[list[Row], list[Row]]:
    """Return the rows of a line and its queries, all of the formats in the table.

    A line with `history` holds the rows of a user; any other line is one row itself.
    """
    if _is_user_line(line):
        history = _nested(line.field("history"))
        queries = _nested(line.field("queries")) if line.get("queries") else []
        return hand_down(line, history), hand_down(line, queries)
    kind = _match(line)
    return [line], hand_down(line, kind.queries(line)) if kind else []


def convert(rows: Sequence[Row], target: Target | None = None) -> Converted:
    """Recognise `rows` and put them into the forms that `reader` reads.

    `target` None is each format's usual one. Raises HistoryError for a row of no known format, and
    where formats of both targets meet and no target is given.
    """
    if target not in ("assistant", "user", None):
        raise HistoryError(f"target is {shown(target)}; expected 'assistant' or 'user'")
    recognised = _recognised(rows)
    converted = Converted(formats=dict(Counter(kind.name for _, kind in recognised)))
    if any(kind.target for _, kind in recognised):
        converted.target = target or _usual_target(recognised)
        if target is None:
            converted.notes.append(_target_note(converted.target, recognised))
    num_empty: Counter[str] = Counter()
    unread_fields: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    odd: dict[str, list[HistoryError]] = {}
    for row, kind in recognised:
        unread_fields.update(kind.unread(row))
        try:
            plain_rows = _plain_rows(row, kind, converted.target)
            left_out.update(kind.left_out(row))
        except HistoryError as error:
            if not kind.is_export:
                raise
            odd.setdefault(kind.name, []).append(error)
            converted.by_row.append([])
            continue
        converted.by_row.append(plain_rows)
        if not plain_rows:
            num_empty[kind.name] += 1
    converted.notes += _empty_notes(num_empty, converted.formats)
    converted.notes += _odd_notes(odd, converted.formats)
    if left_out:
        parts = ", ".join(f"{name} ({number})" for name, number in left_out.items())
        converted.notes.append(f"parts of conversations left out: {parts}")
    converted.notes += unread_note(unread_fields)
    return converted


def _empty_notes(num_empty: Counter[str], formats: Mapping[str, int]) -> list[str]:
    return [
        f"rows left out, as nothing in them can be learnt: {num_empty[name]} of {number} ({name})"
        for name, number in formats.items()
        if num_empty[name]
    ]


def _odd_notes(odd: Mapping[str, list[HistoryError]], formats: Mapping[str, int]) -> list[str]:
    """Return notes on the rows passed over; raise the first error where all of a format were."""
    for name, errors in odd.items():
        if len(errors) == formats[name]:
            raise errors[0]
    return [
        f"conversations passed over, as they cannot be read: {len(errors)} of {formats[name]} "
        f"({name}); the first: {errors[0]}"
        for name, errors in odd.items()
    ]


def unread_in_lines(lines: Sequence[Row]) -> list[str]:
    """Return a note on fields with text that are not read in the lines that hold a user each."""
    names = [
        name for line in lines if _is_user_line(line) for name in unread(line, _USER_LINE_KEYS)
    ]
    return unread_note(Counter(names))


def _recognised(rows: Sequence[Row]) -> list[tuple[Row, Format]]:
    """Return each row with its format; in an export a row of none is a damaged row of it."""
    kinds = [_match(row) for row in rows]
    known = {kind.name: kind for kind in kinds if kind is not None}
    if len(known) == 1:
        (only,) = known.values()
        if only.is_export:
            kinds = [only] * len(rows)
    return [(row, kind or format_of(row)) for row, kind in zip(rows, kinds, strict=True)]


def _is_user_line(line: Row) -> bool:
    return "history" in line and "instruction" not in line  # with both, it is a row of Alpaca's


def _match(row: Row) -> Format | None:
    return next((kind for kind in FORMATS if kind.matches(row)), None)


def _nested(rows: Located) -> list[Row]:
    """Return the rows in a field of a line; a conversation is one row."""
    entries = rows.entries()
    if is_conversation(rows.value):
        return [Row(rows.where, {"messages": rows.value})]
    return [entry.row() for entry in entries]


def _plain_rows(row: Row, kind: Format, target: Target | None) -> list[Row]:
    """Return a row in the forms that `reader` reads."""
    try:
        rows = with_system(row, kind.rows(row))
    except RecursionError:  # from comparing two sides of a pair, say
        raise HistoryError(f"{row.where}: nested too deeply") from None
    if kind.is_export:
        for plain in rows:
            check_conversation(plain)
    if kind.is_log:
        rows = [plain for plain in rows if not _is_silent(plain, target)]
    return rows


def _is_silent(row: Row, target: Target | None) -> bool:
    """Tell whether the target has no turn with text in a conversation.

    A conversation of anything but messages is not silent: the reader is to refuse it.
    """
    messages = row.field("messages").entries()
    for message in messages:
        if not isinstance(message.value, Mapping) or not is_role(message.value.get("role")):
            return False
    for message in messages:
        if message.value["role"] == target:
            text, _ = content_text(message.row().field("content"))
            if text.strip():
                return False
    return True


def _usual_target(recognised: Sequence[tuple[Row, Format]]) -> Target:
    """Return the usual target of the formats, which must all have the same or none."""
    first: dict[Target, str] = {}
    for row, kind in recognised:
        if kind.target and kind.target not in first:
            first[kind.target] = f"{row.where} ({kind.name}: usually the {kind.target}'s)"
    if len(first) > 1:
        raise HistoryError(
            f"{' and '.join(first.values())}: say which side's turns are to be learnt "
            "(--target user or assistant)"
        )
    return next(iter(first))


def _target_note(target: Target, recognised: Sequence[tuple[Row, Format]]) -> str:
    names = dict.fromkeys(kind.name for _, kind in recognised if kind.target)
    other = "user" if target == "assistant" else "assistant"
    return (
        f"the {target}'s turns are learnt, as is usual for {', '.join(names)}; "
        f"the {other}'s are with --target {other}"
    )
