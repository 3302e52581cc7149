"""One user's voice without other users to compare with: from the base's words to the user's own.

The same likeness as in `voice.py`, in the style view, on a scale of one's own: 0 is where the
base's answers to the same prompts lie, 1 where the user's do. Above 1 is caricature. Words that
stand in every part of the history count as manner, whatever they are: there is nobody to compare
them with. Needs scikit-learn (extra `evaluate`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from langchain_cope.evaluation.over_users import require_scikit_learn
from langchain_cope.evaluation.style import mask_for, share_unspaced
from langchain_cope.evaluation.voice import (
    MAX_PROFILE,
    MAX_UNSPACED,
    MIN_HISTORY,
    RUN,
    Silent,
    runs_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

PARTS = 5  # of a history; a word that stands in all of them is a function word of its user's
SURE = 2.0  # standard errors by which own words must be nearer than the base's


@dataclass(frozen=True)
class OwnVoice:
    """The scale of one user; `own_voice` builds it."""

    floor: float
    """How like the profile the base's answers are, as a cosine."""
    ceiling: float
    """How like it the user's own words are."""
    _see: "Callable[[str], str]" = field(repr=False)
    _vectorizer: Any = field(repr=False)
    _profile: Any = field(repr=False)

    def aim(self, answers: Sequence[str]) -> float:
        """Return how near answers come to the user, 1 at most: above it they go away again."""
        position = (self.likeness(answers) - self.floor) / (self.ceiling - self.floor)
        return 1 - abs(1 - position)

    def likeness(self, texts: Sequence[str]) -> float:
        """Return the cosine of the texts, taken together, with the profile."""
        vector = self._vectorizer.transform(["\n".join(map(self._see, texts))])
        return float((vector @ self._profile.T).toarray()[0, 0])


def own_voice(
    history: Sequence[str], own: Sequence[str], of_base: Sequence[str]
) -> OwnVoice | Silent:
    """Return the scale of a user, or why there is none.

    Args:
        history: what the user wrote, oldest first: the newest 60 make the profile.
        own: what the user wrote to some prompts that are not of `history`.
        of_base: what the base answers to those.

    Raises:
        InputError: scikit-learn is not installed.
    """
    require_scikit_learn()
    from sklearn.feature_extraction.text import TfidfVectorizer

    newest = history[-MAX_PROFILE:]
    if len(newest) < MIN_HISTORY:
        return Silent(f"{len(newest)} texts make no profile, {MIN_HISTORY} are needed")
    if share_unspaced(newest) > MAX_UNSPACED:
        return Silent("no word boundaries: the script writes no spaces between words")
    see = mask_for([newest[part::PARTS] for part in range(PARTS)])
    if not any(len(see(text)) >= RUN for text in newest):
        return Silent(f"no text has {RUN} characters beside what it is about")
    vectorizer = TfidfVectorizer(analyzer=runs_of, sublinear_tf=True)
    vectorizer.fit(map(see, newest))
    profile = vectorizer.transform(["\n".join(map(see, newest))])
    scale = OwnVoice(0.0, 1.0, see, vectorizer, profile)
    floor, ceiling = scale.likeness(of_base), scale.likeness(own)
    error = jackknife_error(
        [
            scale.likeness(_without(own, left_out)) - scale.likeness(_without(of_base, left_out))
            for left_out in range(len(own))
        ]
    )
    if ceiling - floor <= SURE * error:
        return Silent("the base's own answers cannot be told from what the user wrote")
    return OwnVoice(floor, ceiling, see, vectorizer, profile)


def gain(scale: OwnVoice, answers: Sequence[str], usual: Sequence[str]) -> tuple[float, float]:
    """Return how much nearer to the user `answers` come than `usual`, and the standard error.

    Both answer the same prompts, one by one; the error is by the jackknife over prompts.
    """
    leaving_out = [
        scale.aim(_without(answers, left_out)) - scale.aim(_without(usual, left_out))
        for left_out in range(len(answers))
    ]
    return scale.aim(answers) - scale.aim(usual), jackknife_error(leaving_out)


def jackknife_error(leaving_out: Sequence[float]) -> float:
    """Return the standard error of a figure, given its values where one item each is left out."""
    n, mean = len(leaving_out), fmean(leaving_out)
    return float(((n - 1) / n * sum((value - mean) ** 2 for value in leaving_out)) ** 0.5)


def _without(texts: Sequence[str], left_out: int) -> list[str]:
    return [text for index, text in enumerate(texts) if index != left_out]
