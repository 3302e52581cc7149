"""Of 200 fleets in which nobody gains, at most 5 % publish anyone; real gains are found."""

import numpy as np
import pytest

from langchain_cope.fleet.discoveries import LEVEL, discoveries
from langchain_cope.personalization.certainty import certainty, prior_of
from langchain_cope.personalization.evidence import Evidence
from langchain_cope.personalization.verdict import Reference, judge

PRIOR = prior_of({})
NUM_FLEETS, NUM_USERS = 200, 50


def verdict(gains, reads_prompts=False):
    nothing = [0.0] * len(gains)
    evidence = Evidence(first_sights=list(gains), trained_pairing=[], held_out_pairing=[])
    references = [Reference("the base", gains, is_base=True)]
    return judge("sft", nothing, references, range(len(gains)), evidence, PRIOR)


def noise(random, kind, num_texts):
    """Return gains of a user who gains nothing: mean 0, of an item's usual spread."""
    match kind:
        case "normal":
            return random.normal(0, 0.3, num_texts)
        case "heavy-tailed":
            return random.standard_t(3, num_texts) * 0.2
        case "skewed":
            return 0.3 - random.exponential(0.3, num_texts)
        case "a topic's luck":  # all texts of a user share some of it: no test can tell that
            return random.normal(0, 0.3, num_texts) + random.normal(0, 0.02)


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "skewed", "a topic's luck"])
def test_of_fleets_without_any_effect_few_publish_anyone(kind: str) -> None:
    random = np.random.default_rng(0)
    num_publishing = 0
    for _ in range(NUM_FLEETS):
        verdicts = [
            verdict(noise(random, kind, int(random.integers(2, 20))).tolist())
            for _ in range(NUM_USERS)
        ]
        p_values = [one.p_value if one.published else 1.0 for one in verdicts]
        num_publishing += any(discoveries(p_values))
    assert num_publishing <= 0.05 * NUM_FLEETS
    # One user alone would have been published more often than that: the test is no empty one.
    assert certainty([0.2, 0.25, 0.3, 0.1], PRIOR) > 0.9


def test_those_who_gain_are_found_among_those_who_do_not() -> None:
    random = np.random.default_rng(1)
    false = found = 0
    for _ in range(40):
        gains = [random.normal(0.3 if user < 20 else 0, 0.3, 12) for user in range(40)]
        verdicts = [verdict(each.tolist()) for each in gains]
        chosen = discoveries([one.p_value if one.published else 1.0 for one in verdicts])
        found += sum(chosen[:20])
        false += sum(chosen[20:])
    assert found > 0.7 * 20 * 40
    assert false / (found + false) < LEVEL


def test_the_greatest_step_that_holds_counts() -> None:
    # 0.02 is above its own step (0.0125) and comes in with 0.024, which is below its (0.025).
    assert discoveries([0.9, 0.02, 0.024, 0.8], 0.05) == [False, True, True, False]
    assert discoveries([0.02, 0.9, 0.9, 0.9], 0.05) == [False] * 4
    assert discoveries([]) == []
