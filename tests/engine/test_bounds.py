"""What an engine may hold: rows, tokens, memory.

Long prompts delay no other answer, what can never fit is refused, shortage is survived.
"""

import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine.test_failures import before_each_forward, slowly
from safetensors.torch import load_file, save_file

from langchain_cope.engine import (
    Completion,
    Contrast,
    Engine,
    EngineOptions,
    Piece,
    Request,
    Sampling,
    load_base,
    scheduler,
)
from langchain_cope.engine.forward import kv_cache as kv_module
from langchain_cope.engine.forward.inputs import Inputs
from langchain_cope.errors import EngineBusy, InputError, ModelError

Tiny = Callable[..., Path]
EngineWith = Callable[..., Engine]


def tokens(length: int, seed: int = 0) -> list[int]:
    return torch.randint(
        3, 380, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)
    ).tolist()


@pytest.fixture
def engine_with(tiny: Tiny) -> Iterator[EngineWith]:
    """`engine_with(max_rows=8)`: an engine of the tiny Llama, of this test's own."""
    engines: list[Engine] = []

    def make(**options: object) -> Engine:
        base = load_base(tiny("llama"), device="cpu", dtype="float32")
        engines.append(Engine(base, EngineOptions(**options)))  # type: ignore[arg-type]
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def many(engine: Engine, tiny: Tiny, adapter: Tiny, num_requests: int = 20) -> list[Request]:
    adapters = [engine.load_adapter(adapter(tiny("llama"), seed=seed)) for seed in (1, 2)]
    return [
        Request(
            tokens(3 + 7 * n % 60, n),
            adapters[n % 2],
            Contrast(0.3),
            Sampling(max_tokens=5 + n % 9),
        )
        for n in range(num_requests)
    ]


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({"max_rows": 1}, "max_rows must be an integer ≥ 2"),
        ({"max_tokens": 0}, "max_tokens must be an integer > 0 or None"),
        ({"kv_memory": 1.5}, "kv_memory must be bytes as an integer > 0, or a share"),
        ({"kv_memory": 0}, "kv_memory must be bytes"),
        ({"adapter_slots": 0}, "adapter_slots must be an integer ≥ 1"),
        ({"prefix_cache": -1}, "prefix_cache must be bytes as an integer ≥ 0"),
        ({"speculation": 1}, "speculation must be True or False"),
        ({"prefill_pause": 0}, "prefill_pause must be seconds > 0"),
        ({"stall": 0}, "prefill_pause must be seconds > 0"),
    ],
)
def test_an_option_out_of_range_is_refused_where_it_is_built(
    option: dict[str, object], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        EngineOptions(**option)  # type: ignore[arg-type]


def test_one_base_has_one_engine_and_its_options(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "base")  # the shared base has an engine already
    base = load_base(tmp_path / "base", device="cpu", dtype="float32")
    engine = Engine.of(base, EngineOptions(max_rows=8))
    assert Engine.of(base) is engine is Engine.of(base, EngineOptions(max_rows=8))
    with pytest.raises(
        InputError, match=r"already runs with EngineOptions\(max_rows=8.*not with .*max_rows=9"
    ):
        Engine.of(base, EngineOptions(max_rows=9))
    engine.close()


def test_memory_for_keys_and_values_holds_and_everyone_is_answered(
    engine_with: EngineWith, tiny: Tiny, adapter: Tiny
) -> None:
    free = engine_with()
    expected = free.generate(many(free, tiny, adapter))
    # Six rows of 128 positions, with their prompts.
    budget = 6 * (128 + 128) * free._batch.bytes_per_position
    engine, sizes = engine_with(kv_memory=budget), []

    def weigh(_: Inputs) -> None:
        kvs = (engine._batch._decode_rows.kv, engine._batch._prefill_rows.kv)
        positions = sum(kv.num_rows * kv.num_positions for kv in kvs)
        sizes.append(positions * engine._batch.bytes_per_position)

    with before_each_forward(engine, weigh):
        answers = engine.generate(many(engine, tiny, adapter))
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
    assert 0 < max(sizes) <= budget


def test_what_can_never_fit_is_refused_at_once_with_the_numbers(
    engine_with: EngineWith, tiny: Tiny, adapter: Tiny
) -> None:
    engine = engine_with(kv_memory=150_000, max_tokens=100)
    personal = engine.load_adapter(adapter(tiny("llama"), seed=1))
    num_bytes = 2 * (256 + 64) * engine._batch.bytes_per_position
    with pytest.raises(
        InputError,
        match=rf"needs {num_bytes:,} bytes .*2 rows of up to 210.*may take 150,000",
    ):
        engine.stream(Request(tokens(10), personal, sampling=Sampling(max_tokens=200)))
    with pytest.raises(
        InputError,
        match=r"may have 120 tokens in flight \(2 rows of up to 60 tokens\), but .* limit is 100",
    ):
        engine.stream(Request(tokens(10), personal, sampling=Sampling(max_tokens=50)))
    assert engine.generate([Request(tokens(10), sampling=Sampling(max_tokens=50))])


def test_tokens_in_flight_are_bounded(engine_with: EngineWith, tiny: Tiny, adapter: Tiny) -> None:
    engine, seen = engine_with(max_tokens=300), []

    def count(_: Inputs) -> None:
        batch = engine._batch
        seen.append(sum(r.request.num_rows * r.limit for r in batch.requests))

    with before_each_forward(engine, count):
        assert len(engine.generate(many(engine, tiny, adapter))) == 20
    assert 150 < max(seen) <= 300


def test_a_long_prompt_is_read_in_pieces_between_running_answers_tokens(
    engine_with: EngineWith,
) -> None:
    alone = engine_with(prefix_cache=0)
    long = Request(tokens(230), sampling=Sampling(max_tokens=8))
    expected = alone.generate([long])[0]
    engine, widths = engine_with(prefix_cache=0, prefill_pause=1e-6, speculation=False), []
    engine._scheduler._decode = engine._scheduler._batch.decode  # type: ignore[method-assign]
    with (
        before_each_forward(engine, slowly),
        before_each_forward(engine, lambda inputs: widths.append(inputs.ids.shape[1])),
    ):
        running = engine.stream(Request(tokens(5), sampling=Sampling(max_tokens=200)))
        next(running)
        widths.clear()
        assert engine.generate([long])[0].token_ids == expected.token_ids
    reading = [index for index, width in enumerate(widths) if width > 1]
    assert len(reading) >= 230 // 16
    assert {later - earlier for earlier, later in itertools.pairwise(reading)} == {2}, (
        "a token between pieces"
    )
    assert isinstance(running.completion(), Completion)


def test_prompts_may_take_as_long_as_a_step_takes(engine_with: EngineWith) -> None:
    engine, widths = engine_with(prefix_cache=0, prefill_pause=1e-6, speculation=False), []

    def slow_step(inputs: Inputs) -> None:
        widths.append(inputs.ids.shape[1])
        time.sleep(0.1 if widths[-1] == 1 else 0.01)

    with before_each_forward(engine, slow_step):
        running = engine.stream(Request(tokens(5), sampling=Sampling(max_tokens=200)))
        next(running)
        next(running)
        widths.clear()
        engine.generate([Request(tokens(230), sampling=Sampling(max_tokens=1))])
        running.close()
    pieces = [width for width in widths if width > 1]
    assert len(pieces) < 230 // 16 // 2


def test_a_short_prompt_does_not_wait_for_a_long_one(engine_with: EngineWith) -> None:
    engine, order = engine_with(prefix_cache=0, prefill_pause=1e-6), []
    with before_each_forward(engine, slowly):
        running = engine.stream(Request(tokens(5), sampling=Sampling(max_tokens=200)))
        next(running)
        streams = {
            "long": engine.stream(Request(tokens(240), sampling=Sampling(max_tokens=1))),
            "short": engine.stream(Request(tokens(6), sampling=Sampling(max_tokens=1))),
        }

        def read(name: str) -> None:
            streams[name].completion()
            order.append(name)

        threads = [threading.Thread(target=read, args=(name,)) for name in streams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    running.close()
    assert sorted(order) == ["long", "short"]


def test_out_of_memory_shrinks_the_batch_and_all_are_answered(
    engine_with: EngineWith, tiny: Tiny, adapter: Tiny
) -> None:
    free = engine_with()
    expected = free.generate(many(free, tiny, adapter))
    engine, failures = engine_with(), []

    def too_much(inputs: Inputs) -> None:
        if inputs.ids.numel() > 40:
            failures.append(inputs.ids.shape)
            raise torch.OutOfMemoryError("no room for more than 40 tokens")

    with before_each_forward(engine, too_much):
        answers = engine.generate(many(engine, tiny, adapter))
    assert failures
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
    assert [a.text for a in answers] == [a.text for a in expected]


def test_answers_in_mid_stream_survive_running_out_of_memory(
    engine_with: EngineWith, tiny: Tiny, adapter: Tiny
) -> None:
    free = engine_with()
    expected = free.generate(many(free, tiny, adapter))
    engine, calls = engine_with(), []

    def now_and_then(inputs: Inputs) -> None:
        calls.append(1)
        if len(calls) in (4, 6, 9, 13):
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
            )

    with before_each_forward(engine, now_and_then):
        streams = engine.stream_all(many(engine, tiny, adapter))
        events_of_all = [list(stream) for stream in streams]
    for events, answer in zip(events_of_all, expected, strict=True):
        *pieces, last = events
        assert isinstance(last, Completion)
        assert last.token_ids == answer.token_ids
        assert "".join(p.text for p in pieces if isinstance(p, Piece)) == answer.text, (
            "nothing twice, nothing lost"
        )


def test_what_never_fits_the_device_fails_alone_with_its_cause(engine_with: EngineWith) -> None:
    engine = engine_with()

    def never(inputs: Inputs) -> None:
        if (inputs.ids == 9).any():
            raise torch.OutOfMemoryError("not even this")

    expected = engine.generate([Request(tokens(5), sampling=Sampling(max_tokens=40))])[0]
    assert 9 not in expected.token_ids
    with before_each_forward(engine, never):
        good = engine.stream(Request(tokens(5), sampling=Sampling(max_tokens=40)))
        with pytest.raises(ModelError, match="OutOfMemoryError: not even this") as caught:
            engine.generate([Request([9, 9, 9], sampling=Sampling(max_tokens=4))])
        assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
        assert good.completion() == expected


def test_a_consumer_that_stops_reading_delays_no_other(engine_with: EngineWith) -> None:
    engine = engine_with()
    idle = engine.stream(Request(tokens(5), sampling=Sampling(max_tokens=100)))
    next(idle)
    others = engine.generate(
        [Request(tokens(5 + n), sampling=Sampling(max_tokens=100)) for n in range(4)]
    )
    assert len(others) == 4
    assert (
        idle.completion().token_ids
        == engine.generate([Request(tokens(5), sampling=Sampling(max_tokens=100))])[0].token_ids
    )


def test_running_out_of_memory_while_admitting_is_survived(
    engine_with: EngineWith, tiny: Tiny, adapter: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = engine_with()
    expected = free.generate(many(free, tiny, adapter))
    engine, resized, calls = engine_with(), kv_module._resized, []

    def now_and_then(*arguments: int) -> torch.Tensor:
        calls.append(1)
        if len(calls) % 7 == 3 and len(calls) < 60:
            raise torch.OutOfMemoryError("no room for rows")
        return resized(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(kv_module, "_resized", now_and_then)
    answers: list[tuple[int, ...] | None] = []
    failures: list[str] = []
    # The first ones are alone: they may fail, by name, and do no harm.
    for request in many(engine, tiny, adapter):
        try:
            answers.append(engine.generate([request])[0].token_ids)
        except ModelError as error:
            answers.append(None)
            failures.append(str(error))
    together = engine.generate(many(engine, tiny, adapter))
    assert [a.token_ids for a in together] == [a.token_ids for a in expected]
    assert all(answer in (None, a.token_ids) for answer, a in zip(answers, expected, strict=True))
    assert len(failures) < 12
    assert all("no room for rows" in failure for failure in failures)


def test_a_deadline_holds_while_there_is_no_room(engine_with: EngineWith) -> None:
    engine = engine_with(max_rows=2, speculation=False)
    with before_each_forward(engine, slowly):
        running = engine.stream_all([Request(tokens(5), sampling=Sampling(max_tokens=200))] * 2)
        next(running[0])
        started = time.monotonic()
        late = Request(tokens(6), sampling=Sampling(max_tokens=4), deadline=started + 0.2)
        with pytest.raises(TimeoutError):
            engine.generate([late])
        assert time.monotonic() - started < 1.5
        for stream in running:
            stream.close()


def test_closing_a_stream_wakes_the_thread_that_reads_it(engine_with: EngineWith) -> None:
    engine, read = engine_with(speculation=False), []
    with before_each_forward(engine, lambda _: time.sleep(0.3)):
        stream = engine.stream(Request(tokens(5), sampling=Sampling(max_tokens=200)))
        reader = threading.Thread(target=lambda: read.extend(stream))
        reader.start()
        time.sleep(0.1)
        stream.close()
        reader.join(5)
    assert not reader.is_alive()


# peft's warning about the output head
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_an_adapter_of_another_base_or_of_the_output_head_is_refused(
    engine_with: EngineWith, tiny: Tiny, adapter: Tiny, engine_for: EngineWith, tmp_path: Path
) -> None:
    engine = engine_with()
    other = engine_for(tiny("gpt2")).load_adapter(
        adapter(tiny("gpt2"), seed=1, fan_in_fan_out=True)
    )
    with pytest.raises(InputError, match="loaded for another base"):
        engine.stream(Request(tokens(5), other))
    shutil.copytree(
        adapter(tiny("llama"), seed=1, targets=["q_proj", "lm_head"]), tmp_path / "head"
    )
    weights = tmp_path / "head" / "adapter_model.safetensors"
    save_file(
        {name: tensor for name, tensor in load_file(weights).items() if ".lora_" in name}, weights
    )
    with pytest.raises(ModelError, match="changes 'lm_head', which is not served"):
        engine.load_adapter(tmp_path / "head")
    assert engine.generate(
        [Request(tokens(5), engine.load_adapter(adapter(tiny("llama"), seed=1)))]
    )


def test_a_prompt_read_in_pieces_keeps_its_room_when_others_leave(
    engine_with: EngineWith,
) -> None:
    engine = engine_with(prefill_pause=1e-9, prefix_cache=0)
    early = Request(tokens(8), sampling=Sampling(max_tokens=3))
    late = Request(tokens(200), sampling=Sampling(max_tokens=12))
    alone = engine.generate([late])[0]
    first = engine.stream(early)
    next(first)
    second = engine.stream(late)
    assert first.completion().finish_reason == "length"
    assert second.completion() == alone


def test_no_more_requests_wait_than_may(engine_with: EngineWith) -> None:
    engine = engine_with(max_rows=2, max_waiting=2, speculation=False)
    long = Request(list(range(3, 40)), sampling=Sampling(max_tokens=200, temperature=1.0))
    running = [engine.stream(long), engine.stream(long)]
    for stream in running:
        next(stream)  # both are in the batch
    waiting = [engine.stream(long), engine.stream(long)]
    with pytest.raises(EngineBusy, match="max_waiting"):
        engine.stream(long)
    offline = engine.stream(replace(long, offline=True))
    for stream in [*running, *waiting, offline]:
        stream.close()


def test_an_answer_tells_how_long_it_waited_and_the_engine_adds_up(
    engine_with: EngineWith,
) -> None:
    engine = engine_with(max_rows=2, speculation=False)
    request = Request(list(range(3, 40)), sampling=Sampling(max_tokens=20, temperature=1.0))
    answers = engine.generate([request] * 4)
    waited = [answer.queue_seconds for answer in answers]
    assert max(waited) > min(waited) >= 0
    for answer in answers:
        assert answer.queue_seconds < answer.first_token_seconds
    engine.drop_caches()  # after the step in which the last one left
    now = engine.statistics()
    assert now.answers == 4
    assert now.queue_seconds == pytest.approx(sum(waited))
    assert now.first_token_seconds == pytest.approx(
        sum(answer.first_token_seconds for answer in answers)
    )
    assert 0 <= now.kv_bytes <= now.max_kv_bytes


@pytest.mark.parametrize("bounds", [{"max_rows": 4}, {"max_rows": 64, "max_tokens": 600}], ids=str)
def test_a_reader_waits_for_no_offline_requests(
    engine_with: EngineWith, tiny: Tiny, adapter: Tiny, bounds: dict[str, int]
) -> None:
    engine = engine_with(**bounds, speculation=False)
    job = [
        Request(
            tokens(20, seed),
            sampling=Sampling(max_tokens=60, temperature=1.0, seed=seed),
            offline=True,
        )
        for seed in range(40)
    ]
    alone = [answer.token_ids for answer in engine.generate(job)]
    personal = engine.load_adapter(adapter(tiny("llama"), seed=1))
    reader = Request(tokens(30), personal, sampling=Sampling(max_tokens=5))
    before, answers = engine.statistics().answers, engine.generate_each(job)
    found = [next(answers)]  # it is at work, and in the line are many more
    [answer] = engine.generate([reader])
    assert len(answer.token_ids) == 5
    assert engine.statistics().answers - before < 20
    found += answers
    assert [each.token_ids for each in found] == alone, "whoever made way goes on where it was"


def test_a_readers_prompt_waits_for_few_offline_prompts(
    engine_with: EngineWith, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MAX_PROMPT_TOKENS", 600)
    engine = engine_with(prefix_cache=0, speculation=False)
    job = [
        Request(tokens(200, seed), sampling=Sampling(max_tokens=20), offline=True)
        for seed in range(32)
    ]
    reader, waited = Request(tokens(90, 99), sampling=Sampling(max_tokens=2)), []

    def ask() -> None:
        before = engine.statistics().prefills
        next(engine.stream(reader))
        waited.append(engine.statistics().prefills - before)

    asking = threading.Thread(target=ask)

    def start_once(_: Inputs) -> None:
        if asking.ident is None:
            asking.start()

    with before_each_forward(engine, start_once), before_each_forward(engine, slowly):
        assert len(engine.generate(job)) == 32
        asking.join()
    assert waited[0] <= 3


def test_readers_take_no_more_rows_than_they_may(engine_with: EngineWith) -> None:
    engine = engine_with(max_rows=4, speculation=False)
    long = Request(tokens(20), sampling=Sampling(max_tokens=200, temperature=1.0), offline=True)
    job, seen = engine.stream_all([long] * 8), []
    next(job[0])

    def count(_: Inputs) -> None:
        readers = [each for each in engine._batch.requests if not each.request.offline]
        seen.append((len(readers), engine._batch.num_rows))

    with before_each_forward(engine, count):
        readers = [replace(long, offline=False, sampling=Sampling(max_tokens=9))] * 12
        assert len(engine.generate(readers)) == 12
    assert max(number for number, _ in seen) == 4
    assert max(rows for _, rows in seen) <= 8
    for stream in job:
        stream.close()
