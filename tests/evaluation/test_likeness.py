"""How like answers are to what the user wrote, and what a few of them say."""

import pytest

from langchain_cope.evaluation.likeness import gain, likeness

OWN = ["You will not believe this fox!", "Why the cat sat: a story"]


def test_what_shares_more_characters_is_more_like_the_user() -> None:
    own, near, far = likeness([OWN[0]] * 3, [OWN[0], "You will not like a fox.", "Budget passed"])
    assert own == 1
    assert own > near > far
    assert likeness(["今日は雨が降っています"], ["今日は雪が降っています"])[0] > 0.3


def test_saying_nothing_is_like_nobody() -> None:
    assert likeness([*OWN, " "], ["", " ", "word"]) == [0, 0, 0]


def test_a_gain_has_the_error_of_its_mean() -> None:
    assert gain([0.5, 0.3, 0.4], [0.4, 0.2, 0.3]) == pytest.approx((0.1, 0.0))
    mean, error = gain([0.5, 0.3], [0.3, 0.3])
    assert mean == pytest.approx(0.1)
    assert error == pytest.approx(0.1)
