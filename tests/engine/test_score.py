"""Scores of completions equal an independent log-softmax, batched by length or not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine.reference import Reference
from engine.test_failures import before_each_forward
from tiny import DEVICE

from langchain_cope.engine import (
    Contrast,
    Engine,
    EngineOptions,
    Request,
    Sampling,
    load_base,
    scoring,
)
from langchain_cope.errors import ContextOverflow, InputError

Tiny = Callable[..., Path]


def tokens(length: int, seed: int = 0) -> list[int]:
    return torch.randint(
        3, 380, (length,), generator=torch.Generator().manual_seed(100 * seed + length)
    ).tolist()


SEQUENCES = [
    (tokens(p, 1), tokens(c, 2))
    for p, c in [(5, 3), (1, 1), (40, 17), (3, 60), (100, 2), (7, 7), (1, 30)]
]


def expected(
    reference: Reference, prompt: list[int], completion: list[int], with_adapter: bool
) -> torch.Tensor:
    user, base = reference.log_probs([*prompt, *completion])
    rows = (user if with_adapter else base)[len(prompt) - 1 : -1]
    return rows.gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma2"])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_scores_equal_an_independent_log_softmax(
    family: str, with_adapter: bool, tiny: Tiny, adapter: Tiny, engine_for: Callable[..., Engine]
) -> None:
    base, engine = tiny(family), engine_for(tiny(family))
    folder = adapter(base, seed=1, **({"fan_in_fan_out": True} if family == "gpt2" else {}))
    reference = Reference(base, folder)
    scores = engine.score(SEQUENCES, engine.load_adapter(folder) if with_adapter else None)
    for (prompt, completion), row in zip(SEQUENCES, scores, strict=True):
        assert (row.dtype, row.device.type, row.shape) == (torch.float32, "cpu", (len(completion),))
        torch.testing.assert_close(
            row.double(), expected(reference, prompt, completion, with_adapter), atol=2e-4, rtol=0
        )


def test_small_groups_give_the_same_scores_in_the_order_given(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = engine.score(SEQUENCES)
    vocabulary = engine.base.vocabulary_size
    monkeypatch.setattr(scoring, "MAX_LOGITS", 2 * 10 * vocabulary)
    groups = list(scoring.groups(SEQUENCES, vocabulary, engine.options.max_rows))
    assert len(groups) > 3
    assert sorted(index for group in groups for index in group) == list(range(len(SEQUENCES)))
    for one, other in zip(together, engine.score(SEQUENCES), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


def test_no_forward_of_scoring_keeps_a_chat_waiting_long() -> None:
    sequences = [(tokens(180, seed), tokens(20, seed)) for seed in range(100)]
    groups = list(scoring.groups(sequences, 400, 64))
    assert sorted(index for group in groups for index in group) == list(range(100))
    assert max(200 * len(group) for group in groups) <= 4096


@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prompt_of_several_completions_is_read_once(
    family: str, with_adapter: bool, tiny: Tiny, adapter: Tiny, engine_for: Callable[..., Engine]
) -> None:
    base, engine = tiny(family), engine_for(tiny(family))
    folder = adapter(base, seed=1, **({"fan_in_fan_out": True} if family == "gpt2" else {}))
    owner = engine.load_adapter(folder) if with_adapter else None
    prompts = [tokens(50, 1), tokens(30, 2), tokens(1, 3), tokens(40, 4)]
    sequences = [
        (prompt, tokens(length, 5))
        for length in (3, 9, 6)
        for prompt in (prompts if length == 9 else prompts[:3])
    ]
    with before_each_forward(engine, lambda inputs: read.append(inputs.ids.numel())):
        read: list[int] = []
        scores = engine.score(sequences, owner)
    # Two prompts but for their last tokens, seven ninths with these, the one that is alone.
    assert read == [2 * 49, 9 * 9, 48]
    reference = Reference(base, folder)
    for (prompt, completion), row in zip(sequences, scores, strict=True):
        torch.testing.assert_close(
            row.double(), expected(reference, prompt, completion, with_adapter), atol=2e-4, rtol=0
        )


BEGIN_ALIKE = [([*tokens(60, 7), *tokens(9, seed)], tokens(5, seed)) for seed in range(4)]


@pytest.mark.parametrize(
    ("sequences", "max_tokens", "expected_reads"),
    [
        (BEGIN_ALIKE, 80, [60, 13, 13, 13, 13]),
        # Of all together nothing is shared, but in the first two groups of two.
        ([*BEGIN_ALIKE, (tokens(9, 8), tokens(5, 8))], 160, [60, 26, 60, 26, 13]),
    ],
)
@pytest.mark.parametrize("with_adapter", [False, True])
def test_what_prompts_begin_with_is_read_once(
    sequences: list[tuple[list[int], list[int]]],
    max_tokens: int,
    expected_reads: list[int],
    with_adapter: bool,
    tiny: Tiny,
    adapter: Tiny,
    engine_for: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, engine = tiny("llama"), engine_for(tiny("llama"))
    folder = adapter(base, seed=1)
    owner = engine.load_adapter(folder) if with_adapter else None
    monkeypatch.setattr(scoring, "MAX_TOKENS", max_tokens)
    reads: list[int] = []
    with before_each_forward(engine, lambda inputs: reads.append(inputs.ids.numel())):
        scores = engine.score(sequences, owner)
    assert reads == expected_reads
    reference = Reference(base, folder)
    for (prompt, completion), row in zip(sequences, scores, strict=True):
        torch.testing.assert_close(
            row.double(), expected(reference, prompt, completion, with_adapter), atol=2e-4, rtol=0
        )


def test_an_answer_that_begins_like_a_longer_prompt_is_scored_whole(engine: Engine) -> None:
    text = tokens(40)
    sequences = [
        (text[:20], text[20:]),
        (text[:20], tokens(5, 3)),
        (text[:30], text[30:]),
        (text[:30], tokens(5, 4)),
    ]
    together = engine.score(sequences)
    for sequence, scores in zip(sequences, together, strict=True):
        torch.testing.assert_close(scores, engine.score([sequence])[0], atol=2e-4, rtol=0)


@pytest.mark.parametrize("speculation", [False, True])
def test_what_closes_a_turn_is_scored_with_the_answer(
    speculation: bool, tiny: Tiny, adapter: Tiny
) -> None:
    base = load_base(tiny("llama"), device=DEVICE, dtype="float32")
    engine = Engine(base, EngineOptions(speculation=speculation))
    ann = engine.load_adapter(adapter(tiny("llama"), seed=1))
    requests = [
        Request(
            tokens(9),
            ann if seed % 2 else None,
            Contrast(0.3),
            Sampling(max_tokens=40, temperature=2.0, seed=seed),
            logprobs=True,
            closing=(7, 8, 9),
        )
        for seed in range(40)
    ]
    try:
        answers = engine.generate(requests)
        plain = engine.generate([replace(request, closing=()) for request in requests])
        assert {answer.finish_reason for answer in answers} == {"stop", "length"}
        for request, answer, without in zip(requests, answers, plain, strict=True):
            ids = [token.token_id for token in answer.logprobs]
            closing = [7, 8, 9] if answer.finish_reason == "stop" else []
            assert ids == [*answer.token_ids, *closing]
            assert (answer.text, answer.token_ids) == (without.text, without.token_ids)
            for adapter_used, name in ((request.adapter, "log_p_user"), (None, "log_p_base")):
                score = engine.score([(list(request.prompt), ids)], adapter_used)[0]
                reported = torch.tensor([getattr(token, name) for token in answer.logprobs])
                torch.testing.assert_close(reported, score, atol=1e-4, rtol=0)
    finally:
        engine.close()


def test_scoring_while_answers_run_changes_neither(
    tiny: Tiny, adapter: Tiny, engine: Engine
) -> None:
    ann, bob = (engine.load_adapter(adapter(tiny("llama"), seed=seed)) for seed in (1, 2))
    request = Request(tokens(9), ann, Contrast(0.5), Sampling(max_tokens=60))
    answer, score = engine.generate([request])[0], engine.score(SEQUENCES, bob)
    stream = engine.stream(request)
    next(stream)
    for one, other in zip(score, engine.score(SEQUENCES, bob), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)
    assert stream.completion() == answer


def test_nothing_to_score_gives_nothing(engine: Engine) -> None:
    assert engine.score([]) == []


@pytest.mark.parametrize("sequence", [([], [5]), ([5], [])], ids=str)
def test_an_empty_prompt_or_completion_is_refused(
    sequence: tuple[list[int], list[int]], engine: Engine
) -> None:
    with pytest.raises(InputError, match="at least one prompt token and one completion token"):
        engine.score([sequence])


def test_a_sequence_may_fill_the_context_but_not_exceed_it(engine: Engine) -> None:
    assert engine.score([(tokens(200), tokens(56))])[0].shape == (56,)
    with pytest.raises(ContextOverflow) as caught:
        engine.score([(tokens(200), tokens(57))])
    assert (caught.value.num_tokens, caught.value.context) == (257, 256)


@pytest.mark.parametrize("sequences", [SEQUENCES, BEGIN_ALIKE], ids=["unlike", "begin alike"])
def test_contrasted_scores_equal_an_independent_contrast(
    sequences: list[tuple[list[int], list[int]]],
    tiny: Tiny,
    adapter: Tiny,
    engine_for: Callable[..., Engine],
) -> None:
    base, engine = tiny("llama"), engine_for(tiny("llama"))
    folder = adapter(base, seed=1)
    reference = Reference(base, folder)
    contrasts = [Contrast(0.0, 0.1), Contrast(0.3, 0.1), Contrast(0.8, 0.02)]
    scores = engine.score_contrasted(sequences, engine.load_adapter(folder), contrasts)
    for (prompt, completion), rows in zip(sequences, scores, strict=True):
        user, of_base = reference.log_probs([*prompt, *completion])
        places = slice(len(prompt) - 1, -1)
        chosen = torch.tensor(completion).unsqueeze(-1)
        for contrast, row in zip(contrasts, rows, strict=True):
            p = user[places].exp()
            inside = p >= contrast.tau * p.amax(-1, keepdim=True)
            raw = torch.where(inside, p * of_base[places].exp() ** -contrast.alpha, 0)
            shared = raw / raw.sum(-1, keepdim=True) * torch.where(inside, p, 0).sum(-1, True)
            everything = torch.where(inside, shared, p)
            torch.testing.assert_close(everything.sum(-1), torch.ones(len(completion)).double())
            expected_row = everything.gather(-1, chosen).squeeze(-1).log()
            torch.testing.assert_close(row.double(), expected_row, atol=5e-4, rtol=0)
