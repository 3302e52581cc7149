"""How often the gate's statistics err, over thousands of simulated users with fixed seeds."""

import math
from collections.abc import Callable

import numpy
import pytest

from langchain_cope.personalization.certainty import (
    MOST_MEAN,
    Prior,
    certainty,
    items_needed,
    prior_of,
    student_cdf,
)
from langchain_cope.personalization.verdict import SURE

HELD_OUT = {5: 2, 10: 2, 20: 4, 30: 6, 80: 16}  # items of a history: those held out
USERS = 400
ITEM_SD = 0.05  # nats a token; what smollm2's items vary by

Draw = Callable[[numpy.random.Generator, int], numpy.ndarray]


def normal(random: numpy.random.Generator, n: int) -> numpy.ndarray:
    return random.standard_normal(n)


def heavy_tailed(random: numpy.random.Generator, n: int) -> numpy.ndarray:
    return random.standard_t(4, n) / math.sqrt(2)  # of standard deviation 1


def share_published(draw: Draw, num_held_out: int, effect: float, prior: Prior) -> float:
    """Return for how many simulated users it is sure that their adapter helps.

    It gains `effect` standard deviations of an item on average.
    """
    random = numpy.random.default_rng(7)
    users = [(effect + draw(random, num_held_out)) * ITEM_SD for _ in range(USERS)]
    return sum(certainty(list(gains), prior) >= SURE for gains in users) / USERS


@pytest.mark.parametrize("draw", [normal, heavy_tailed])
@pytest.mark.parametrize("num_items", HELD_OUT)
def test_adapters_that_teach_nothing_are_seldom_published(draw: Draw, num_items: int) -> None:
    # At its most believing: first sights, of another person's items say, are all in favour.
    prior = prior_of({}).leaning(1.0)
    error = 2 * math.sqrt(0.1 * 0.9 / USERS)
    assert share_published(draw, HELD_OUT[num_items], 0.0, prior) <= 0.1 + error


@pytest.mark.parametrize(
    ("num_items", "effect", "least"), [(30, 1.0, 0.7), (80, 0.5, 0.6), (80, 0.8, 0.9)]
)
def test_adapters_that_help_are_mostly_published(
    num_items: int, effect: float, least: float
) -> None:
    prior = prior_of({}).leaning(1.0)
    assert share_published(normal, HELD_OUT[num_items], effect, prior) >= least


def test_a_lower_mean_alone_publishes_half_of_what_teaches_nothing() -> None:
    random = numpy.random.default_rng(7)
    old_rule = [normal(random, 6).mean() > 0 for _ in range(USERS)]
    assert 0.4 < sum(old_rule) / USERS < 0.6


@pytest.mark.parametrize(
    ("t", "freedom", "probability"),
    [(3.0777, 1, 0.9), (1.4759, 5, 0.9), (-1.3406, 15, 0.1), (0.0, 3, 0.5), (2.7638, 10, 0.99)],
)
def test_students_t_is_that_of_the_tables(t: float, freedom: int, probability: float) -> None:
    assert student_cdf(t, freedom) == pytest.approx(probability, abs=1e-5)


def test_a_believing_prior_is_used_to_its_bound_only() -> None:
    eager = Prior(mean=3.0, sd=0.5, reads_prompts=True)
    assert eager.leaning(1.0).mean == MOST_MEAN
    assert eager.leaning(-1.0).mean == -MOST_MEAN


def test_of_one_text_and_of_equal_ones_nothing_is_said() -> None:
    assert certainty([0.3], prior_of({})) == 0.5
    assert certainty([0.0, 0.0, 0.0], prior_of({}).sceptical) == 0.5
    assert items_needed([-0.1, -0.2], prior_of({}), SURE) is None


def test_as_many_texts_as_were_said_to_be_needed_would_do() -> None:
    gains, prior = [0.3, -0.1, 0.2, 0.1], prior_of({}).sceptical
    needed = items_needed(gains, prior, SURE)
    assert needed is not None
    assert needed > 4
    assert certainty(gains, prior) < SURE
    assert certainty(gains * (needed // 4 + 2), prior) >= SURE
