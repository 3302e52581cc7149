"""The contrastive rule against float64 arithmetic, and what holds for any two rows of logits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from langchain_cope.engine import Contrast, Request
from langchain_cope.engine.decoding.contrast import contrast, contrast_likelihood

ALPHAS, TAUS = (0.0, 0.1, 0.5, 1.0), (0.01, 0.1, 0.5, 0.99, 1.0)
quickly = settings(deadline=None, max_examples=150)

logits = st.floats(-30, 30, width=32)
alphas = st.floats(0, 2)
taus = st.floats(0.001, 1)


@st.composite
def two_rows(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    size = draw(st.integers(1, 12))
    row = st.lists(logits, min_size=size, max_size=size)
    return torch.tensor(draw(row)), torch.tensor(draw(row))


def in_float64(user: torch.Tensor, base: torch.Tensor, alpha: float, tau: float) -> np.ndarray:
    """The rule as the paper writes it, with probabilities, in float64."""
    p_user = np.exp(user.double().numpy() - np.logaddexp.reduce(user.double().numpy()))
    p_base = np.exp(base.double().numpy() - np.logaddexp.reduce(base.double().numpy()))
    head = p_user >= tau * p_user.max()
    with np.errstate(divide="ignore"):
        scores = np.where(head, np.log(p_user) - alpha * np.log(p_base), -np.inf)
    return scores - np.logaddexp.reduce(scores)


def line_distance(user: torch.Tensor, tau: float) -> float:
    """How far, in nats, the nearest candidate is from the τ line."""
    below = user.double() - user.double().max()
    return float((below - math.log(tau)).abs().min())


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("tau", TAUS)
def test_it_equals_float64_arithmetic(alpha: float, tau: float) -> None:
    generator = torch.Generator().manual_seed(3)
    compared = 0
    for _ in range(40):
        user, base = torch.randn(2, 50, generator=generator) * 3
        if tau < 1 and line_distance(user, tau) < 1e-5:
            continue
        compared += 1
        found = contrast(user, base, alpha, tau).double().numpy()
        np.testing.assert_allclose(found, in_float64(user, base, alpha, tau), atol=1e-5, rtol=0)
    assert compared >= 30


def test_numbers_worked_out_on_paper() -> None:
    """Of π_user = (½, ¼, ¼·0.9, rest), τ = ½ keeps two; α = 1 divides by π_base = (0.8, 0.1, …)."""
    user = torch.tensor([0.5, 0.25, 0.225, 0.025]).log()
    base = torch.tensor([0.8, 0.1, 0.05, 0.05]).log()
    found = contrast(user, base, alpha=1.0, tau=0.5).exp()
    # scores 0.5 / 0.8 = 0.625 and 0.25 / 0.1 = 2.5, normalised by their sum 3.125
    torch.testing.assert_close(found, torch.tensor([0.2, 0.8, 0.0, 0.0]), atol=1e-6, rtol=0)


def test_rows_may_have_their_own_alpha_and_tau() -> None:
    user, base = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0))
    alpha = torch.tensor([[0.0], [0.1], [0.5], [1.0], [2.0]])
    tau = torch.tensor([[1.0], [0.5], [0.1], [0.01], [0.3]])
    together = contrast(user, base, alpha, tau)
    for row in range(5):
        alone = contrast(user[row], base[row], alpha[row].item(), tau[row].item())
        torch.testing.assert_close(together[row], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_with_in_float32(dtype: torch.dtype) -> None:
    user, base = (torch.randn(2, 30, generator=torch.Generator().manual_seed(1)) * 4).to(dtype)
    found = contrast(user, base, 0.5, 0.1)
    assert found.dtype == torch.float32
    assert torch.equal(found, contrast(user.float(), base.float(), 0.5, 0.1))


@quickly
@given(two_rows(), alphas, taus)
def test_the_result_is_a_distribution_whose_head_holds_the_likeliest_token(
    rows: tuple[torch.Tensor, torch.Tensor], alpha: float, tau: float
) -> None:
    user, base = rows
    scores = contrast(user, base, alpha, tau)
    assert not scores.isnan().any()
    assert scores[user.argmax()] > -math.inf
    assert scores.exp().sum().item() == pytest.approx(1, abs=1e-5)
    outside = user - user.max() < math.log(tau) - 1e-4
    assert (scores[outside] == -math.inf).all()
    inside = user - user.max() > math.log(tau) + 1e-4
    assert (scores[inside] > -math.inf).all()


@quickly
@given(two_rows(), taus)
def test_without_alpha_the_head_keeps_the_users_order(
    rows: tuple[torch.Tensor, torch.Tensor], tau: float
) -> None:
    user, base = rows
    scores = contrast(user, base, 0.0, tau)
    head = scores > -math.inf
    differences = scores[head].unsqueeze(0) - scores[head].unsqueeze(1)
    torch.testing.assert_close(
        differences, user[head].unsqueeze(0) - user[head].unsqueeze(1), atol=1e-4, rtol=0
    )


@quickly
@given(two_rows(), alphas)
def test_tau_one_leaves_the_likeliest_tokens_only(
    rows: tuple[torch.Tensor, torch.Tensor], alpha: float
) -> None:
    user, base = rows
    log_probs = torch.log_softmax(user, -1)
    assert torch.equal(contrast(user, base, alpha, 1.0) > -math.inf, log_probs == log_probs.max())


@quickly
@given(two_rows(), alphas, taus, logits, logits)
def test_adding_a_constant_to_either_row_changes_nothing(
    rows: tuple[torch.Tensor, torch.Tensor],
    alpha: float,
    tau: float,
    to_user: float,
    to_base: float,
) -> None:
    user, base = rows
    assume(tau == 1 or line_distance(user, tau) > 1e-4)
    assume(tau < 1 or (user == user.max()).sum() == 1)
    # In float64 before the sum is rounded to float32, ties would otherwise appear.
    moved = contrast(
        (user.double() + to_user).float(), (base.double() + to_base).float(), alpha, tau
    )
    torch.testing.assert_close(moved, contrast(user, base, alpha, tau), atol=1e-4, rtol=0)


@quickly
@given(two_rows(), alphas, taus, st.data())
def test_what_a_grammar_masks_stays_masked(
    rows: tuple[torch.Tensor, torch.Tensor], alpha: float, tau: float, data: st.DataObject
) -> None:
    user, base = rows
    allowed = data.draw(st.sets(st.integers(0, len(user) - 1), min_size=1))
    masked = torch.full_like(user, -math.inf)
    masked[list(allowed)] = user[list(allowed)]
    scores = contrast(masked, base, alpha, tau)
    assert (scores[masked == -math.inf] == -math.inf).all()
    assert scores[masked.argmax()] > -math.inf, "grammar and head together leave a token"
    assert scores.exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("alpha", [-0.1, math.nan, math.inf, -math.inf, "0.1", None])
def test_an_alpha_out_of_range_is_refused_with_its_value(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"alpha must be a finite number ≥ 0, not {alpha!r}"):
        Contrast(alpha)
    with pytest.raises(ValueError, match="alpha"):
        Request([1], contrast=Contrast(alpha, 0.1))


def test_an_alpha_beyond_all_use_is_refused() -> None:
    assert Contrast(1000).alpha == 1000
    with pytest.raises(ValueError, match=r"alpha must be 1000 at most, not 1e\+38: 0 is"):
        Contrast(1e38)
    with pytest.raises(ValueError, match="alpha must be a finite number ≥ 0, not 1000"):
        Contrast(10**400)


@pytest.mark.parametrize(
    "tau", [0, 0.0, -0.1, 1.0001, 2, math.nan, math.inf, -math.inf, "0.1", None]
)
def test_a_tau_out_of_range_is_refused_with_its_value(tau: float) -> None:
    with pytest.raises(ValueError, match=rf"tau must be a number > 0 and ≤ 1, not {tau!r}"):
        Contrast(0.1, tau)
    with pytest.raises(ValueError, match="tau"):
        Request([1], contrast=Contrast(tau=tau))


@pytest.mark.parametrize(("alpha", "tau"), [(0, 1), (0.0, 1e-6), (1, 1.0), (50.0, 0.5)])
def test_the_ends_of_the_ranges_are_accepted(alpha: float, tau: float) -> None:
    Contrast(alpha, tau)


@quickly
@given(rows=two_rows(), alpha=alphas, tau=taus)
def test_the_likelihood_is_a_distribution_that_keeps_the_heads_mass(
    rows: tuple[torch.Tensor, torch.Tensor], alpha: float, tau: float
) -> None:
    user, base = (row.log_softmax(-1) for row in rows)
    found = contrast_likelihood(user, base, alpha, tau)
    assert float(found.logsumexp(-1)) == pytest.approx(0, abs=1e-4)
    outside = user < user.max() + math.log(tau)
    assert torch.equal(found[outside], user[outside])
    torch.testing.assert_close(contrast_likelihood(user, base, 0.0, tau), user)
