"""From scores to tokens: as transformers' own processors do, and seeds are good in any batch."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from langchain_cope.engine import Sampling
from langchain_cope.engine.decoding.sampling import choose_tokens, warp


def random_scores(rows: int = 6, vocabulary: int = 200, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))
    return torch.log_softmax(noise * 3, dim=-1)


def by_transformers(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Transformers' warpers, in the order in which `generate` applies them."""
    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    for warper in warpers:
        scores = warper(None, scores)
    return scores


SETTINGS = [
    Sampling(temperature=0.7),
    Sampling(temperature=1.0, top_k=5),
    Sampling(temperature=1.0, top_k=500),
    Sampling(temperature=1.3, top_p=0.9),
    Sampling(temperature=1.0, top_p=1e-6),
    Sampling(temperature=0.5, min_p=0.1),
    Sampling(temperature=2.0, top_k=20, top_p=0.8),
    Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05),
    Sampling(temperature=1.0, min_p=1.0),
]


def in_short(sampling: Sampling) -> str:
    s = sampling
    return f"T={s.temperature},k={s.top_k},p={s.top_p},min={s.min_p}"


@pytest.mark.parametrize("sampling", SETTINGS, ids=in_short)
def test_warping_equals_transformers_warpers(sampling: Sampling) -> None:
    scores = random_scores()
    warped, expected = warp(scores, [sampling] * 6), by_transformers(scores, sampling)
    assert torch.equal(warped == -math.inf, expected == -math.inf)
    finite = expected > -math.inf
    torch.testing.assert_close(warped[finite], expected[finite])


def test_every_row_is_warped_by_its_own_settings() -> None:
    scores = random_scores(rows=len(SETTINGS))
    together = warp(scores, SETTINGS)
    for row, sampling in enumerate(SETTINGS):
        expected = by_transformers(scores[row : row + 1], sampling)[0]
        assert torch.equal(together[row] == -math.inf, expected == -math.inf), sampling


@pytest.mark.parametrize("penalty", [0.8, 1.2, 3.0])
def test_the_repetition_penalty_equals_transformers_own(penalty: float) -> None:
    scores = random_scores(rows=3, seed=1)
    seen = [[1, 5, 9, 5], list(range(100)), [int(scores[2].argmax())]]
    settings = [Sampling(repetition_penalty=penalty)] * 3
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = []
    for row, ids in enumerate(seen):
        penalized = processor(torch.tensor([ids]), scores[row : row + 1])
        expected.append(int(penalized.argmax()))
    before = scores.clone()
    assert choose_tokens(scores, settings, seen, [0, 0, 0]).tolist() == expected
    assert torch.equal(scores, before), "the caller's scores stay as they are"


def test_only_the_request_that_asks_for_it_is_penalised() -> None:
    scores = random_scores(rows=1, seed=2).repeat(2, 1)
    best = int(scores[0].argmax())
    settings = [Sampling(repetition_penalty=50.0), Sampling()]
    penalised, plain = choose_tokens(scores, settings, [[best], [best]], [0, 0]).tolist()
    assert penalised != best
    assert plain == best


def drawn(scores: torch.Tensor, sampling: Sampling, number: int) -> torch.Tensor:
    """Samples of one row `(V,)`, by as many seeds."""
    samplings = [replace(sampling, seed=seed) for seed in range(number)]
    rows, steps = scores.expand(number, -1), [seed % 7 for seed in range(number)]
    return choose_tokens(rows, samplings, [[]] * number, steps)


@pytest.mark.parametrize("vocabulary", [6, 512, 700])  # below, at and beside whole blocks
@pytest.mark.parametrize(
    "sampling",
    [
        *SETTINGS[:4],
        Sampling(temperature=0.9, top_p=0.6),
        Sampling(temperature=1.5, top_p=0.3),
        Sampling(temperature=1.0, top_p=0.95, min_p=0.02),
        *SETTINGS[5:8],
    ],
    ids=in_short,
)
def test_samples_follow_the_warped_distribution(sampling: Sampling, vocabulary: int) -> None:
    scores = random_scores(rows=1, vocabulary=vocabulary, seed=3)
    scores[0, 1] = -math.inf
    draws = 4000
    expected = by_transformers(scores, sampling)[0].double().softmax(-1) * draws
    counts = torch.bincount(drawn(scores[0], sampling, draws), minlength=vocabulary).double()
    assert (counts[expected == 0] == 0).all(), "what has no probability is never drawn"
    often = expected >= 5
    rest = torch.stack([counts[~often].sum(), expected[~often].sum()])
    gaps = (counts[often] - expected[often]) ** 2 / expected[often]
    chi_square = float(gaps.sum() + (rest[0] - rest[1]) ** 2 / rest[1].clamp_min(1))
    freedom = int(often.sum())
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 8, "of so many degrees of freedom"


