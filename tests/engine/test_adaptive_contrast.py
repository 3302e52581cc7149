"""The adaptive rule against float64 arithmetic on plain forwards, alone, in batches and drafted."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from engine.decoding.always import AlwaysDrafts
from engine.reference import TIE, Reference, scores
from tiny import DEVICE

from langchain_cope.engine import (
    Completion,
    Contrast,
    Engine,
    EngineOptions,
    Grammar,
    Request,
    Sampling,
    closed_schema,
    load_base,
)
from langchain_cope.engine.answer import ActiveRequest
from langchain_cope.engine.decoding.adaptive import divergence
from langchain_cope.engine.decoding.exact import is_exact, names_in
from langchain_cope.engine.next_token import TokenChoice, choose

Tiny = Callable[..., Path]
SAMPLING = Sampling(max_tokens=24)
PROMPTS = [
    torch.randint(3, 380, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (4, 17, 33)
]


def in_float64(user: torch.Tensor, base: torch.Tensor) -> np.ndarray:
    """Return the mean of both relative entropies to the mixture, as a textbook has it."""
    p, q = user.double().exp().numpy(), base.double().exp().numpy()
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        to_middle = [np.where(each > 0, each * np.log(each / middle), 0) for each in (p, q)]
    return (to_middle[0].sum(-1) + to_middle[1].sum(-1)) / 2


@pytest.mark.parametrize("spread", [0.1, 3, 200])
def test_the_divergence_equals_float64_arithmetic(spread: float) -> None:
    """With a spread of 200 most probabilities are 0 in float32."""
    generator = torch.Generator().manual_seed(2)
    user, base = (torch.randn(2, 6, 500, generator=generator) * spread).log_softmax(-1)
    found = divergence(user, base)
    np.testing.assert_allclose(found.numpy(), in_float64(user, base), atol=2e-6, rtol=0)
    assert divergence(user, user).abs().max() < 2e-6
    assert found.max() <= math.log(2) + 1e-6


def check(
    reference: Reference, engine: Engine, request: Request, answer: Completion
) -> tuple[int, int]:
    """Hold an answer against the rule; return its steps, and those in which α acted."""
    prompt, ids = list(request.prompt), list(answer.token_ids)
    user, base = (rows[len(prompt) - 1 : -1] for rows in reference.log_probs([*prompt, *ids]))
    means = in_float64(user, base).cumsum() / np.arange(1, len(ids) + 1)
    text = engine.base.tokenizer.decode(prompt, skip_special_tokens=True)
    said, num_active = "", 0
    contrast = request.contrast
    for step, token in enumerate(ids):
        own = int(user[step].argmax())
        exact = is_exact(said, engine.base.token_text(own), text, names_in(text))
        active = bool(means[step] >= contrast.min_divergence) and not exact
        num_active += active
        assert abs(means[step] - contrast.min_divergence) > TIE, "take another threshold"
        expected = scores(user[step], base[step], contrast.alpha if active else 0.0, contrast.tau)
        if int(expected.argmax()) in engine.base.eos_ids and own not in engine.base.eos_ids:
            expected[list(engine.base.eos_ids)] = -math.inf
        assert expected.max() - expected[token] <= TIE, f"step {step}"
        said += engine.base.token_text(token)
    assert answer.contrast_active_share == num_active / len(ids)
    assert answer.mean_divergence == pytest.approx(means[-1], abs=1e-5)
    return len(ids), num_active


@pytest.mark.parametrize("min_divergence", [0.0, 0.08, 0.2, 0.69])
def test_answers_follow_the_rule_alone_and_among_fixed_ones(
    min_divergence: float, tiny: Tiny, adapter: Tiny, engine: Engine
) -> None:
    folder = adapter(tiny("llama"), seed=1)
    reference, ann = Reference(tiny("llama"), folder), engine.load_adapter(folder)
    adaptive = Contrast(0.5, 0.1, "adaptive", min_divergence)
    requests = [Request(prompt, ann, adaptive, SAMPLING) for prompt in PROMPTS]
    others = [
        Request(PROMPTS[1], ann, Contrast(0.5), SAMPLING),
        Request(PROMPTS[1], ann, Contrast(0.0), SAMPLING),
        Request(PROMPTS[1], sampling=SAMPLING),
    ]
    answers = engine.generate([others[0], *requests, *others[1:]])
    for request, answer in zip(requests, answers[1:4], strict=True):
        [alone] = engine.generate([request])
        assert alone.token_ids == answer.token_ids
        assert alone.contrast_active_share == answer.contrast_active_share
    counts = [
        check(reference, engine, request, answer)
        for request, answer in zip(requests, answers[1:4], strict=True)
    ]
    num_steps, num_active = (sum(column) for column in zip(*counts, strict=True))
    assert (0 < num_active < num_steps) or min_divergence in (0.0, 0.69)
    assert (num_active == 0) == (min_divergence == 0.69)
    assert [answers[index].contrast_active_share for index in (0, 4, 5)] == [1, 0, 0]
    assert [answers[index].mean_divergence for index in (0, 4, 5)] == [None] * 3


def test_a_contrast_that_never_acts_is_the_adapter_alone(
    tiny: Tiny, adapter: Tiny, engine: Engine
) -> None:
    ann = engine.load_adapter(adapter(tiny("llama"), seed=1))
    sampling = Sampling(max_tokens=24, temperature=1.2, top_p=0.9, seed=5)
    silent = Contrast(0.5, 0.5, "adaptive", 0.69)
    answers = engine.generate(
        [Request(PROMPTS[1], ann, each, sampling) for each in (silent, Contrast(0.0))]
    )
    assert answers[0].token_ids == answers[1].token_ids


def test_drafts_change_nothing(tiny: Tiny, adapter: Tiny) -> None:
    base = tiny("llama", initializer_range=0.15, tie_word_embeddings=True)
    folder = adapter(base, seed=1, scale=0.02)
    loaded = load_base(base, device=DEVICE, dtype="float32")
    drafting, plain = Engine(loaded), Engine(loaded, EngineOptions(speculation=False))
    drafting._batch._speculation = AlwaysDrafts()
    found = []
    for engine in (drafting, plain):
        ann = engine.load_adapter(folder)
        requests = [
            Request(
                [*PROMPTS[2], 7, *PROMPTS[2][:4]],
                ann,
                Contrast(0.3, 0.1, "adaptive", least),
                Sampling(max_tokens=60),
            )
            for least in (0.0, 0.002, 0.01)
        ]
        found.append(engine.generate(requests))
        engine.close()
    assert drafting.statistics().accepted > 20
    for one, other in zip(*found, strict=True):
        assert one.token_ids == other.token_ids
        assert one.contrast_active_share == other.contrast_active_share
        assert one.mean_divergence == pytest.approx(other.mean_divergence, abs=1e-5)
    assert any(0 < answer.contrast_active_share < 1 for answer in found[0])


def test_it_never_ends_a_turn_that_the_adapter_goes_on_with(
    tiny: Tiny, adapter: Tiny, engine: Engine
) -> None:
    """Handmade logits: the adapter prefers token 40 to the end by a little, the base by far."""
    ann = engine.load_adapter(adapter(tiny("llama"), seed=1))
    [end, *_] = ends = sorted(engine.base.eos_ids)
    logits = torch.zeros(2, engine.base.vocabulary_size)
    logits[:, 40], logits[0, end], logits[1, end], logits[:, 50] = 9, 8.9, 2, 8

    def chosen(contrast: Contrast, user_logits: torch.Tensor) -> int:
        active = ActiveRequest(Request([5, 6], ann, contrast), engine.base, lambda event: None)
        both = torch.stack([user_logits, logits[1]])
        return choose(both, [TokenChoice(active, 0, 1)])[0].token

    adaptive = Contrast(0.5, 0.1, "adaptive")
    assert chosen(Contrast(0.5), logits[0]) == end
    assert chosen(adaptive, logits[0]) in {40, 50}
    adapters_own = logits[0].clone()
    adapters_own[ends] = 9.5
    assert chosen(adaptive, adapters_own) in ends


def test_under_a_grammar_the_adapter_alone_answers(
    tiny: Tiny, adapter: Tiny, engine: Engine
) -> None:
    ann = engine.load_adapter(adapter(tiny("llama"), seed=1))
    adaptive, alone = (
        Request(
            PROMPTS[0],
            ann,
            contrast,
            SAMPLING,
            grammar=Grammar(answer=closed_schema({"type": "integer"})),
        )
        for contrast in (Contrast(0.5, 0.1, "adaptive"), Contrast(0.0))
    )
    assert adaptive.num_rows == 1
    first, second = engine.generate([adaptive, alone])
    assert first == second


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rule": "often"}, "contrast must be 'fixed' or 'adaptive', not 'often'"),
        ({"min_divergence": -1}, "min_divergence must be a number ≥ 0, not -1"),
    ],
)
def test_what_is_no_rule_is_refused(options: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Contrast(**options)  # type: ignore[arg-type]
