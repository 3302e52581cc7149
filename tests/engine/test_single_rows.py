"""One row, the adapter alone or the base alone, equals what transformers and peft generate."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine.reference import Reference, scores

from langchain_cope.engine import Contrast, Engine, Request, Sampling

Tiny = Callable[..., Path]
NUM_TOKENS = 24
PROMPTS = [
    torch.randint(3, 380, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (4, 17, 33)
]


def generated(model: torch.nn.Module, prompt: list[int], **settings: object) -> list[int]:
    ids = torch.tensor([prompt])
    answer = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        **settings,
    )
    return answer[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize(
    "settings", [{}, {"repetition_penalty": 1.0}], ids=["default", "penalty 1.0"]
)
def test_a_request_without_adapter_equals_generate_of_the_base(
    family: str, settings: dict[str, float], tiny: Tiny, engine_for: Callable[..., Engine]
) -> None:
    engine = engine_for(tiny(family))
    base = Reference(tiny(family)).model
    requests = [
        Request(prompt, sampling=Sampling(max_tokens=NUM_TOKENS, **settings)) for prompt in PROMPTS
    ]
    for prompt, answer in zip(PROMPTS, engine.generate(requests), strict=True):
        assert list(answer.token_ids) == generated(base, prompt, **settings)
        assert answer.contrast_changed == 0


def test_alpha_zero_equals_peft_generate_with_the_adapter(
    tiny: Tiny, adapter: Tiny, engine: Engine
) -> None:
    folder = adapter(tiny("llama"), seed=1)
    personal = Reference(tiny("llama"), folder).model
    ann = engine.load_adapter(folder)
    # τ has no say without α: there is no head.
    requests = [
        Request(prompt, ann, contrast=Contrast(0.0, 1.0), sampling=Sampling(max_tokens=NUM_TOKENS))
        for prompt in PROMPTS
    ]
    answers = engine.generate(requests)
    assert [list(a.token_ids) for a in answers] == [
        generated(personal, prompt) for prompt in PROMPTS
    ]
    assert [a.contrast_changed for a in answers] == [0, 0, 0]
    assert all(request.num_rows == 1 for request in requests)


def test_the_adapter_changes_the_answers(tiny: Tiny, adapter: Tiny, engine: Engine) -> None:
    ann = engine.load_adapter(adapter(tiny("llama"), seed=1))
    sampling = Sampling(max_tokens=NUM_TOKENS)
    for prompt in PROMPTS:
        alone, personal, contrasted = engine.generate(
            [
                Request(prompt, sampling=sampling),
                Request(prompt, ann, Contrast(0.0), sampling=sampling),
                Request(prompt, ann, Contrast(1.0), sampling=sampling),
            ]
        )
        assert alone.token_ids != personal.token_ids != contrasted.token_ids
        assert contrasted.contrast_changed > 0


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_repetition_penalty_acts_on_prompt_and_answer_but_not_on_padding(
    alpha: float, tiny: Tiny, adapter: Tiny, engine: Engine
) -> None:
    """Written out: a loop over the independent reference, on renormalised scores.

    Token 0, which pads the shorter rows, is never seen by them.
    """
    folder = adapter(tiny("llama"), seed=1)
    reference, ann = Reference(tiny("llama"), folder), engine.load_adapter(folder)
    sampling = Sampling(max_tokens=12, repetition_penalty=1.3)
    answers = engine.generate(
        [Request(prompt, ann, Contrast(alpha), sampling) for prompt in PROMPTS]
    )
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert 0 not in prompt
        ids = list(prompt)
        for token in answer.token_ids:
            user, base = reference.log_probs(ids)
            expected = scores(user[-1], base[-1], alpha, 0.1)
            seen = torch.tensor(sorted(set(ids)))
            before = expected[seen]
            expected[seen] = torch.where(before < 0, before * 1.3, before / 1.3)
            assert token == int(expected.argmax())
            ids.append(token)


def test_a_padding_token_keeps_its_score_under_a_penalty(tiny: Tiny, engine: Engine) -> None:
    """Rows are padded with token 0; a penalty on it would show where token 0 is the likeliest."""
    base = engine.base
    prompt_before_zero = next(
        prompt
        for seed in range(4000)
        if int(Reference.next_token(base.model, prompt := [3 + seed % 377, 3 + seed // 377, 40]))
        == 0
    )
    sampling = Sampling(max_tokens=1, repetition_penalty=5.0)
    answer = engine.generate(
        [Request(prompt_before_zero, sampling=sampling), Request(PROMPTS[2], sampling=sampling)]
    )[0]
    assert answer.token_ids == (0,)


def test_a_seeded_answer_does_not_depend_on_its_batch(
    tiny: Tiny, adapter: Tiny, engine: Engine
) -> None:
    ann = engine.load_adapter(adapter(tiny("llama"), seed=1))
    requests = [
        Request(
            prompt,
            ann,
            Contrast(alpha, 0.01),
            Sampling(max_tokens=NUM_TOKENS, temperature=1.2, top_p=0.95, seed=seed),
        )
        for seed, (prompt, alpha) in enumerate(
            [(PROMPTS[0], 0.1), (PROMPTS[1], 0.0), (PROMPTS[2], 0.5)]
        )
    ]
    together = [answer.token_ids for answer in engine.generate(requests)]
    alone = [engine.generate([request])[0].token_ids for request in requests]
    backwards = [answer.token_ids for answer in engine.generate(requests[::-1])][::-1]
    assert together == alone == backwards


def test_seeds_give_different_answers_and_no_seed_always_a_new_one(
    engine: Engine,
) -> None:
    def answer(**seed: int) -> tuple[int, ...]:
        sampling = Sampling(max_tokens=NUM_TOKENS, temperature=1.5, **seed)
        return engine.generate([Request(PROMPTS[0], sampling=sampling)])[0].token_ids

    assert answer(seed=1) == answer(seed=1)
    assert len({answer(seed=1), answer(seed=2), answer(), answer()}) == 4


def test_sampling_leaves_torch_random_state_alone(engine: Engine) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    engine.generate([Request(PROMPTS[0], sampling=Sampling(max_tokens=4, temperature=1.0))])
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_of_the_engine_follow_the_contrasted_distribution(
    tiny: Tiny, adapter: Tiny, engine: Engine
) -> None:
    folder = adapter(tiny("llama"), seed=1)
    reference, ann = Reference(tiny("llama"), folder), engine.load_adapter(folder)
    draws = 1500
    requests = [
        Request(PROMPTS[0], ann, Contrast(0.5), Sampling(max_tokens=1, temperature=1.0, seed=seed))
        for seed in range(draws)
    ]
    tokens = torch.tensor([answer.token_ids[0] for answer in engine.generate(requests)])
    user, base = reference.log_probs(PROMPTS[0])
    expected = scores(user[-1], base[-1], 0.5, 0.1).exp() * draws
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    assert counts[expected == 0].sum() == 0, "nothing outside the head"
    often = expected >= 5
    chi_square = float(((counts - expected)[often] ** 2 / expected[often]).sum())
    degrees = int(often.sum()) - 1
    assert degrees >= 2, "a head of one token would show nothing"
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5 + 5
