"""A user's own items in the prompt, as earlier turns: the newest, or those most like the question.

This is what personalization without training does, and what an adapter has to beat.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from langchain_cope.evaluation.ways import Shown
from langchain_cope.history.items import Item
from langchain_cope.history.similar import most_alike

if TYPE_CHECKING:
    from langchain_cope.engine import Base, Message

NUM_RETRIEVED = 3

ABOUT_AS_MANY = 1.1
"""A question is shown as many of the newest as another, where no more than so many times fit."""


@dataclass(frozen=True)
class Question:
    """What is asked, and the room that its answer needs."""

    messages: "Sequence[Message]"
    answer: int
    """Tokens of the context that stay free."""


class OwnItems:
    """One user's items, oldest first, and the user's questions after some of them."""

    def __init__(self, base: "Base", items: Sequence[Item], questions: Sequence[Question]) -> None:
        self._base = base
        self._items = items
        self._questions = questions

    def prompts(self, shown: Shown) -> "list[list[Message]]":
        """Return each question after the items that `shown` chooses, as far as they fit."""
        messages = [question.messages for question in self._questions]
        if shown is Shown.NOTHING:
            return list(map(list, messages))
        chosen = self._newest if shown is Shown.NEWEST else self._retrieved
        return list(map(_with_items, messages, chosen))

    @cached_property
    def _newest(self) -> list[Sequence[Item]]:
        """Return as many of the newest as fit, the same for questions with room for about as many.

        An engine then reads them once for all of these.
        """
        counts = [self._num_fitting(question) for question in self._questions]
        shared = {0: 0}
        common = 0
        for count in sorted(counts):
            if count > ABOUT_AS_MANY * common:
                common = count
            shared[count] = common
        return [self._items[len(self._items) - shared[count] :] for count in counts]

    def _num_fitting(self, question: Question) -> int:
        """Return how many of the newest items fit."""
        low, high = 0, len(self._items)  # `low` fit, more than `high` do not
        while low < high:
            middle = (low + high + 1) // 2
            if self._fits(self._items[-middle:], question):
                low = middle
            else:
                high = middle - 1
        return low

    @cached_property
    def _retrieved(self) -> list[Sequence[Item]]:
        """Return the items most like each question that fit, the most alike last."""
        return list(map(self._most_alike, self._questions))

    def _most_alike(self, question: Question) -> Sequence[Item]:
        chosen = most_alike(self._items, _last_text(question.messages), NUM_RETRIEVED)
        while chosen and not self._fits(chosen, question):
            chosen = chosen[1:]
        return chosen

    def _fits(self, items: Sequence[Item], question: Question) -> bool:
        prompt = self._base.prompt_ids(_with_items(question.messages, items))
        return len(prompt) + question.answer <= self._base.context


def _with_items(question: "Sequence[Message]", items: Sequence[Item]) -> "list[Message]":
    """Return the items as turns before `question`, whose own system message stays in front."""
    system = [message for message in question if message["role"] == "system"]
    turns = [*(turn for item in items for turn in item.turns), *question]
    return [*system, *(turn for turn in turns if turn["role"] != "system")]


def _last_text(messages: "Sequence[Message]") -> str:
    return str(messages[-1]["content"])
