"""What answers repeat (the user's history, the prompt, one another), and how long they are.

Counted in `words`, but for `most_repeated`, which needs none; without a count where a text is too
short for one.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from langchain_cope.evaluation.words import words

COPIED_WORDS = 4  # words in a row that make a copy
# A piece of a text, three times in a row or more.
_RUN = re.compile(r"(.{1,200}?)\1{2,}", re.DOTALL)

Gram = tuple[str, ...]


@dataclass(frozen=True)
class CopyRates:
    """Shares, 0 to 1, of the runs of `COPIED_WORDS` words in one user's answers."""

    from_history: float
    """Stand in the user's history and not in the prompt: what was learnt by heart."""
    from_prompt: float
    """Stand in the prompt that was answered."""


def copy_rates(
    answers: Sequence[str], prompts: Sequence[str], history: Iterable[str]
) -> CopyRates | None:
    """Return what one user's answers copy, each compared with its own prompt and all the history.

    None where no answer has `COPIED_WORDS` words.
    """
    in_history = set(_grams_of_all(history, COPIED_WORDS))
    num_grams = from_history = from_prompt = 0
    for answer, prompt in zip(answers, prompts, strict=True):
        in_prompt = set(_grams(prompt, COPIED_WORDS))
        for gram in _grams(answer, COPIED_WORDS):
            num_grams += 1
            from_prompt += gram in in_prompt
            from_history += gram in in_history and gram not in in_prompt
    if not num_grams:
        return None
    return CopyRates(from_history / num_grams, from_prompt / num_grams)


def distinct(answers: Iterable[str], length: int) -> float | None:
    """Return how many of the runs of `length` words in all `answers` differ, as a share of them.

    This is distinct-n. It falls with the number of words: compare like with like. None where no
    answer has `length` words.
    """
    grams = list(_grams_of_all(answers, length))
    return len(set(grams)) / len(grams) if grams else None


def most_repeated(text: str) -> int:
    """Return how often one piece stands in a row in `text`, where that is half of it or more.

    It is 1 where no piece does so three times at least.
    """
    text = " ".join(text.casefold().split())
    # Between spaces, so that the first word and the last are like the others.
    runs = (run for run in _RUN.finditer(f" {text} ") if 2 * len(run[0]) >= len(text))
    return max((len(run[0]) // len(run[1]) for run in runs), default=1)


def mean_num_words(answers: Sequence[str]) -> float:
    """Return the mean length of `answers` in words."""
    return sum(len(words(answer)) for answer in answers) / len(answers)


def _grams_of_all(texts: Iterable[str], length: int) -> Iterator[Gram]:
    for text in texts:
        yield from _grams(text, length)


def _grams(text: str, length: int) -> Iterator[Gram]:
    """Yield each run of `length` words in `text`."""
    of_text = words(text)
    for start in range(len(of_text) - length + 1):
        yield tuple(of_text[start : start + length])
