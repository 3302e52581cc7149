"""ROUGE for every script: rouge-score's measures over words, or signs where no spaces part words.

rouge-score's own tokenizer keeps nothing but a to z and digits. On English in ASCII this one gives
the same tokens; elsewhere identical texts score 1. `docs/evaluation.md` says what a token is.
"""

from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from langchain_cope.evaluation.words import words

MEASURES = ("rouge1", "rougeL")


class AnyScript(Tokenizer):  # type: ignore[misc]
    """The words of every script; one of a to z and digits is stemmed as rouge-score does it."""

    def __init__(self) -> None:
        self._english = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of `text` in order."""
        tokens: list[str] = []
        for word in words(text):
            is_english = word.isascii() and word.isalnum()
            tokens += self._english.tokenize(word) if is_english else [word]
        return tokens


def mean_rouge(references: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Return the mean f-measure, 0 to 1, of each of `MEASURES` over pairs of texts."""
    scorer = RougeScorer(list(MEASURES), tokenizer=AnyScript())
    scores = [scorer.score(*pair) for pair in zip(references, answers, strict=True)]
    return {
        measure: sum(score[measure].fmeasure for score in scores) / len(scores)
        for measure in MEASURES
    }
