"""What goes wrong in the middle: a failing forward, `close`, a reader that goes away.

The engine goes on for all others.
"""

import asyncio
import gc
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from langchain_cope.engine import (
    AdapterSource,
    Completion,
    Contrast,
    Engine,
    Piece,
    Request,
    Sampling,
    load_base,
)
from langchain_cope.engine.forward.inputs import Inputs
from langchain_cope.errors import EngineClosed, ModelError

Tiny = Callable[..., Path]
MARKER = 7
PROMPT = [20, 30, 40, 50]
LONG = Sampling(max_tokens=200)


@pytest.fixture
def own(tiny: Tiny) -> Iterator[Engine]:
    """An engine of this test's own, beside the shared one: hooks and `close` stay in it."""
    engine = Engine(load_base(tiny("llama"), device="cpu", dtype="float32"))
    yield engine
    engine.close()


@contextmanager
def before_each_forward(engine: Engine, act: Callable[[Inputs], object]) -> Iterator[None]:
    """`act` sees the inputs of every forward of the engine before it is computed."""
    batch, forward = engine._batch, engine._batch.forward

    class Watched:
        sites = forward.sites

        def __call__(self, inputs: Inputs) -> torch.Tensor:
            act(inputs)
            return forward(inputs)

    batch.forward = Watched()
    try:
        yield
    finally:
        batch.forward = forward


@contextmanager
def after_each_forward(
    engine: Engine, act: Callable[[torch.Tensor, Inputs], object]
) -> Iterator[None]:
    """`act` sees, and may change, the logits of every forward of the engine."""
    batch, forward = engine._batch, engine._batch.forward

    class Watched:
        sites = forward.sites

        def __call__(self, inputs: Inputs) -> torch.Tensor:
            logits = forward(inputs)
            act(logits, inputs)
            return logits

    batch.forward = Watched()
    try:
        yield
    finally:
        batch.forward = forward


def fail_on_marker(inputs: Inputs) -> None:
    if (inputs.ids == MARKER).any():
        raise RuntimeError("the marker was seen")


def slowly(_: object) -> None:
    time.sleep(0.01)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline, "it did not happen within 10 s"
        time.sleep(0.002)


def test_a_failing_prompt_fails_with_its_cause_and_others_go_on(own: Engine) -> None:
    expected = own.generate([Request(PROMPT, sampling=LONG)])[0]
    with before_each_forward(own, slowly), before_each_forward(own, fail_on_marker):
        running = own.stream(Request(PROMPT, sampling=LONG))
        next(running)
        failing = own.stream(Request([20, MARKER], sampling=LONG))
        with pytest.raises(ModelError, match="RuntimeError: the marker was seen") as caught:
            list(failing)
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert list(failing) == [], "nothing comes after the error"
        if MARKER not in expected.token_ids:
            assert running.completion().token_ids == expected.token_ids
    assert own.generate([Request(PROMPT, sampling=LONG)])[0] == expected


def test_a_failing_step_fails_its_requests_and_the_next_is_answered(
    own: Engine,
) -> None:
    expected = own.generate([Request(PROMPT, sampling=Sampling(max_tokens=5))])
    steps = []

    def fail_at_the_fourth(inputs: Inputs) -> None:
        steps.append(inputs)
        if len(steps) == 4:
            raise RuntimeError("out of memory, say")

    with before_each_forward(own, fail_at_the_fourth):
        first, second = own.stream_all(
            [Request(PROMPT, sampling=LONG), Request([60, 61], sampling=LONG)]
        )
        for stream in (first, second):
            with pytest.raises(ModelError, match="out of memory, say"):
                stream.completion()
        assert own.generate([Request(PROMPT, sampling=Sampling(max_tokens=5))]) == expected


