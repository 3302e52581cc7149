"""How like an answer is to what the user wrote to the same prompt, by characters: chrF.

ROUGE counts whole words, of which a short text has a handful: it says little of few texts. chrF
(Popović, 2015) counts runs of one to six characters, so that a few texts tell more, in every
script. Above the user's own manner it falls again: caricature is not like the user.
"""

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev

from langchain_cope._environment import a_home


def likeness(own: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return the chrF of each answer, 0 to 1, with what the user wrote to the same prompt."""
    with a_home():  # nltk, which comes with rouge-score, does not load without
        from nltk.translate.chrf_score import sentence_chrf

    return [
        float(sentence_chrf(text, answer)) if text.strip() and answer.strip() else 0.0
        for text, answer in zip(own, answers, strict=True)
    ]


def gain(likeness_: Sequence[float], of_usual: Sequence[float]) -> tuple[float, float]:
    """Return by how much answers are more like the user than the usual ones, and its error.

    Both are of the same prompts, two at least; the error is the standard error of the mean.
    """
    gains = [one - usual for one, usual in zip(likeness_, of_usual, strict=True)]
    return fmean(gains), stdev(gains) / sqrt(len(gains))
