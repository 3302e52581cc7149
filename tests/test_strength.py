"""How strongly an adapter acts where an app says nothing."""

import math

import pytest

from langchain_cope import strength
from langchain_cope.strength import PAPER, Strength, strength_for, strength_prior

UNKNOWN = {"weights": "00" * 32}


def test_the_measured_values_are_in_range_and_in_order() -> None:
    for weights in strength._measured():
        prior = strength_prior({"weights": weights})  # builds, and so checks, each strength
        assert prior.usual not in [one.strength for one in prior.candidates]
        order = [(one.strength.adapter_scale, one.strength.alpha) for one in prior.candidates]
        assert order == sorted(order)


def test_an_unknown_base_has_the_papers_values() -> None:
    assert strength_for(UNKNOWN) == PAPER == Strength(0.1, 0.1, 1.0)
    assert not strength_prior(UNKNOWN).is_measured


def test_what_a_version_recommends_comes_first() -> None:
    metadata = {"recommended": {"adapter_scale": 0.7, "alpha": 9.0}}
    assert strength_for(UNKNOWN, 0.4, 0.2, metadata) == Strength(0.4, 0.2, 0.7)
    assert strength_for(UNKNOWN, 0.4) == Strength(0.4, 0.1, 1.0)


@pytest.mark.parametrize("alpha", [-0.1, 2.1, 1e300, math.inf, math.nan, "0.3", True])
@pytest.mark.parametrize("tau", [0, 1.5, math.nan, [0.1]])
@pytest.mark.parametrize(
    "recommended", [None, 3, [], {}, {"adapter_scale": 2.5}, {"adapter_scale": math.nan}]
)
def test_no_value_of_a_store_is_used_out_of_range(
    alpha: float, tau: float, recommended: object
) -> None:
    assert strength_for(UNKNOWN, alpha, tau, {"recommended": recommended}) == PAPER
