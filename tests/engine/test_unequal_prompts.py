"""The personal row reads more than the base's: both equal plain forwards, step by step."""

import math
from collections.abc import Callable
from pathlib import Path

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
    Request,
    Sampling,
    load_base,
)
from langchain_cope.engine.prefix_cache import BLOCK
from langchain_cope.errors import ContextOverflow, InputError

Tiny = Callable[..., Path]


def tokens(length: int, seed: int) -> list[int]:
    return torch.randint(3, 380, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def check(reference: Reference, request: Request, answer: Completion) -> None:
    """Hold an answer against two forwards over the two prompts, each with the same answer."""
    ids, both = list(answer.token_ids), []
    for index, prompt in enumerate(request.prompts):
        rows = reference.log_probs([*prompt, *ids])[index]
        both.append(rows[len(prompt) - 1 : -1])
    expected = scores(*both, request.contrast.alpha, request.contrast.tau)
    for step, token in enumerate(ids):
        assert expected[step].max() - expected[step, token] <= TIE, f"step {step}"
    for step, found in enumerate(answer.logprobs):
        assert found.log_p_user == pytest.approx(float(both[0][step, ids[step]]), abs=1e-4)
        assert found.log_p_base == pytest.approx(float(both[1][step, ids[step]]), abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_rows_with_prompts_of_their_own_equal_two_plain_forwards(
    family: str, tiny: Tiny, adapter: Tiny, engine_for: Callable[..., Engine]
) -> None:
    base = tiny(family)
    folder = adapter(base, seed=1)
    engine, reference = engine_for(base), Reference(base, folder)
    ann, bare = engine.load_adapter(folder), tokens(2 * BLOCK + 3, 1)
    prompts = [
        ([*tokens(30, 2), *bare], bare),
        (bare, bare),
        ([*tokens(9, 3), *bare], tokens(5, 4)),
        (tokens(6, 5), bare),
    ]
    requests = [
        Request(own, ann, Contrast(0.5), Sampling(max_tokens=20), base_prompt=other, logprobs=True)
        for own, other in prompts
    ]
    # Again, from the caches: each row finds its own beginning there.
    for answers in (engine.generate(requests), engine.generate(requests[::-1])[::-1]):
        for request, answer in zip(requests, answers, strict=True):
            check(reference, request, answer)
    same = Request(bare, ann, Contrast(0.5), Sampling(max_tokens=20), logprobs=True)
    assert engine.generate([same])[0].token_ids == answers[1].token_ids
    assert answers[0].token_ids != answers[1].token_ids


def test_drafted_answers_to_unequal_prompts_equal_plain_forwards(tiny: Tiny, adapter: Tiny) -> None:
    base = tiny("llama", initializer_range=0.15, tie_word_embeddings=True)
    folder = adapter(base, seed=1, scale=0.02)
    engine = Engine(load_base(base, device=DEVICE, dtype="float32"))
    engine._batch._speculation = AlwaysDrafts()
    bare = tokens(10, 1)
    request = Request(
        [*bare, *bare],
        engine.load_adapter(folder),
        Contrast(0.5),
        Sampling(max_tokens=80),
        base_prompt=bare,
    )
    [answer] = engine.generate([request])
    engine.close()
    assert engine.statistics().accepted > 0
    check(Reference(base, folder), request, answer)


@pytest.mark.parametrize(("own", "other"), [(240, 20), (20, 240)])
def test_the_longer_prompt_bounds_the_answer(
    own: int, other: int, tiny: Tiny, adapter: Tiny, engine: Engine
) -> None:
    folder = adapter(tiny("llama"), seed=1)
    request = Request(
        tokens(own, 1),
        engine.load_adapter(folder),
        Contrast(0.5),
        Sampling(max_tokens=50),
        base_prompt=tokens(other, 2),
    )
    [answer] = engine.generate([request])
    assert (len(answer.token_ids), answer.finish_reason) == (256 - 240, "length")
    check(Reference(tiny("llama"), folder), request, answer)


def test_the_bounds_count_the_longer_prompt(tiny: Tiny, adapter: Tiny) -> None:
    loaded = load_base(tiny("llama"), device=DEVICE, dtype="float32")
    engine = Engine(loaded, EngineOptions(max_tokens=2 * 110))
    ann = engine.load_adapter(adapter(tiny("llama"), seed=1))
    ten = Sampling(max_tokens=10)
    fits = Request(tokens(100, 1), ann, Contrast(0.5), ten, base_prompt=tokens(5, 2))
    assert len(engine.generate([fits])[0].token_ids) == 10
    for own, other in ((101, 5), (5, 101)):
        request = Request(tokens(own, 1), ann, Contrast(0.5), ten, base_prompt=tokens(other, 2))
        with pytest.raises(InputError, match="tokens in flight"):
            engine.generate([request])
    engine.close()


def test_a_wrong_prompt_of_the_base_is_refused_where_it_is_read(
    tiny: Tiny, adapter: Tiny, engine: Engine
) -> None:
    ann = engine.load_adapter(adapter(tiny("llama"), seed=1))
    for prompt, error in (([], InputError), ([-1], InputError), ([5] * 256, ContextOverflow)):
        with pytest.raises(error):
            engine.generate([Request([5, 6], ann, base_prompt=prompt)])
    unread = Request([5, 6], ann, Contrast(0.0), Sampling(max_tokens=3), base_prompt=[])
    [answer] = engine.generate([unread])
    assert answer == engine.generate([Request([5, 6], ann, Contrast(0.0), unread.sampling)])[0]


def test_the_penalty_counts_what_both_rows_read(tiny: Tiny, adapter: Tiny, engine: Engine) -> None:
    folder = adapter(tiny("llama"), seed=1)
    reference, bare = Reference(tiny("llama"), folder), tokens(12, 1)
    sampling = Sampling(max_tokens=10, repetition_penalty=1.5)
    request = Request(
        [*tokens(60, 2), *bare],
        engine.load_adapter(folder),
        Contrast(0.5),
        sampling,
        base_prompt=bare,
    )
    [answer] = engine.generate([request])
    said: list[int] = []
    for token in answer.token_ids:
        user = reference.log_probs([*request.prompt, *said])[0][-1]
        base = reference.log_probs([*bare, *said])[1][-1]
        expected = scores(user, base, 0.5, 0.1)
        seen = torch.tensor(sorted({*bare, *said}))
        expected[seen] *= 1.5
        assert token == int(expected.argmax())
        assert expected[token] > -math.inf
        said.append(token)
