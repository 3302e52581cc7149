"""A user's own items in the prompt, as earlier turns: the newest, or those most like the question.

This is what personalization without training does, and what an adapter has to beat.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from langchain_cope.evaluation.ways import Shown
from langchain_cope.history.items import Item
from langchain_cope.history.similar import most_alike

if TYPE_CHECKING:
    from langchain_cope.engine import Base, Message

NUM_RETRIEVED = 3

Question: TypeAlias = "tuple[Sequence[Message], int]"
"""The messages to answer, and the tokens of the context that stay free for the answer."""


class OwnItems:
    """One user's items, oldest first, and the prompts that show some of them."""

    def __init__(self, base: "Base", items: Sequence[Item]) -> None:
        self._base = base
        self._items = items

    def prompts(self, questions: Sequence[Question], shown: Shown) -> "list[list[Message]]":
        """Return each question after the items that `shown` chooses, as far as they fit.

        The newest are the same for all questions: an engine reads them once.
        """
        if shown is Shown.NEWEST:
            newest = self._newest(questions)
            return [_with_items(messages, newest) for messages, _ in questions]
        if shown is Shown.RETRIEVED:
            return [_with_items(question[0], self._retrieved(question)) for question in questions]
        return [list(messages) for messages, _ in questions]

    def _newest(self, questions: Sequence[Question]) -> Sequence[Item]:
        """Return as many of the newest as fit with every question."""
        low, high = 0, len(self._items)  # `low` fit, more than `high` do not
        while low < high:
            middle = (low + high + 1) // 2
            if all(self._fits(self._items[-middle:], question) for question in questions):
                low = middle
            else:
                high = middle - 1
        return self._items[-low:] if low else []

    def _retrieved(self, question: Question) -> Sequence[Item]:
        """Return the items most like `question` that fit, the most alike last."""
        chosen = most_alike(self._items, _last_text(question[0]), NUM_RETRIEVED)
        while chosen and not self._fits(chosen, question):
            chosen = chosen[1:]
        return chosen

    def _fits(self, items: Sequence[Item], question: Question) -> bool:
        messages, answer = question
        prompt = self._base.prompt_ids(_with_items(messages, items))
        return len(prompt) + answer <= self._base.context


def _with_items(question: "Sequence[Message]", items: Sequence[Item]) -> "list[Message]":
    """Return the items as turns before `question`, whose own system message stays in front."""
    system = [message for message in question if message["role"] == "system"]
    turns = [*(turn for item in items for turn in item.turns), *question]
    return [*system, *(turn for turn in turns if turn["role"] != "system")]


def _last_text(messages: "Sequence[Message]") -> str:
    return str(messages[-1]["content"])