def test_an_error_outside_a_forward_ends_all_requests_with_its_cause(
    own: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise MemoryError("no room for the rows that stay")

    monkeypatch.setattr(own._batch, "drop", fail)
    short, long = own.stream_all(
        [Request(PROMPT, sampling=Sampling(max_tokens=2)), Request(PROMPT, sampling=LONG)]
    )
    assert len(short.completion().token_ids) == 2
    with pytest.raises(EngineClosed, match="stopped: MemoryError: no room"):
        long.completion()
    with pytest.raises(EngineClosed):
        own.stream(Request(PROMPT))


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_an_adapter_that_overflows_fails_alone_and_by_name(
    own: Engine, tiny: Tiny, adapter: Tiny, tmp_path: Path, alpha: float
) -> None:
    good, bad = adapter(tiny("llama"), seed=1), tmp_path / "bad"
    shutil.copytree(good, bad)
    weights = load_file(bad / "adapter_model.safetensors")
    save_file(
        {name: torch.full_like(each, 3e38) for name, each in weights.items()},
        bad / "adapter_model.safetensors",
    )
    sources = [
        AdapterSource("bob@1", lambda: good),
        AdapterSource("alice@1", lambda: bad, label="1 of user 'alice'"),
        None,
    ]

    def request(source: AdapterSource | None) -> Request:
        sampling = Sampling(max_tokens=12)
        return Request(PROMPT, source, contrast=Contrast(alpha=alpha), sampling=sampling)

    expected = [own.generate([request(source)])[0] for source in (sources[0], sources[2])]
    for _ in range(2):  # what was computed in vain is nowhere reused
        streams = own.stream_all([request(source) for source in sources])
        with pytest.raises(ModelError, match="the adapter 1 of user 'alice' gives NaN or infinite"):
            streams[1].completion()
        assert [streams[0].completion(), streams[2].completion()] == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("row", "named"), [(0, "the adapter given"), (1, "the base")])
def test_logits_that_are_none_end_their_request_in_the_middle(
    own: Engine, tiny: Tiny, adapter: Tiny, value: float, row: int, named: str
) -> None:
    loaded = own.load_adapter(adapter(tiny("llama"), seed=1))
    short = Sampling(max_tokens=40)
    request = Request(PROMPT, loaded, contrast=Contrast(alpha=0.5), sampling=short)
    other = Request([60, 61], sampling=short)
    expected = own.generate([request, other])
    forwards: list[Inputs] = []

    def poison(logits: torch.Tensor, inputs: Inputs) -> None:
        forwards.append(inputs)
        if len(forwards) == 5:
            logits[inputs.logit_rows.index(row), 100] = value

    with after_each_forward(own, poison):
        first, second = own.stream_all([request, other])
        with pytest.raises(ModelError, match=f"{named} gives NaN or infinite logits after"):
            first.completion()
        assert second.completion() == expected[1]
    assert own.generate([request, other]) == expected


async def test_the_async_stream_raises_the_same_error(own: Engine) -> None:
    with (
        before_each_forward(own, fail_on_marker),
        pytest.raises(ModelError, match="the marker was seen"),
    ):
        [event async for event in own.astream(Request([MARKER]))]


def test_a_failing_score_raises_and_leaves_the_engine_working(own: Engine) -> None:
    expected = own.score([(PROMPT, [60, 61])])
    with (
        before_each_forward(own, fail_on_marker),
        pytest.raises(ModelError, match="failed while scoring: RuntimeError"),
    ):
        own.score([([MARKER], [60])])
    assert torch.equal(own.score([(PROMPT, [60, 61])])[0], expected[0])


def test_close_ends_running_and_waiting_requests(own: Engine) -> None:
    with before_each_forward(own, slowly):
        running = own.stream(Request(PROMPT, sampling=LONG))
        next(running)
        waiting = own.stream_all([Request(PROMPT, sampling=LONG)] * 70)
        own.close()
    for stream in (running, waiting[0], waiting[-1]):
        with pytest.raises(EngineClosed, match="was closed"):
            list(stream)
    for call in (lambda: own.stream(Request(PROMPT)), lambda: own.score([(PROMPT, [60])])):
        with pytest.raises(EngineClosed, match=r"the engine of '.*' is closed"):
            call()
    own.close()  # twice is harmless


def test_close_stops_the_thread_and_frees_the_cache(own: Engine) -> None:
    stream = own.stream(Request(PROMPT, sampling=LONG))
    next(stream)
    thread = own._thread
    assert thread is not None
    assert thread.is_alive()
    own.close()
    assert not thread.is_alive()
    assert own._batch.num_rows == 0
    assert own._batch._decode_rows.kv.num_rows == 0


