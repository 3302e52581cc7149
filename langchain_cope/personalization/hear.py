"""What the gate hears: whether an adapter's answers fall apart.

Likelihood does not tell. An adapter may find every text of its user far likelier than the base
does, and yet answer "no no no no" to everything: what is likely once is likelier still after
itself. So the greedy answers to held-out prompts are looked at, beside the base's to the same.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import comb
from typing import TYPE_CHECKING

from langchain_cope.evaluation.repetition import most_repeated
from langchain_cope.evaluation.ways import BASE
from langchain_cope.personalization.choose_strength import Trial, recommendation
from langchain_cope.personalization.result import Recommendation
from langchain_cope.strength import Strength

if TYPE_CHECKING:
    from langchain_cope.evaluation.evaluate import Evaluation

MOST_ASKED = 8  # prompts, the newest, where the evaluation has no answers at the strength
MANNER = 0.1  # of the user's own texts: what so many of them do is no fault
MANY, LOOKED_AT = 100, 2000  # of these texts, the newest, and characters of each
REPEATED = 3  # times in a row: so often nothing is said by chance
USUAL_SHARE = 0.4  # of answers: of no adapter that was measured to work do more fall apart
CHANCE = 0.1  # that such an adapter is held to be broken, at most


def hear(
    trial: Trial, evaluation: "Evaluation", own: Sequence[str], recommended: Recommendation
) -> tuple[Recommendation, str | None]:
    """Return how strongly an adapter is to act, and what is then wrong with its answers.

    Nothing is wrong: None. Where it is the contrast alone that is to blame, the adapter is to act
    without; an α of the recipe's own is kept.

    Args:
        trial: of the items that judge.
        evaluation: of these items.
        own: the user's texts.
        recommended: how strongly the adapter was to act.

    Raises:
        Cancelled: the trial's monitor asked for a stop.
    """
    base = [texts[BASE.name] for texts in evaluation.texts]
    strength = Strength(recommended.alpha, recommended.tau, recommended.adapter_scale)
    fault = _fault(trial, strength, base, own)
    if fault is None or not strength.alpha or trial.recipe.alpha is not None:
        return recommended, fault
    alone = replace(strength, alpha=0.0)
    if _fault(trial, alone, base, own) is not None:
        return recommended, fault
    why = f"without contrast: with α {strength.alpha:g} {fault}"
    return recommendation(alone, why, recommended.num_texts), None


def _fault(trial: Trial, strength: Strength, base: Sequence[str], own: Sequence[str]) -> str | None:
    """Return what is wrong: too many answers fall apart where the base's do not."""
    if not strength.alpha:
        strength = replace(strength, tau=Strength.tau)  # which plays no part then
    answers = trial.known.get(strength)
    if answers is None:
        asked = replace(trial, examples=trial.examples[-MOST_ASKED:], known={})
        answers, base = asked.answers([strength])[strength], base[-MOST_ASKED:]
    pairs = zip(answers, base, strict=True)
    broken = [answer for answer, of_base in pairs if _is_broken(answer) > _is_broken(of_base)]
    if _are_too_many(len(broken), len(answers)):
        # Only then the user's manner has to be known.
        usual = [most_repeated(text[:LOOKED_AT]) for text in own[-MANY:]]
        broken = [answer for answer in broken if not _is_manner(answer, usual)]
    if not _are_too_many(len(broken), len(answers)):
        return None
    num_empty = sum(not answer.strip() for answer in broken)
    what = "are empty" if 2 * num_empty > len(broken) else "repeat themselves"
    return (
        f"its answers {what}: {len(broken)} of {len(answers)}, where the base's do not fall apart"
    )


def _are_too_many(num_broken: int, num_answers: int) -> bool:
    """Return whether an adapter that works would hardly ever show so many: 3 of 3, 5 of 6, 8 of 12.

    The chance of so many or more, where each falls apart with the chance `USUAL_SHARE`. Two answers
    are too few to tell.
    """
    chances = (
        comb(num_answers, number)
        * USUAL_SHARE**number
        * (1 - USUAL_SHARE) ** (num_answers - number)
        for number in range(num_broken, num_answers + 1)
    )
    return sum(chances) <= CHANCE


def _is_broken(answer: str) -> bool:
    return not answer.strip() or most_repeated(answer) >= REPEATED


def _is_manner(answer: str, usual: Sequence[int]) -> bool:
    """Return whether so many of the user's own texts repeat a piece as often as the answer does."""
    times = most_repeated(answer)
    return times >= REPEATED and sum(one >= times for one in usual) >= MANNER * len(usual)
