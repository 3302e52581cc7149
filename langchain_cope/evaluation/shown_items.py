"""A user's own items in the prompt, as earlier turns: the newest, or those most like the question.

This is what personalization without training does, and what an adapter has to beat.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from langchain_cope.evaluation.ways import Shown
from langchain_cope.history.items import Item
from langchain_cope.history.similar import most_alike

if TYPE_CHECKING:
    from langchain_cope.engine import Base, Message

NUM_RETRIEVED = 3


class OwnItems:
    """One user's items, oldest first, and the prompts that show some of them."""

    def __init__(self, base: "Base", items: Sequence[Item]) -> None:
        self._base = base
        self._items = items

    def prompt(self, question: "Sequence[Message]", shown: Shown, answer: int) -> "list[Message]":
        """Return `question` after the items that `shown` chooses, as far as they fit.

        Args:
            question: The messages to answer.
            shown: Which items.
            answer: Tokens of the context that stay free.
        """

        def fits(items: Sequence[Item]) -> bool:
            prompt = self._base.prompt_ids(_with_items(question, items))
            return len(prompt) + answer <= self._base.context

        if shown is Shown.NEWEST:
            return _with_items(question, self._newest(fits))
        if shown is Shown.RETRIEVED:
            return _with_items(question, self._retrieved(question, fits))
        return list(question)

    def _newest(self, fits: Callable[[Sequence[Item]], bool]) -> Sequence[Item]:
        low, high = 0, len(self._items)  # `low` fit, more than `high` do not
        while low < high:
            middle = (low + high + 1) // 2
            if fits(self._items[-middle:]):
                low = middle
            else:
                high = middle - 1
        return self._items[-low:] if low else []

    def _retrieved(
        self, question: "Sequence[Message]", fits: Callable[[Sequence[Item]], bool]
    ) -> Sequence[Item]:
        """Return the items most like `question` that fit, the most alike last."""
        chosen = most_alike(self._items, _last_text(question), NUM_RETRIEVED)
        while chosen and not fits(chosen):
            chosen = chosen[1:]
        return chosen


def _with_items(question: "Sequence[Message]", items: Sequence[Item]) -> "list[Message]":
    """Return the items as turns before `question`, whose own system message stays in front."""
    system = [message for message in question if message["role"] == "system"]
    turns = [*(turn for item in items for turn in item.turns), *question]
    return [*system, *(turn for turn in turns if turn["role"] != "system")]


def _last_text(messages: "Sequence[Message]") -> str:
    return str(messages[-1]["content"])