def test_after_close_the_base_gets_a_new_engine(tiny: Tiny) -> None:
    base = load_base(tiny("qwen2"), device="cpu", dtype="float32")
    first = Engine.of(base)
    assert Engine.of(base) is first
    expected = first.generate([Request(PROMPT, sampling=Sampling(max_tokens=4))])
    first.close()
    second = Engine.of(base)
    assert second is not first
    assert second.generate([Request(PROMPT, sampling=Sampling(max_tokens=4))]) == expected
    second.close()


def test_closing_a_stream_frees_its_rows_by_the_next_step(own: Engine) -> None:
    forwards: list[object] = []
    with before_each_forward(own, slowly), before_each_forward(own, forwards.append):
        stream, other = own.stream_all(
            [Request(PROMPT, sampling=LONG), Request([60, 61], sampling=LONG)]
        )
        for _ in range(3):
            next(stream)
        assert own._batch.num_rows == 2
        stream.close()
        seen = len(forwards)
        wait_until(lambda: own._batch.num_rows == 1)
        assert len(forwards) - seen <= 2
        assert list(stream) == []
        other.close()
        wait_until(lambda: own._batch.num_rows == 0)
        seen = len(forwards)
        time.sleep(0.1)
        assert len(forwards) == seen, "without requests the engine rests"


def test_a_stream_that_is_forgotten_is_cancelled(own: Engine) -> None:
    with before_each_forward(own, slowly):
        stream = own.stream(Request(PROMPT, sampling=LONG))
        next(stream)
        del stream
        gc.collect()
        wait_until(lambda: own._batch.num_rows == 0)


def test_a_request_cancelled_while_it_waits_never_runs(own: Engine) -> None:
    seen: list[Inputs] = []
    with before_each_forward(own, slowly), before_each_forward(own, seen.append):
        running = own.stream_all([Request(PROMPT, sampling=LONG)] * 64)
        next(running[0])
        waiting = own.stream(Request([60, 61, 62, 63, 64, 65], sampling=LONG))
        waiting.close()
        for stream in running:
            stream.close()
        wait_until(lambda: own._batch.num_rows == own.statistics().waiting == 0)
    assert not any(inputs.ids.shape[1] == 6 for inputs in seen)


async def test_a_cancelled_task_frees_its_rows_by_the_next_step(own: Engine) -> None:
    arrived = asyncio.Event()

    async def read() -> None:
        async for event in own.astream(Request(PROMPT, sampling=LONG)):
            assert isinstance(event, (Piece, Completion))
            arrived.set()

    forwards: list[object] = []
    with before_each_forward(own, slowly), before_each_forward(own, forwards.append):
        task = asyncio.create_task(read())
        await arrived.wait()
        seen = len(forwards)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(wait_until, lambda: own._batch.num_rows == 0)
        assert len(forwards) - seen <= 3


def test_an_event_loop_that_is_gone_does_not_stop_the_engine(own: Engine) -> None:
    expected = own.generate([Request(PROMPT, sampling=Sampling(max_tokens=5))])

    async def read_one() -> None:
        events = own.astream(Request(PROMPT, sampling=LONG))
        await anext(events)
        # Neither closed nor collected while the loop goes.
        own.leaked = events  # type: ignore[attr-defined]

    with before_each_forward(own, slowly):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(read_one())
        loop.close()
        assert own.generate([Request(PROMPT, sampling=Sampling(max_tokens=5))]) == expected
    own.leaked.aclose().close()  # type: ignore[attr-defined]


def test_no_threads_are_left_behind(tiny: Tiny) -> None:
    before = threading.active_count()
    for _ in range(3):
        engine = Engine(load_base(tiny("llama"), device="cpu", dtype="float32"))
        engine.stream(Request(PROMPT, sampling=LONG)).close()
        engine.close()
    assert threading.active_count() == before


def test_an_engine_without_requests_has_no_thread(tiny: Tiny) -> None:
    before = threading.active_count()
    engine = Engine(load_base(tiny("llama"), device="cpu", dtype="float32"))
    assert threading.active_count() == before
    engine.close()
