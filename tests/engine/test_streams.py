"""Answers as they come: joining and leaving, where they end, their pieces and log-probabilities."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine.reference import Reference

from langchain_cope.engine import Completion, Contrast, Engine, Piece, Request, Sampling
from langchain_cope.errors import ContextOverflow, InputError

Tiny = Callable[..., Path]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(
        3, 380, (length,), generator=torch.Generator().manual_seed(seed + length)
    ).tolist()


def ask(engine: Engine, prompt: list[int], **sampling: object) -> Completion:
    return engine.generate([Request(prompt, sampling=Sampling(**sampling))])[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_joining_and_leaving_in_mid_stream_changes_no_answer(
    family: str, tiny: Tiny, adapter: Tiny, engine_for: Callable[..., Engine]
) -> None:
    base = tiny(family)
    engine = engine_for(base)
    extra = {"fan_in_fan_out": True} if family == "gpt2" else {}
    ann, bob = (engine.load_adapter(adapter(base, seed=seed, **extra)) for seed in (1, 2))
    long = Sampling(max_tokens=40)
    requests = [
        Request(prompt_of(6), ann, Contrast(0.5), long),
        Request(prompt_of(29), bob, Contrast(0.1, 0.01), long),
        Request(prompt_of(3), None, sampling=long),
        Request(prompt_of(14), ann, Contrast(0.0), Sampling(max_tokens=9)),
    ]
    alone = [engine.generate([request])[0] for request in requests]

    first = engine.stream(requests[0])
    for _ in range(4):
        next(first)
    second = engine.stream(requests[1])  # a longer prompt than everything so far
    next(second)
    third, fourth = engine.stream(requests[2]), engine.stream(requests[3])
    fifth = engine.stream(Request(prompt_of(50), bob, Contrast(0.3), long))
    next(fifth)
    fifth.close()  # the longest row leaves again
    answers = [stream.completion() for stream in (first, second, third, fourth)]
    assert [a.token_ids for a in answers] == [a.token_ids for a in alone]
    assert [a.text for a in answers] == [a.text for a in alone]
    assert [a.contrast_changed for a in answers] == [a.contrast_changed for a in alone]


def test_more_requests_than_rows_wait_and_come_out_the_same(
    tiny: Tiny, adapter: Tiny, engine: Engine
) -> None:
    ann = engine.load_adapter(adapter(tiny("llama"), seed=1))
    requests = [
        Request(
            prompt_of(3 + n % 5, n),
            ann,
            Contrast(0.1),
            Sampling(max_tokens=3 + n % 4),
            logprobs=n == 5,
        )
        for n in range(50)  # 100 rows, where 64 fit
    ]
    answers = engine.generate(requests)
    for n in (0, 5, 31, 49):
        assert answers[n].token_ids == engine.generate([requests[n]])[0].token_ids


def test_the_answer_ends_after_max_tokens_with_length(engine: Engine) -> None:
    for count in (1, 2, 9):
        answer = ask(engine, prompt_of(5), max_tokens=count)
        assert (len(answer.token_ids), answer.finish_reason) == (count, "length")


def test_the_end_of_the_context_ends_the_answer_with_length(engine: Engine) -> None:
    assert engine.base.context == 256
    answer = ask(engine, prompt_of(250), max_tokens=100)
    assert (len(answer.token_ids), answer.finish_reason) == (6, "length")


@pytest.mark.parametrize("length", [256, 257, 400])
def test_a_prompt_that_fills_the_context_is_refused_with_the_numbers(
    length: int, engine: Engine
) -> None:
    with pytest.raises(
        ContextOverflow, match=rf"prompt has {length} tokens, but .* context holds 256"
    ) as caught:
        engine.stream(Request(prompt_of(length)))
    assert (caught.value.num_tokens, caught.value.context) == (length, 256)


def test_one_refused_prompt_leaves_nothing_of_its_batch_running(engine: Engine) -> None:
    with pytest.raises(ContextOverflow):
        engine.generate(
            [Request(prompt_of(5), sampling=Sampling(max_tokens=200)), Request(prompt_of(300))]
        )
    assert ask(engine, prompt_of(5), max_tokens=1).finish_reason == "length"


@pytest.mark.parametrize("prompt", [[], [5, 384], [5, -1]], ids=str)
def test_a_prompt_that_is_no_prompt_is_refused(prompt: list[int], engine: Engine) -> None:
    with pytest.raises(InputError, match="prompt"):
        engine.stream(Request(prompt))


def test_every_end_token_of_the_generation_config_stops_the_answer(
    tiny: Tiny, engine: Engine, engine_for: Callable[..., Engine], tmp_path: Path
) -> None:
    free = ask(engine, prompt_of(8), max_tokens=20)
    ids = list(free.token_ids)
    ends = [ids[4], ids[11]]
    for end in ends:
        folder = tmp_path / str(end)
        shutil.copytree(tiny("llama"), folder)
        config = {"eos_token_id": [engine.base.tokenizer.eos_token_id, end]}
        (folder / "generation_config.json").write_text(json.dumps(config))
        stopping = engine_for(folder)
        answer = ask(stopping, prompt_of(8), max_tokens=20)
        assert stopping.base.eos_ids >= {end, engine.base.tokenizer.eos_token_id}
        assert list(answer.token_ids) == ids[: ids.index(end) + 1], "the end token is counted"
        assert answer.finish_reason == "stop"
        assert answer.text == engine.base.tokenizer.decode(
            ids[: ids.index(end)], skip_special_tokens=True
        )


def test_a_stop_string_across_token_borders_ends_the_answer_before_it(engine: Engine) -> None:
    prompt = engine.base.prompt_ids([{"role": "user", "content": "the dog"}])
    free = ask(engine, prompt, max_tokens=40)
    pieces = [engine.base.tokenizer.decode([token]) for token in free.token_ids]
    # The end of one token and the beginning of the next, both plain text.
    border = next(
        i
        for i in range(5, 38)
        if "�" not in pieces[i] + pieces[i + 1] and pieces[i].strip() and pieces[i + 1].strip()
    )
    stop = pieces[border][-1] + pieces[border + 1][0]
    streamed = list(
        engine.stream(
            Request(prompt, sampling=Sampling(max_tokens=40, stop=("never in the text", stop)))
        )
    )
    answer = streamed[-1]
    assert isinstance(answer, Completion)
    assert answer.finish_reason == "stop"
    assert answer.text == free.text[: free.text.index(stop)]
    assert "".join(p.text for p in streamed[:-1] if isinstance(p, Piece)) == answer.text
    assert len(answer.token_ids) < len(free.token_ids)


def test_a_stop_string_that_never_comes_holds_nothing_back_at_the_end(engine: Engine) -> None:
    free = ask(engine, prompt_of(9), max_tokens=15)
    almost = free.text[-1] + "\0never"
    assert ask(engine, prompt_of(9), max_tokens=15, stop=(almost,)).text == free.text


@pytest.mark.parametrize("seed", range(6))
def test_pieces_joined_are_the_answer_and_the_answer_is_the_decoded_tokens(
    seed: int, engine: Engine
) -> None:
    """Random weights spell mostly broken UTF-8, the hardest case for a detokenizer."""
    sampling = Sampling(max_tokens=60, temperature=1.5, seed=seed)
    *pieces, answer = engine.stream(Request(prompt_of(5), sampling=sampling))
    assert isinstance(answer, Completion)
    ids = [token for token in answer.token_ids if token not in engine.base.eos_ids]
    assert "".join(piece.text for piece in pieces if isinstance(piece, Piece)) == answer.text
    assert answer.text == engine.base.tokenizer.decode(ids, skip_special_tokens=True)
    assert all(piece.text for piece in pieces if isinstance(piece, Piece)), "no empty pieces"


def test_a_stream_read_to_its_end_stays_ended(engine: Engine) -> None:
    stream = engine.stream(Request(prompt_of(5), sampling=Sampling(max_tokens=2)))
    assert isinstance(list(stream)[-1], Completion)
    assert list(stream) == []
    stream.close()


async def test_the_async_stream_gives_the_same_pieces(engine: Engine) -> None:
    request = Request(prompt_of(7), sampling=Sampling(max_tokens=20))
    here = list(engine.stream(request))
    there, other = await asyncio.gather(*(collect(engine, request) for _ in range(2)))
    assert there == other == here


async def collect(engine: Engine, request: Request) -> list[Piece | Completion]:
    return [event async for event in engine.astream(request)]


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_logprobs_equal_an_independent_log_softmax(
    alpha: float, tiny: Tiny, adapter: Tiny, engine: Engine
) -> None:
    folder = adapter(tiny("llama"), seed=1)
    request = Request(
        prompt_of(11),
        engine.load_adapter(folder),
        Contrast(alpha),
        Sampling(max_tokens=12),
        logprobs=True,
    )
    assert request.num_rows == 2
    others = [
        Request(prompt_of(30), sampling=Sampling(max_tokens=12)),
        Request(prompt_of(2), request.adapter),
    ]
    answer = engine.generate([others[0], request, others[1]])[1]
    user, base = Reference(tiny("llama"), folder).log_probs([*request.prompt, *answer.token_ids])
    for step, token in enumerate(answer.logprobs):
        row = len(request.prompt) - 1 + step
        assert token.token_id == answer.token_ids[step]
        assert token.text == engine.base.tokenizer.decode([token.token_id])
        assert token.log_p_user == pytest.approx(float(user[row, token.token_id]), abs=1e-4)
        assert token.log_p_base == pytest.approx(float(base[row, token.token_id]), abs=1e-4)
        assert token.reward == pytest.approx(token.log_p_user - alpha * token.log_p_base)
    without = engine.generate(
        [Request(request.prompt, request.adapter, Contrast(alpha), Sampling(max_tokens=12))]
    )[0]
    assert without.token_ids == answer.token_ids, "asking for them changes nothing"
    assert without.logprobs == ()


def test_logprobs_of_the_base_alone_are_its_own_twice(tiny: Tiny, engine: Engine) -> None:
    request = Request(prompt_of(11), sampling=Sampling(max_tokens=6), logprobs=True)
    *pieces, answer = engine.stream(request)
    assert isinstance(answer, Completion)
    user, _ = Reference(tiny("llama")).log_probs([*request.prompt, *answer.token_ids])
    for step, token in enumerate(answer.logprobs):
        assert token.log_p_user == token.log_p_base
        assert token.log_p_user == pytest.approx(float(user[10 + step, token.token_id]), abs=1e-4)
    assert (
        tuple(t for piece in pieces if isinstance(piece, Piece) for t in piece.logprobs)
        == answer.logprobs
    )
