"""Of 200 fleets in which nobody gains, at most 5 % publish anyone; real gains are found."""

import numpy as np
import pytest

from langchain_cope.fleet.discoveries import LEVEL, discoveries
from langchain_cope.fleet.skewed_gains import Gains, p_values
from langchain_cope.personalization.certainty import certainty, in_sds, prior_of, skewness
from langchain_cope.personalization.evidence import Evidence
from langchain_cope.personalization.verdict import Reference, judge

PRIOR = prior_of({})
NUM_FLEETS, NUM_USERS, NUM_TEXTS = 200, 30, (3, 5, 8, 12, 20)


def p_value(gains: np.ndarray) -> float:
    """Return the p-value of a verdict on those gains; whom the gate refuses counts here, too."""
    return 1 - certainty(gains.tolist(), PRIOR.sceptical)


def found(fleet: list[np.ndarray]) -> list[bool]:
    """Return who of a fleet with those gains is published."""
    users = [
        Gains(p_value(gains), len(gains), in_sds(gains.tolist()), skewness(gains.tolist()))
        for gains in fleet
    ]
    return discoveries(p_values(users))


def noise(random: np.random.Generator, kind: str, num_texts: int) -> np.ndarray:
    """Return the gains on each text of a user who gains nothing on average."""
    if kind == "normal":
        return random.normal(0, 0.3, num_texts)
    if kind == "heavy-tailed":
        return random.standard_t(3, num_texts) * 0.2
    gains = random.exponential(0.3, num_texts) - 0.3
    return gains if kind == "skewed to the right" else -gains  # a few texts gain or lose much


@pytest.mark.parametrize(
    "kind", ["normal", "heavy-tailed", "skewed to the right", "skewed to the left"]
)
def test_of_fleets_without_any_effect_few_publish_anyone(kind: str) -> None:
    random = np.random.default_rng(0)
    num_publishing = num_alone = 0
    for _ in range(NUM_FLEETS):
        fleet = [noise(random, kind, int(random.choice(NUM_TEXTS))) for _ in range(NUM_USERS)]
        num_publishing += any(found(fleet))
        if kind == "normal":
            num_alone += any(p_value(gains) < 0.1 for gains in fleet)
    assert num_publishing <= 0.05 * NUM_FLEETS
    if kind == "normal":
        assert num_alone > 0.5 * NUM_FLEETS  # one by one, most fleets would publish somebody


def test_those_who_gain_are_found_among_those_who_do_not() -> None:
    random = np.random.default_rng(1)
    false = right = 0
    for _ in range(40):
        fleet = [random.normal(0.3 if user < 20 else 0, 0.3, 12) for user in range(40)]
        chosen = found(fleet)
        right += sum(chosen[:20])
        false += sum(chosen[20:])
    assert right > 0.6 * 20 * 40
    assert false / (right + false) < LEVEL


def test_a_verdicts_p_value_is_without_belief_and_of_the_hardest_reference() -> None:
    base, other = [0.3, 0.2, 0.4, 0.25, 0.3], [0.1, -0.1, 0.2, 0.0, 0.1]
    evidence = Evidence(first_sights=base, trained_pairing=[], held_out_pairing=[])
    references = [
        Reference("the base", base, is_base=True),
        Reference("the reference adapter", other),
        Reference("the active version", [-1.0] * 5, level=0.5),  # proven when it was published
    ]
    verdict = judge("sft", [0.0] * 5, references, range(5), evidence, PRIOR)
    assert verdict.p_value == pytest.approx(p_value(np.array(other)))
    assert verdict.mean_in_sds == pytest.approx(in_sds(other))
    assert verdict.skewness == pytest.approx(skewness(other))
    assert skewness([0.1, 0.1, 0.1, -0.9]) < 0 == skewness([0.1, 0.2])


def test_the_greatest_step_that_holds_counts() -> None:
    # 0.02 is above its own step (0.0125) and comes in with 0.024, which is below its (0.025).
    assert discoveries([0.9, 0.02, 0.024, 0.8], 0.05) == [False, True, True, False]
    assert discoveries([0.02, 0.9, 0.9, 0.9], 0.05) == [False] * 4
    assert discoveries([]) == []
