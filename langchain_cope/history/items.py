"""What a history is: items of one user, oldest first, each a prompt and what the user wrote.

Knows no files, no formats and no database. Whatever reads a history ends in `settle`, which puts
the items in order and removes duplicates.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from langchain_cope.history.order import oldest_first
from langchain_cope.text import count

Message = dict[str, Any]
"""A chat message, `{"role": …, "content": …}`; the role is system, user, assistant or tool.

An assistant's may have `tool_calls`, and a tool's the `tool_call_id` and `name` of its call.
"""
Target = Literal["assistant", "user"]
"""The side of a conversation that is learnt: its turns are the completions."""


class Item(BaseModel):
    """One thing the user wrote, and what it answers.

    `prompt` is a text (one user message) or messages that end in a user or tool turn; a
    `created_at` without a time zone is taken as UTC; items of one `conversation` are never split
    between training and held-out items. `rejected` are answers to the prompt that the user liked
    less than the completion: DPO takes each of these pairs as it is, and no negative is mined for
    the item.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str | list[Message]
    completion: str
    created_at: datetime | None = None
    conversation: str | None = None
    rejected: tuple[str, ...] = ()

    @field_validator("prompt")
    @classmethod
    def _of_texts(cls, value: str | list[Message]) -> str | list[Message]:
        for message in value if isinstance(value, list) else ():
            if not all(isinstance(message.get(key), str) for key in ("role", "content")):
                raise ValueError("a message of a prompt needs a role and a content, both texts")
        return value

    @field_validator("created_at")
    @classmethod
    def _aware(cls, value: datetime | None) -> datetime | None:
        if value is not None and value.tzinfo is None:
            return value.replace(tzinfo=UTC)
        return value

    @property
    def messages(self) -> list[Message]:
        """The prompt as messages."""
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}]
        return list(self.prompt)

    @property
    def turns(self) -> list[Message]:
        """The prompt and the completion as messages."""
        return [*self.messages, {"role": "assistant", "content": self.completion}]

    @property
    def key(self) -> str:
        """A text that two items share exactly when prompt and completion are the same."""
        return json.dumps([self.messages, self.completion], sort_keys=True)

    def with_rejected(self, answers: Iterable[str]) -> "Item":
        """Return the item with `answers` among the rejected ones, each once.

        The completion itself is never one of them.
        """
        rejected = dict.fromkeys([*self.rejected, *answers])
        rejected.pop(self.completion, None)
        return self.model_copy(update={"rejected": tuple(rejected)})


class UserHistory(BaseModel):
    """One user's items, oldest first, without duplicates.

    `queries` are newer items that are never trained on. `instruction` is the fixed text that stands
    in where an item had no prompt, None where every item had one. `formats` counts the rows of each
    format, and `target` is the side of the conversations that is learnt, None without
    conversations. `shareable` says that a model which others use may be trained on the items.
    `notes` are sentences for people on what was decided.
    """

    user_id: str | None
    items: list[Item]
    queries: list[Item] = []
    instruction: str | None = None
    formats: dict[str, int] = {}
    target: Target | None = None
    shareable: bool = False
    notes: list[str] = []

    @property
    def num_pairs(self) -> int:
        """Number of pairs of a chosen and a rejected answer in the items."""
        return sum(len(item.rejected) for item in self.items)


def settle(
    user_id: str | None,
    items: Sequence[Item],
    *,
    queries: Sequence[Item] = (),
    instruction: str | None = None,
    formats: Mapping[str, int] | None = None,
    target: Target | None = None,
    shareable: bool = False,
    notes: Sequence[str] = (),
) -> UserHistory:
    """Return the history: items in order, without exact duplicates, and notes that say so.

    The order is that of `created_at`, as far as items have one. Of duplicates the oldest stays;
    items that differ only in what was rejected become one.
    """
    all_notes = list(notes)
    num_dated = sum(item.created_at is not None for item in items)
    if not num_dated and items:
        all_notes.append("the items have no created_at: their order is taken as oldest first")
    elif num_dated < len(items):
        all_notes.append(
            f"only {num_dated} of {len(items)} items have created_at: "
            "the others are placed by their neighbours"
        )
    unique, num_duplicates = _without_duplicates(in_order(items))
    if num_duplicates:
        removed = count(num_duplicates, "exact duplicate")
        all_notes.append(f"{removed} removed, {count(len(unique), 'item')} left")
    return UserHistory(
        user_id=user_id,
        items=unique,
        queries=list(queries),
        instruction=instruction,
        formats=dict(formats or {}),
        target=target,
        shareable=shareable,
        notes=all_notes,
    )


def key_of(items: Sequence[Item]) -> str:
    """Return a digest of `items`, which two histories do not share."""
    return hashlib.sha256("\n".join(item.key for item in items).encode()).hexdigest()


def in_order(items: Sequence[Item]) -> list[Item]:
    """Return the items oldest first; those without `created_at` are placed by their neighbours.

    Where none has a time, they stay as they came. Items of equal times keep their order.
    """
    return oldest_first([items], lambda item: item.created_at, lambda item: item.conversation)


def _without_duplicates(items: Sequence[Item]) -> tuple[list[Item], int]:
    """Return the first item of each prompt and completion with all that was rejected for it.

    The number is that of the items that said nothing new.
    """
    first: dict[str, Item] = {}
    num_duplicates = 0
    for item in items:
        key = item.key
        if key not in first:
            first[key] = item
            continue
        merged = first[key].with_rejected(item.rejected)
        if merged == first[key]:
            num_duplicates += 1
        first[key] = merged
    return list(first.values()), num_duplicates
