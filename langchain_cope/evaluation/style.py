"""A text without what it is about: function words, punctuation and the shapes of other words."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

import regex

from langchain_cope.evaluation.words import UNSPACED

MIN_SHARE = 0.9  # of the users use a function word

_LETTERS = regex.compile(r"[\p{L}\p{M}\p{N}]+")
_UNSPACED_LETTER = regex.compile(rf"[\p{{L}}&&{UNSPACED}]", regex.VERSION1)
_LETTER = regex.compile(r"\p{L}")


def mask_for(texts_of_users: Iterable[Sequence[str]]) -> Callable[[str], str]:
    """Return what masks a text: it keeps the function words of these users.

    A function word is one that nearly all of them use, in whatever language they write. Of any
    other word the shape is kept, `Xx` for "Anna", `xXx` for "iPhone", `9` for "2024". Punctuation,
    emoji and white space stay.
    """
    vocabularies = [
        {word for text in texts for word in _LETTERS.findall(text.casefold())}
        for texts in texts_of_users
    ]
    num_users_of = Counter(word for vocabulary in vocabularies for word in vocabulary)
    function_words = {
        word
        for word, num_users in num_users_of.items()
        if num_users >= MIN_SHARE * len(vocabularies) and not regex.search(r"\p{N}", word)
    }

    def masked(found: "regex.Match[str]") -> str:
        word = found[0]
        return word if word.casefold() in function_words else _shape(word)

    return lambda text: _LETTERS.sub(masked, text)


def share_unspaced(texts: Iterable[str]) -> float:
    """Return the share of letters, 0 to 1, of scripts that write no spaces between words."""
    num_letters = num_unspaced = 0
    for text in texts:
        num_letters += len(_LETTER.findall(text))
        num_unspaced += len(_UNSPACED_LETTER.findall(text))
    return num_unspaced / num_letters if num_letters else 0.0


def _shape(word: str) -> str:
    """Return the kinds of signs in `word`, each run of one kind once; marks do not count."""
    kinds = [
        "9" if sign.isnumeric() else "X" if sign.isupper() else "x"
        for sign in word
        if not regex.match(r"\p{M}", sign)
    ]
    return "".join(kind for kind, _ in groupby(kinds))
