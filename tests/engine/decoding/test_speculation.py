"""Drafts looked up in earlier text: the same tokens in fewer steps, and only where it pays."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engine.decoding.always import AlwaysDrafts
from engine.reference import Reference, Tally
from tiny import DEVICE

from langchain_cope.engine import Contrast, Engine, EngineOptions, Request, Sampling, load_base
from langchain_cope.engine.decoding.speculation import PromptLookup, Speculation

Tiny = Callable[..., Path]
# Random weights that say the same again and again.
REPEATING = {"initializer_range": 0.15, "tie_word_embeddings": True}


def tokens(length: int, seed: int) -> list[int]:
    return torch.randint(3, 380, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(params=["llama", "gemma2", "gpt2"])
def pair(request: pytest.FixtureRequest, tiny: Tiny) -> Iterator[tuple[str, Engine, Engine]]:
    """Family, an engine that drafts whenever it can, one that never does."""
    changes = {} if request.param == "gpt2" else REPEATING
    base = load_base(tiny(request.param, **changes), device=DEVICE, dtype="float32")
    drafting, plain = Engine(base), Engine(base, EngineOptions(speculation=False))
    drafting._batch._speculation = AlwaysDrafts()
    yield request.param, drafting, plain
    drafting.close()
    plain.close()


SETTINGS = {
    "greedy": {},
    "sampled": {"temperature": 0.7, "seed": 3},
    "sampled from a nucleus": {"temperature": 1.0, "top_p": 0.8, "top_k": 30, "seed": 4},
    "penalised": {"repetition_penalty": 1.1},
    "until a stop string": {"stop": ("e",)},
}


@pytest.mark.parametrize("how", SETTINGS)
def test_answers_are_the_same_token_by_token(
    how: str, pair: tuple[str, Engine, Engine], adapter: Tiny
) -> None:
    family, drafting, plain = pair
    base = Path(drafting.base.source)
    extra = {"fan_in_fan_out": True} if family == "gpt2" else {}
    folder = adapter(base, seed=1, scale=0.02, **extra)
    quoted = tokens(12, 5)
    answers = []
    for engine in (drafting, plain):
        user = engine.load_adapter(folder)
        sampling = Sampling(max_tokens=60, **SETTINGS[how])  # type: ignore[arg-type]
        requests = [
            Request([*quoted, 7, *quoted[:4]], user, Contrast(0.3), sampling, logprobs=True),
            Request([*quoted, *quoted, *quoted[:3]], user, Contrast(0.0), sampling),
            Request(tokens(30, 6), None, Contrast(0.1), sampling),
        ]
        answers.append([*engine.generate(requests), *engine.generate(requests[:1])])
    for one, other in zip(*answers, strict=True):
        assert one.token_ids == other.token_ids
        assert one.text == other.text
        assert one.finish_reason == other.finish_reason
        assert one.contrast_changed == other.contrast_changed
        for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
            assert mine.log_p_user == pytest.approx(theirs.log_p_user, abs=1e-4)
            assert mine.log_p_base == pytest.approx(theirs.log_p_base, abs=1e-4)
    statistics = drafting.statistics()
    assert statistics.drafted > 0 or statistics.steps < 10
    if how == "greedy" and family == "llama":
        assert statistics.accepted > 20
        assert statistics.steps < plain.statistics().steps / 1.5


def test_drafted_answers_equal_the_independent_reference(tiny: Tiny, adapter: Tiny) -> None:
    base = tiny("llama", **REPEATING)
    folder = adapter(base, seed=1, scale=0.02)
    engine = Engine(load_base(base, device=DEVICE, dtype="float32"))
    engine._batch._speculation = AlwaysDrafts()
    tally, prompt = Tally(), [*tokens(10, 1), *tokens(10, 1)]
    user = engine.load_adapter(folder)
    request = Request(prompt, user, Contrast(0.5), Sampling(max_tokens=80))
    answer = engine.generate([request])[0]
    engine.close()
    tally.compare(Reference(base, folder), prompt, list(answer.token_ids), 0.5, 0.1, "drafted")
    assert tally.differences == []
    assert engine.statistics().accepted > 0


def test_only_the_users_own_recent_texts_are_looked_up(tiny: Tiny, adapter: Tiny) -> None:
    base = tiny("llama")
    engine = Engine(load_base(base, device=DEVICE, dtype="float32"))
    engine._batch._speculation = AlwaysDrafts()
    ann, bob = (engine.load_adapter(adapter(base, seed=seed)) for seed in (1, 1))
    request = Request(tokens(9, 2), ann, Contrast(0.3), Sampling(max_tokens=40))
    first = engine.generate([request])[0]
    before = engine.statistics()
    of_bob = Request(request.prompt, bob, Contrast(0.3), request.sampling)
    assert engine.generate([of_bob])[0] == first
    others = engine.statistics()
    assert engine.generate([request])[0] == first
    own = engine.statistics()
    engine.close()
    anns_steps, bobs_steps = own.steps - others.steps, others.steps - before.steps
    assert anns_steps < bobs_steps / 2, "ann's own answer is quoted from the first time"


def test_a_lookup_follows_what_came_before() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6], hit_rate=0.5)
    assert lookup.propose(4) == []
    for token in (2, 3):
        lookup.push(token)
    assert lookup.propose(2) == [4, 5]
    lookup.push(4)
    assert lookup.propose(9) == [5, 6, 2, 3, 4]
    rate = lookup.hit_rate
    lookup.push(9)
    assert lookup.hit_rate < rate
    assert lookup.propose(3) == []


def test_nothing_is_drafted_where_it_would_not_pay() -> None:
    speculation = Speculation()
    for _ in range(20):
        for num_tokens in (2, 4, 6, 10, 18):
            speculation.record_timing(num_tokens, 0.005 * num_tokens)
    assert speculation.length([0.9], [8], 2) == 0, "where time grows with the tokens nothing is won"
    cheap = Speculation()
    for num_tokens in (2, 4, 6, 10, 18):
        cheap.record_timing(num_tokens, 0.010)
    assert cheap.length([0.9], [8], 2) == 8
    assert cheap.length([0.01], [8], 2) == 0
    assert cheap.length([0.9], [0], 2) == 0
