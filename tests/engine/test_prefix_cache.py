"""Shared beginnings are copied instead of computed, never across users, within their bound.

Answers stay the same.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from engine.test_failures import before_each_forward
from tiny import DEVICE

from langchain_cope.engine import Contrast, Engine, EngineOptions, Request, Sampling, load_base
from langchain_cope.engine.answer import ActiveRequest
from langchain_cope.engine.prefix_cache import BLOCK

Tiny = Callable[..., Path]
SAMPLING = Sampling(max_tokens=12)


def tokens(length: int, seed: int) -> list[int]:
    return torch.randint(3, 380, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(params=["llama", "gemma2", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def engines(base: Path, **options: int) -> tuple[Engine, Engine]:
    """One that remembers beginnings, one that does not."""
    loaded = load_base(base, device=DEVICE, dtype="float32")
    return Engine(loaded, EngineOptions(**options)), Engine(loaded, EngineOptions(prefix_cache=0))


@pytest.fixture
def closing() -> Iterator[list[Engine]]:
    engines: list[Engine] = []
    yield engines
    for engine in engines:
        engine.close()


def test_a_known_beginning_gives_the_same_answer_with_less_to_read(
    family: str, tiny: Tiny, adapter: Tiny, closing: list[Engine]
) -> None:
    base = tiny(family)
    closing += engines(base)
    remembering, plain = closing
    extra = {"fan_in_fan_out": True} if family == "gpt2" else {}
    folder = adapter(base, seed=1, **extra)
    system = tokens(3 * BLOCK + 5, 1)
    for seed in range(3):
        prompt = system + tokens(9 + seed, 100 + seed)
        answers = [
            engine.generate(
                [Request(prompt, engine.load_adapter(folder), Contrast(0.5), sampling=SAMPLING)]
            )[0]
            for engine in (remembering, plain)
        ]
        assert answers[0] == answers[1]
    # Every adapter that is loaded by hand is another owner: what is shared here is the base's row.
    assert remembering.statistics().prefix_tokens_reused == 2 * 3 * BLOCK
    assert plain.statistics().prefix_tokens_reused == 0


def test_a_chat_goes_on_from_its_last_answer(
    tiny: Tiny, adapter: Tiny, closing: list[Engine]
) -> None:
    closing += engines(tiny("llama"))
    engine, plain = closing
    ann = engine.load_adapter(adapter(tiny("llama"), seed=1))
    prompt = tokens(40, 7)
    answer = engine.generate(
        [Request(prompt, ann, Contrast(0.5), sampling=Sampling(max_tokens=60))]
    )[0]
    length = len(prompt) + len(answer.token_ids)
    again = Request(
        [*prompt, *answer.token_ids, *tokens(6, 8)], ann, Contrast(0.5), sampling=SAMPLING
    )
    assert engine.generate([again]) == plain.generate([again])
    assert engine.statistics().prefix_tokens_reused == 2 * ((length - 1) // BLOCK) * BLOCK


def test_only_the_prompt_is_kept_of_an_offline_answer(
    tiny: Tiny, adapter: Tiny, closing: list[Engine]
) -> None:
    closing += engines(tiny("llama"))
    engine, plain = closing
    ann, prompt = engine.load_adapter(adapter(tiny("llama"), seed=1)), tokens(BLOCK + 5, 7)
    sampling = Sampling(max_tokens=2 * BLOCK)
    (answer,) = engine.generate(
        [Request(prompt, ann, Contrast(0.5), sampling=sampling, offline=True)]
    )
    assert len(answer.token_ids) > BLOCK
    again = Request(
        [*prompt, *answer.token_ids, *tokens(6, 8)], ann, Contrast(0.5), sampling=SAMPLING
    )
    assert engine.generate([again]) == plain.generate([again])
    assert engine.statistics().prefix_tokens_reused == 2 * BLOCK


def test_users_never_share_their_own_states(
    tiny: Tiny, adapter: Tiny, closing: list[Engine]
) -> None:
    closing += engines(tiny("llama"))
    engine, plain = closing
    prompt = tokens(2 * BLOCK + 3, 3)
    ann, bob = (engine.load_adapter(adapter(tiny("llama"), seed=seed)) for seed in (1, 2))
    for user in (ann, bob, ann):
        request = Request(prompt, user, Contrast(0.0), sampling=SAMPLING)  # the personal row alone
        assert engine.generate([request]) == plain.generate([request])
    assert engine.statistics().prefix_tokens_reused == 2 * BLOCK, "ann's second request alone"


def test_the_bound_holds_and_what_was_used_last_stays(tiny: Tiny, closing: list[Engine]) -> None:
    base = load_base(tiny("llama"), device=DEVICE, dtype="float32")
    probe = Engine(base, EngineOptions())
    block_bytes = BLOCK * probe._batch.bytes_per_position
    closing += [probe, *engines(tiny("llama"), prefix_cache=5 * block_bytes)]
    _, engine, plain = closing
    often = tokens(2 * BLOCK + 1, 1)
    for seed in range(2, 12):
        for prompt in (often, tokens(3 * BLOCK + 1, seed)):
            request = Request(prompt, sampling=Sampling(max_tokens=2))
            assert engine.generate([request]) == plain.generate([request])
        assert engine._batch.prefixes.num_bytes <= 5 * block_bytes
    assert engine.statistics().prefix_tokens_reused == 9 * 2 * BLOCK


@contextmanager
def widths_of_forwards(engine: Engine) -> Iterator[list[tuple[int, int]]]:
    """(rows, columns) of each forward."""
    seen: list[tuple[int, int]] = []
    with before_each_forward(engine, lambda inputs: seen.append(tuple(inputs.ids.shape))):
        yield seen


@pytest.mark.parametrize("two_rows", [False, True])
def test_a_prompt_asked_at_once_by_several_is_read_once(
    two_rows: bool, family: str, tiny: Tiny, adapter: Tiny, closing: list[Engine]
) -> None:
    base = tiny(family)
    closing += engines(base)
    sharing, plain = closing
    folder = adapter(base, seed=1, **({"fan_in_fan_out": True} if family == "gpt2" else {}))
    answers = []
    for engine in (sharing, plain):
        ann = engine.load_adapter(folder) if two_rows else None
        requests = [
            Request(
                tokens(70, 4 + seed // 3),
                ann,
                Contrast(0.5),
                Sampling(max_tokens=9, temperature=1.0, seed=seed),
            )
            for seed in range(6)
        ]
        with widths_of_forwards(engine) as seen:
            answers.append(engine.generate(requests))
        if engine is sharing:
            assert seen[0] == (2 * (1 + two_rows), 70), "two prompts in one forward"
            assert all(columns < 16 for _, columns in seen[1:])
    assert answers[0] == answers[1]
    assert sharing.statistics().prefix_tokens_reused == 4 * 69 * (1 + two_rows)
    assert plain.statistics().prefix_tokens_reused == 0, "none is shared where none is to be"


def test_a_shared_system_prompt_is_read_once(
    tiny: Tiny, adapter: Tiny, closing: list[Engine]
) -> None:
    closing += engines(tiny("llama"))
    engine, plain = closing
    ann = engine.load_adapter(adapter(tiny("llama"), seed=1))
    system = tokens(50, 5)
    requests = [
        Request(system + tokens(5 + n, n), ann, Contrast(0.5), sampling=SAMPLING) for n in range(5)
    ]
    assert engine.generate(requests) == [plain.generate([each])[0] for each in requests]
    assert engine.statistics().prefix_tokens_reused == 2 * 4 * 50


def test_users_who_ask_the_same_at_once_share_nothing_of_their_own(
    tiny: Tiny, adapter: Tiny, closing: list[Engine]
) -> None:
    closing += engines(tiny("llama"))
    engine, plain = closing
    users = [engine.load_adapter(adapter(tiny("llama"), seed=seed)) for seed in (1, 2, 3)]
    prompt = tokens(70, 6)
    requests = [Request(prompt, user, Contrast(0.0), sampling=SAMPLING) for user in users]
    assert engine.generate(requests) == [plain.generate([each])[0] for each in requests]
    assert engine.statistics().prefix_tokens_reused == 0


@pytest.mark.parametrize("end", ["cancelled", "failed"])
def test_who_waited_for_a_prompt_reads_it_where_its_reader_ends(
    end: str, tiny: Tiny, closing: list[Engine]
) -> None:
    closing += engines(tiny("llama"))
    engine, plain = closing
    requests = [Request(tokens(70, 9), sampling=SAMPLING) for _ in range(3)]
    ended: list[object] = []

    def end_first(_: object) -> None:
        first = engine._batch.prefilling[:1]
        if not ended and first:
            ended.append(first[0])
            first[0].cancelled = True
            if end == "failed":
                raise RuntimeError("no answer for the first")

    with before_each_forward(engine, end_first):
        _first, *others = engine.stream_all(requests)
        answers = [stream.completion() for stream in others]
    assert answers == [plain.generate([each])[0] for each in requests[1:]]


def test_who_waits_for_a_prompt_keeps_its_deadline_and_place(
    tiny: Tiny, closing: list[Engine]
) -> None:
    base = load_base(tiny("llama"), device=DEVICE, dtype="float32")
    engine = Engine(base, EngineOptions(max_rows=3))
    closing.append(engine)
    long = tokens(200, 9)
    served: dict[ActiveRequest, int] = {}

    def slow(_: object) -> None:
        time.sleep(0.01)
        served.update((each, len(each.request.prompt)) for each in engine._batch.requests)

    overdue = Request(long, sampling=SAMPLING, deadline=time.monotonic())
    requests = [Request(long, sampling=SAMPLING) for _ in range(3)]
    with before_each_forward(engine, slow):
        streams = engine.stream_all([*requests, overdue, Request(tokens(5, 1), sampling=SAMPLING)])
        with pytest.raises(TimeoutError):
            streams[3].completion()
        for stream in (*streams[:3], streams[4]):
            stream.completion()
    assert list(served.values()) == [200, 200, 200, 5], (
        "the room of those who wait is not given away"
    )


@pytest.mark.parametrize("at_once", [False, True])
def test_askers_share_nothing_of_a_prompt_but_its_public_beginning(
    at_once: bool, tiny: Tiny, adapter: Tiny, closing: list[Engine]
) -> None:
    closing += engines(tiny("llama"))
    engine, plain = closing
    ann = engine.load_adapter(adapter(tiny("llama"), seed=1))
    public = tokens(BLOCK + 20, 4)
    prompt = public + tokens(BLOCK, 5)

    def request(asker: str, num_public: int) -> Request:
        return Request(
            prompt,
            ann,
            Contrast(0.5),
            sampling=SAMPLING,
            cache_owner=asker,
            public_prefix=public[:num_public],
        )

    def num_reused(*requests: Request) -> int:
        before = engine.statistics().prefix_tokens_reused
        if at_once:
            answers = engine.generate(requests)
        else:
            answers = [engine.generate([each])[0] for each in requests]
        assert answers == plain.generate(requests)
        engine.drop_caches()
        return engine.statistics().prefix_tokens_reused - before

    assert num_reused(request("alice", 0), request("bob", 0)) == 0
    assert num_reused(request("alice", 0), request("alice", 0)) > 2 * BLOCK
    whole_blocks = BLOCK + 20 if at_once else BLOCK
    assert num_reused(request("alice", 52), request("bob", 52)) == 2 * whole_blocks
    assert engine.statistics().prompt_tokens == 6 * 2 * len(prompt)
