"""What a history is: items of one user, oldest first, each a prompt and what the user wrote.

Knows no files and no database: ``history_shapes`` recognises rows, ``history_formats`` turns them into items,
``history`` reads files, ``chroma_history`` a Chroma. All end in ``settle``, which puts items in order and removes
duplicates.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from reprlib import Repr
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, field_validator

from langchain_cope.errors import HistoryError

Message = dict[str, str]
"""A chat message, ``{"role": …, "content": …}``; the role is system, user or assistant."""
Target = Literal["assistant", "user"]
"""Whose turns of a conversation are the completions."""

_DATE = re.compile(r"(\d{4})(?:-(\d{1,2}))?(?:-(\d{1,2}))?")
_DATETIME = TypeAdapter(datetime)
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 2  # what stands in a file may be nested deeper than repr() can follow


class Item(BaseModel):
    """One thing the user wrote, and what it answers.

    ``prompt`` is a text (one user message) or messages that end in a user turn; a ``created_at`` without a time zone
    is taken as UTC; items of one ``conversation`` are never split between training and held-out items. ``rejected``
    are answers to the prompt that the user liked less than the completion: DPO takes each of these pairs as it is, and
    no negative is mined for the item.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str | list[Message]
    completion: str
    created_at: datetime | None = None
    conversation: str | None = None
    rejected: tuple[str, ...] = ()

    @field_validator("created_at")
    @classmethod
    def _aware(cls, value: datetime | None) -> datetime | None:
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value

    @property
    def messages(self) -> list[Message]:
        """The prompt as messages."""
        return (
            [{"role": "user", "content": self.prompt}]
            if isinstance(self.prompt, str)
            else list(self.prompt)
        )

    @property
    def key(self) -> str:
        """The same for two items exactly when prompt and completion are the same."""
        return json.dumps([self.messages, self.completion], sort_keys=True)

    def with_rejected(self, answers: Iterable[str]) -> "Item":
        """The item with ``answers`` among the rejected ones, each once; the completion itself is none of them."""
        rejected = dict.fromkeys([*self.rejected, *answers])
        rejected.pop(self.completion, None)
        return self.model_copy(update={"rejected": tuple(rejected)})


class UserHistory(BaseModel):
    """One user's items, oldest first, without duplicates.

    ``queries`` are newer items that are never trained on. ``instruction`` is the fixed text that stands in where an
    item had no prompt, None where none was needed. ``formats`` counts the rows of each format that was found, and
    ``target`` is whose turns of conversations were learnt, None where there were none. ``notes`` are sentences for
    people on what was decided.
    """

    user_id: str | None
    items: list[Item]
    queries: list[Item] = []
    instruction: str | None = None
    formats: dict[str, int] = {}
    target: Target | None = None
    notes: list[str] = []

    @property
    def num_pairs(self) -> int:
        """How many pairs of a chosen and a rejected answer the items hold."""
        return sum(len(item.rejected) for item in self.items)


def settle(
    user_id: str | None,
    items: Sequence[Item],
    *,
    queries: Sequence[Item] = (),
    instruction: str | None = None,
    formats: Mapping[str, int] | None = None,
    target: Target | None = None,
    notes: Sequence[str] = (),
) -> UserHistory:
    """Order the items by ``created_at`` where all have one, drop exact duplicates (the oldest stays), and say so.

    Items that differ only in what was rejected become one.
    """
    said = list(notes)
    num_dated = sum(item.created_at is not None for item in items)
    ordered = in_order(items)
    if num_dated < len(items):
        found = f"only {num_dated} of {len(items)} items have" if num_dated else "the items have no"
        said.append(f"{found} created_at: their order is taken as oldest first")
    oldest: dict[str, Item] = {}
    num_duplicates = 0
    for item in ordered:
        key = item.key
        known = oldest.setdefault(key, item)
        if known is not item:
            oldest[key] = known.with_rejected(item.rejected)
            num_duplicates += oldest[key] == known
    unique = list(oldest.values())
    if num_duplicates:
        said.append(
            f"{_count(num_duplicates, 'exact duplicate')} removed, {len(unique)} items left"
        )
    return UserHistory(
        user_id=user_id,
        items=unique,
        queries=list(queries),
        instruction=instruction,
        formats=dict(formats or {}),
        target=target,
        notes=said,
    )


def in_order(items: Sequence[Item]) -> list[Item]:
    """Oldest first where every item has ``created_at``, else as they came; equal times keep their order."""
    dated = [(item.created_at, item) for item in items if item.created_at is not None]
    if len(dated) < len(items):
        return list(items)
    return [item for _, item in sorted(dated, key=lambda pair: pair[0])]


def parse_time(value: Any, where: str) -> datetime | None:
    """Read an ISO 8601 time, a date (a year or a month will do), or unix seconds or milliseconds; naive is UTC."""
    if value is None or value == "":
        return None
    try:
        if isinstance(value, str | int) and (date := _DATE.fullmatch(str(value))):
            year, month, day = (int(part or 1) for part in date.groups())
            return datetime(year, month, day, tzinfo=UTC)
        parsed = _DATETIME.validate_python(value)
    except (ValidationError, ValueError):
        found = "a number out of range" if isinstance(value, int) else shown(value)
        raise HistoryError(
            f"{where}: the time is {found}; expected ISO 8601 (2024-05-31T12:00:00Z), a date or unix seconds"
        ) from None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def shown(value: Any) -> str:
    """Return a value that was found, whatever it is, short enough for a message."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # a number of more digits than Python prints
        return type(value).__name__


def checked_text(value: Any, what: str, where: str) -> str:
    """Return ``value`` if it is text that can be encoded, else raise HistoryError that names it."""
    if not isinstance(value, str):
        raise HistoryError(f"{where}: {what} must be text, not {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise HistoryError(
            f"{where}: {what} holds half of a surrogate pair at character {error.start}"
        ) from None
    return value


def checked_name(value: Any, what: str, where: str) -> str:
    """Return a name, a user's or a conversation's, as text: any text but an empty one, or a whole number."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    name = checked_text(value, what, where)
    if not name:
        raise HistoryError(f"{where}: {what} is empty")
    return name


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
