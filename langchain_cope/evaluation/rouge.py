"""ROUGE for every script: rouge-score's measures over words, or signs where no spaces part words.

rouge-score's own tokenizer keeps nothing but a to z and digits. On English in ASCII this one gives
the same tokens; elsewhere identical texts score 1. `docs/evaluation.md` says what a token is.
"""

import unicodedata
from collections.abc import Sequence

import regex
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

MEASURES = ("rouge1", "rougeL")

# Scripts that write no spaces between words: Chinese and Japanese, then (Line_Break=SA, which is
# how Unicode tells them) Thai, Lao, Khmer, Burmese and their kin.
_UNSPACED = r"[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Bopomofo}\p{Line_Break=SA}]"
_TOKEN = regex.compile(
    rf"""
      (?=[[\p{{L}}\p{{N}}]&&{_UNSPACED}]) \X \p{{M}}*             # one sign of these
    | (?=[\p{{Extended_Pictographic}}\p{{Regional_Indicator}}]) \X  # an emoji
    | [[\p{{L}}\p{{N}}]--{_UNSPACED}]                               # a word with all its marks;
      [[\p{{L}}\p{{N}}\p{{M}}\u200c\u200d]--{_UNSPACED}]*           # joiners stand inside words
    """,
    regex.VERBOSE | regex.VERSION1,
)
_SIGN = regex.compile(r"(?!\s)\X")


class AnyScript(Tokenizer):  # type: ignore[misc]
    """Words of scripts with spaces, single signs of those without, emoji.

    Case and compatible forms (`NFKC`) make no difference. A word of a to z and digits is stemmed as
    rouge-score does it. A text without any word, `:-)` say, is split into its signs.
    """

    def __init__(self) -> None:
        self._english = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of `text` in order."""
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        tokens: list[str] = []
        for token in _TOKEN.findall(folded):
            tokens += self._english.tokenize(token) if token.isascii() else [token]
        return tokens or list(_SIGN.findall(folded))


def mean_rouge(references: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Return the mean f-measure, 0 to 1, of each of `MEASURES` over pairs of texts."""
    scorer = RougeScorer(list(MEASURES), tokenizer=AnyScript())
    scores = [scorer.score(*pair) for pair in zip(references, answers, strict=True)]
    return {
        measure: sum(score[measure].fmeasure for score in scores) / len(scores)
        for measure in MEASURES
    }
