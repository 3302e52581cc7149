"""Greedy decoding equals an independent reference, token by token.

Every family, α and τ, alone and among other users.
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine.reference import Reference, Tally, step_by_step
from tiny import FAMILIES

from langchain_cope.engine import Contrast, Engine, Request, Sampling

ALPHAS, TAUS = (0.0, 0.1, 0.5, 1.0), (0.01, 0.1, 0.5)
NUM_TOKENS = 20
TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "phi3": ["qkv_proj", "down_proj"],
}

Tiny = Callable[..., Path]


def prompt_of(length: int, seed: int) -> list[int]:
    """Random tokens, none of them special."""
    return torch.randint(3, 380, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def users_of(family: str, base: Path, adapter: Tiny) -> dict[str, Path]:
    """Two users who share neither rank nor target modules."""
    few = TARGETS.get(family, ["q_proj", "v_proj"])
    conv1d = {"fan_in_fan_out": True} if family == "gpt2" else {}
    return {
        "ann": adapter(base, seed=1, rank=4, **conv1d),
        "bob": adapter(base, seed=2, targets=few, rank=2, scale=0.3, **conv1d),
    }


def cases() -> list[tuple[str | None, float, float, list[int]]]:
    """Return (user, α, τ, prompt): every α and τ for two users, and two cases without adapter.

    The prompts have many lengths.
    """
    lengths = itertools.cycle([5, 31, 2, 18, 11])
    grid = itertools.product(ALPHAS, TAUS, ["ann", "bob"])
    personal = [
        (user, alpha, tau, prompt_of(next(lengths), seed))
        for seed, (alpha, tau, user) in enumerate(grid)
    ]
    return [*personal, (None, 0.1, 0.1, prompt_of(7, 100)), (None, 0.5, 0.01, prompt_of(24, 101))]


@pytest.fixture(scope="module")
def total() -> Tally:
    return Tally()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_decoding_equals_two_plain_forwards_a_step(
    family: str, tiny: Tiny, adapter: Tiny, engine_for: Callable[..., Engine], total: Tally
) -> None:
    base = tiny(family)
    users = users_of(family, base, adapter)
    engine = engine_for(base)
    adapters = {name: engine.load_adapter(folder) for name, folder in users.items()}
    references = {name: Reference(base, folder) for name, folder in users.items()} | {
        None: Reference(base)
    }
    sampling = Sampling(max_tokens=NUM_TOKENS)
    compared = cases()
    requests = [
        Request(prompt, adapters.get(user or ""), Contrast(alpha, tau), sampling)
        for user, alpha, tau, prompt in compared
    ]

    together = engine.generate(requests)
    alone = {index: engine.generate([requests[index]])[0] for index in range(0, len(requests), 3)}

    answers = [("batched", index, answer) for index, answer in enumerate(together)]
    answers += [("alone", index, answer) for index, answer in alone.items()]
    tally = Tally()
    for how, index, answer in answers:
        user, alpha, tau, prompt = compared[index]
        what = f"{family} {how}, user {user}, α {alpha}, τ {tau}, prompt of {len(prompt)}"
        tally.compare(
            references[user], prompt, list(answer.token_ids), alpha if user else 0.0, tau, what
        )
    assert tally.differences == []
    assert tally.num_changed > tally.num_tokens / 50, (
        "the contrast must matter for this test to mean anything"
    )
    assert tally.num_tokens > 0.6 * NUM_TOKENS * len(answers), "most answers must run on"
    total.num_tokens += tally.num_tokens
    total.num_ties += tally.num_ties


def test_ties_are_at_most_one_in_a_thousand(
    total: Tally, record_property: Callable[[str, object], None]
) -> None:
    record_property("tokens", total.num_tokens)
    record_property("ties", total.num_ties)
    print(f"{total.num_ties} ties in {total.num_tokens} greedy tokens")
    if total.num_tokens == 0:
        pytest.skip("counts what the tests before it compared")
    assert total.num_ties <= total.num_tokens / 1000


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_answers_that_outgrow_the_caches_room_equal_the_reference_too(
    family: str, tiny: Tiny, adapter: Tiny, engine_for: Callable[..., Engine]
) -> None:
    """200 tokens, while a second request joins and leaves."""
    base = tiny(family)
    folder = adapter(base, seed=1, rank=4)
    engine = engine_for(base)
    ann, reference = engine.load_adapter(folder), Reference(base, folder)
    long = engine.stream(Request(prompt_of(9, 1), ann, Contrast(0.3), Sampling(max_tokens=200)))
    short = Request(prompt_of(40, 2), ann, Contrast(0.3), Sampling(max_tokens=30))
    tally = Tally()
    for _ in range(3):
        for _ in range(5):
            next(long)
        answer = engine.generate([short])[0]
        tally.compare(reference, list(short.prompt), list(answer.token_ids), 0.3, 0.1, "short")
    answer = long.completion()
    assert len(answer.token_ids) > 130
    tally.compare(reference, prompt_of(9, 1), list(answer.token_ids), 0.3, 0.1, "long")
    assert tally.differences == []
    assert tally.num_ties == 0


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_reference_over_the_whole_answer_equals_a_loop_of_single_steps(
    alpha: float, tiny: Tiny, adapter: Tiny, engine_for: Callable[..., Engine]
) -> None:
    base = tiny("mistral")
    folder = adapter(base, seed=1, rank=4)
    engine = engine_for(base)
    prompt = prompt_of(15, 7)
    request = Request(
        prompt, engine.load_adapter(folder), Contrast(alpha), Sampling(max_tokens=NUM_TOKENS)
    )
    answer = list(engine.generate([request])[0].token_ids)
    reference = Reference(base, folder)
    assert answer == step_by_step(reference, prompt, alpha, 0.1, len(answer))
    tally = Tally()
    tally.compare(reference, prompt, answer, alpha, 0.1, "mistral")
    assert (tally.differences, tally.num_ties, tally.num_tokens) == ([], 0, len(answer))


def test_in_bfloat16_nearly_all_tokens_agree(
    tiny: Tiny,
    adapter: Tiny,
    engine_for: Callable[..., Engine],
    record_property: Callable[[str, object], None],
) -> None:
    base = tiny("llama")
    users = users_of("llama", base, adapter)
    engine = engine_for(base, dtype="bfloat16")
    adapters = {name: engine.load_adapter(folder) for name, folder in users.items()}
    references = {name: Reference(base, folder, torch.bfloat16) for name, folder in users.items()}
    agreed = compared = 0
    personal = [case for case in cases() if case[0] is not None]
    requests = [
        Request(p, adapters[str(u)], Contrast(a, t), Sampling(max_tokens=NUM_TOKENS))
        for u, a, t, p in personal
    ]
    for (user, alpha, tau, prompt), answer in zip(personal, engine.generate(requests), strict=True):
        tally = Tally()
        tally.compare(references[str(user)], prompt, list(answer.token_ids), alpha, tau, "bfloat16")
        compared += tally.num_tokens
        agreed += tally.num_tokens - tally.num_ties - len(tally.differences)
    record_property("bfloat16_agreement", agreed / compared)
    print(f"bfloat16: {agreed} of {compared} tokens agree with the reference after the same tokens")
    assert agreed / compared > 0.9