@pytest.mark.parametrize("top_p", [0.3, 0.95, 1.0])
def test_rounding_changes_hardly_any_sample(top_p: float) -> None:
    scores, sampling = random_scores(rows=1, vocabulary=700)[0], Sampling(temperature=1.0)
    sampling = replace(sampling, top_p=top_p)
    noise = torch.randn(700, generator=torch.Generator().manual_seed(8)) * 0.03
    other = torch.log_softmax(scores + noise, dim=-1)
    warped, other_warped = (warp(each[None], [sampling])[0].softmax(-1) for each in (scores, other))
    distance = float((warped - other_warped).abs().sum() / 2)  # total variation: the least there is
    draws = 4000
    changed = (drawn(scores, sampling, draws) != drawn(other, sampling, draws)).double().mean()
    assert float(changed) < 3 * distance + 0.003


def test_a_nucleus_wider_than_the_likeliest_tokens_is_found() -> None:
    flat = random_scores(rows=4, vocabulary=3000) / 20
    settings = [Sampling(temperature=1.0, top_p=p) for p in (0.2, 0.9, 0.999, 0.4)]
    for row, sampling in enumerate(settings):
        kept = by_transformers(flat[row : row + 1].double(), sampling)[0] > -math.inf
        assert torch.equal(warp(flat, settings)[row] > -math.inf, kept)
        assert kept.sum() > (1024 if row in (1, 2) else 300)


def test_tokens_as_likely_as_the_last_one_stay() -> None:
    scores = torch.tensor([[0.4, 0.2, 0.2, 0.2]]).log()
    for sampling in (Sampling(temperature=1.0, top_p=0.5), Sampling(temperature=1.0, top_k=2)):
        assert (warp(scores, [sampling]) > -math.inf).all()
        assert set(drawn(scores[0], sampling, 100).tolist()) == {0, 1, 2, 3}


def test_the_steps_of_one_seed_draw_independently() -> None:
    scores = torch.zeros(1, 2)
    sampling = Sampling(temperature=1.0, seed=11)
    draws = [int(choose_tokens(scores, [sampling], [[]], [step])) for step in range(1000)]
    pairs = torch.tensor([2 * a + b for a, b in itertools.pairwise(draws)])
    counts = torch.bincount(pairs, minlength=4)
    message = f"each pair of neighbours about 250 times, not {counts.tolist()}"
    assert ((counts - 250).abs() < 60).all(), message


def test_a_seed_means_the_same_in_any_batch_and_row() -> None:
    scores = random_scores(rows=5, seed=4)
    settings = [Sampling(temperature=1.5, seed=row) for row in range(5)]
    steps = [3, 0, 7, 1, 2]
    together = choose_tokens(scores, settings, [[]] * 5, steps).tolist()
    alone = []
    for row in range(5):
        own = slice(row, row + 1)
        alone.append(int(choose_tokens(scores[own], settings[own], [[]], steps[own])))
    assert together == alone
    backwards = choose_tokens(scores.flip(0), settings[::-1], [[]] * 5, steps[::-1]).tolist()
    assert backwards == together[::-1]


def test_greedy_and_sampled_requests_share_a_step() -> None:
    scores = random_scores(rows=2, seed=5)
    settings = [Sampling(), Sampling(temperature=1.0, seed=3)]
    greedy, _ = choose_tokens(scores, settings, [[], []], [0, 0]).tolist()
    assert greedy == int(scores[0].argmax())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("stop", ("",)),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name_and_value(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .*, not "):
        Sampling(**{name: value})  # type: ignore[arg-type]
