import numpy as np
import pytest

from langchain_cope.evaluation.adapter_matrix import AdapterMatrix, compare_adapters


def shares(matrix: AdapterMatrix) -> tuple[float, ...]:
    return (
        matrix.top1.value,
        matrix.own_above_another.value,
        matrix.adjusted_top1.value,
        matrix.adjusted_own_above_another.value,
    )


def test_every_own_adapter_best_wins_everywhere() -> None:
    assert shares(compare_adapters(3 - np.eye(4))) == (1, 1, 1, 1)


def test_equal_adapters_win_as_often_as_chance() -> None:
    assert shares(compare_adapters(np.ones((4, 4)))) == (1 / 4, 1 / 2, 1 / 4, 1 / 2)


def test_an_adapter_good_at_all_texts_wins_only_unadjusted() -> None:
    easy_texts, good_adapters = np.array([0.0, 1, 2]), np.array([[0.0], [5], [10]])
    nll = 20 + easy_texts + good_adapters - np.eye(3)
    # Adapter 0 is the best for all; adapter 1 beats adapter 2 on the texts of user 1.
    assert shares(compare_adapters(nll)) == pytest.approx((1 / 3, 1 / 2, 1, 1))


def test_rows_are_adapters_and_columns_texts() -> None:
    nll = [[1, 0, 9], [2, 3, 9], [9, 9, 0]]
    matrix = compare_adapters(nll)
    assert shares(matrix)[:2] == pytest.approx((2 / 3, 5 / 6))
    assert matrix.top1.interval == (0, 1)  # of three users anything may be drawn


def test_noise_is_at_chance_adjusted_too() -> None:
    matrix = compare_adapters(np.random.default_rng(0).normal(size=(200, 200)))
    _, above, adjusted_top1, adjusted_above = shares(matrix)
    assert above == pytest.approx(0.5, abs=0.06)
    assert adjusted_above == pytest.approx(0.5, abs=0.06)
    assert adjusted_top1 < 0.03
    low, high = matrix.own_above_another.interval or (0, 0)
    assert low < above < high


@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (4,)])
def test_a_table_that_is_not_square_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="square table"):
        compare_adapters(np.zeros(shape))


def test_a_missing_figure_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        compare_adapters([[1, np.nan], [1, 1]])
