"""Which of a user's items are most like a text: BM25 over their words, no model and no index.

A word that most items hold says little; an item that shares too little with the text is none.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from langchain_cope.history.items import Item

LEAST_SHARE = 0.1
"""Of the text's words, by their weight, that an item holds at least.

Likeness of words tells what is about the same, and not whether the same kind of text is asked for:
this keeps away what shares next to nothing.
"""
_SATURATION, _LENGTH_WEIGHT = 1.2, 0.75  # BM25's k1 and b, their usual values
_WORD = re.compile(r"\w+")


def most_alike(items: Sequence[Item], text: str, number: int) -> list[Item]:
    """Return up to `number` of `items` that are most like `text`, the most alike last.

    An item's prompt and completion count alike. Of equal ones the newer is taken, which is the
    later.
    """
    documents = [Counter(_words(f"{_prompt_text(item)} {item.completion}")) for item in items]
    asked = set(_words(text))
    held_by = Counter(word for document in documents for word in document.keys() & asked)
    weights = {word: _weight(held_by[word], len(items)) for word in asked}
    least = LEAST_SHARE * sum(weights.values())
    lengths = [document.total() for document in documents]
    usual = sum(lengths) / len(lengths) if lengths else 0
    ranked = []
    for place, (document, length) in enumerate(zip(documents, lengths, strict=True)):
        shared = document.keys() & asked
        held = sum(weights[word] for word in shared)
        if held > 0 and held >= least:
            norm = _SATURATION * (1 - _LENGTH_WEIGHT + _LENGTH_WEIGHT * length / usual)
            score = sum(
                weights[word] * document[word] * (_SATURATION + 1) / (document[word] + norm)
                for word in shared
            )
            ranked.append((score, place))
    best = sorted(ranked)[max(0, len(ranked) - number) :]
    return [items[place] for _, place in best]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _prompt_text(item: Item) -> str:
    return " ".join(str(message["content"]) for message in item.messages)


def _weight(num_holding: int, num_items: int) -> float:
    """Return a word's inverse document frequency: near 0 for one that nearly all items hold."""
    return math.log1p((num_items - num_holding + 0.5) / (num_holding + 0.5))
