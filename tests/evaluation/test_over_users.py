"""Against closed forms, and against all that chance can do, counted out."""

import subprocess
import sys
from itertools import product

import numpy as np
import pytest

from langchain_cope.errors import InputError
from langchain_cope.evaluation.over_users import (
    Estimate,
    PerUser,
    difference,
    mean_over_users,
    ratio,
)


def file_of(figures: "np.ndarray | list[float]", prefix: str = "u") -> PerUser:
    return {f"{prefix}{index:03}": float(figure) for index, figure in enumerate(figures)}


def test_a_mean_has_the_interval_of_three_draws_of_three() -> None:
    assert mean_over_users([file_of([0, 0.5, 1])]) == Estimate(0.5, (0.0, 1.0), 3)


def test_with_many_users_the_interval_is_the_normal_one() -> None:
    figures = np.random.default_rng(1).normal(3, 2, size=400)
    estimate = mean_over_users([file_of(figures)])
    half = 1.96 * figures.std() / 20
    expected = (figures.mean() - half, figures.mean() + half)
    assert estimate.interval == pytest.approx(expected, abs=0.05 * half)


def test_intervals_hold_the_truth_nearly_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(100):
        interval = mean_over_users([file_of(rng.normal(size=16))]).interval
        assert interval is not None
        held += interval[0] <= 0 <= interval[1]
    assert 85 <= held <= 99


def test_one_or_two_users_have_no_interval() -> None:
    assert mean_over_users([{"alice": 2.0}]) == Estimate(2.0, None, 1)
    assert mean_over_users([{"alice": 2.0, "bob": 4.0}]) == Estimate(3.0, None, 2)
    assert difference([{"alice": 2.0}], [{"alice": 1.0}]).p == 1


def test_files_count_the_same_whatever_their_size() -> None:
    assert mean_over_users([{"a": 1.0}, {"b": 2.0, "c": 4.0}]).value == 2.0


def test_a_person_in_two_files_is_one_piece_of_evidence() -> None:
    figures = np.random.default_rng(3).normal(size=12)
    alone = mean_over_users([file_of(figures)])
    twice = mean_over_users([file_of(figures), file_of(figures)])
    strangers = mean_over_users([file_of(figures), file_of(figures, prefix="v")])
    assert alone.interval is not None
    assert twice.interval == pytest.approx(alone.interval)
    assert strangers.interval is not None
    width, narrower = np.ptp(alone.interval), np.ptp(strangers.interval)
    assert narrower == pytest.approx(width / np.sqrt(2), rel=0.1)


def test_p_counts_every_way_to_flip_the_signs() -> None:
    figures = np.random.default_rng(4).normal(0.4, 1, size=9)
    flipped = [abs(np.dot(signs, figures)) for signs in product((-1, 1), repeat=9)]
    share = np.mean(np.array(flipped) >= abs(figures.sum()) - 1e-9)
    found = difference([file_of(figures)], [file_of(np.zeros(9))])
    assert found.p == pytest.approx(share)
    assert found.value == pytest.approx(figures.mean())
    assert found.num_above == (figures > 0).sum()


def test_p_of_many_users_is_that_of_a_t_test() -> None:
    from scipy.stats import ttest_1samp

    figures = np.random.default_rng(5).normal(0.3, 1, size=60)
    found = difference([file_of(figures)], [file_of(np.zeros(60))])
    assert found.p == pytest.approx(ttest_1samp(figures, 0).pvalue, abs=0.005)


def test_signs_are_flipped_in_all_files_of_a_person() -> None:
    figures, zeros = [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]
    once = difference([file_of(figures)], [file_of(zeros)])
    twice = difference([file_of(figures)] * 2, [file_of(zeros)] * 2)
    assert once.p == twice.p == 2 / 2**3
    both = [file_of(figures), file_of(figures, prefix="v")]
    none = [file_of(zeros), file_of(zeros, prefix="v")]
    assert difference(both, none).p == 2 / 2**6


def test_a_difference_is_of_the_users_that_both_have() -> None:
    found = difference([{"a": 1.0, "b": 5.0, "c": 2.0}], [{"a": 0.0, "c": 0.0, "d": 9.0}])
    assert (found.value, found.num_users, found.num_above) == (1.5, 2, 2)


def test_a_ratio_is_one_of_means_not_a_mean_of_ratios() -> None:
    first, second = [file_of([3, 1, 2])], [file_of([1, 1, 1])]
    assert ratio(first, second) == Estimate(2.0, (1.0, 3.0), 3)
    assert ratio([file_of([2, 4, 9])], [file_of([1, 2, 4.5])]) == Estimate(2.0, (2.0, 2.0), 3)
    assert ratio([{"a": 1.0}, {"a": 9.0}], [{"a": 3.0}, {"a": 2.0}]) == Estimate(2.0, None, 1)


def test_no_ratio_to_nothing() -> None:
    assert ratio([{"a": 1.0, "b": 2.0}], [{"a": 0.0, "b": 0.0}]) is None


def test_a_file_without_users_is_refused() -> None:
    with pytest.raises(ValueError, match="a user in every file"):
        difference([{"a": 1.0}], [{"b": 1.0}])


def test_without_scikit_learn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InputError, match=r"pip install 'langchain-cope\[evaluate\]'"):
        mean_over_users([{"a": 1.0, "b": 2.0}])


def test_measures_load_neither_torch_nor_scipy() -> None:
    measures = ("adapter_matrix", "meteor", "over_users", "repetition", "style", "voice")
    modules = ", ".join(f"langchain_cope.evaluation.{measure}" for measure in measures)
    code = f"import sys, {modules}; print({{'torch', 'scipy', 'sklearn'}} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
