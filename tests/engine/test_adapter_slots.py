"""Adapters in a few slots: for any number of users, loaded off the hot path, kept while in use."""

import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from langchain_cope.engine import (
    AdapterSource,
    Contrast,
    Engine,
    EngineOptions,
    Request,
    Sampling,
    load_base,
)
from langchain_cope.engine.answer import ActiveRequest
from langchain_cope.errors import EngineClosed, ModelError

Tiny = Callable[..., Path]
PROMPT = [20, 30, 40, 50]
SHORT, LONG = Sampling(max_tokens=8), Sampling(max_tokens=150)


@pytest.fixture
def few_slots(tiny: Tiny) -> Iterator[Engine]:
    """An engine with two slots."""
    engine = Engine(
        load_base(tiny("llama"), device="cpu", dtype="float32"), EngineOptions(adapter_slots=2)
    )
    yield engine
    engine.close()


def source(folder: Path, name: str) -> AdapterSource:
    return AdapterSource(name, lambda: folder)


def wait_until_idle(engine: Engine) -> None:
    """An answer is delivered a moment before its rows and its slot are free."""
    deadline = time.monotonic() + 10
    while True:
        now = engine.statistics()
        if now.adapters_in_use == now.rows == now.waiting == 0:
            return
        assert time.monotonic() < deadline, f"not idle within 10 s: {now}"
        time.sleep(0.002)


def test_more_users_than_slots_get_the_answers_of_their_own_adapters(
    few_slots: Engine, tiny: Tiny, adapter: Tiny
) -> None:
    folders = [adapter(tiny("llama"), seed=seed) for seed in range(1, 8)]
    direct = [
        Request(PROMPT, few_slots.load_adapter(folder), Contrast(0.3), sampling=SHORT)
        for folder in folders
    ]
    expected = [few_slots.generate([request])[0].token_ids for request in direct]
    assert len(set(expected)) > 4
    by_name = [
        Request(PROMPT, source(folder, f"user{n}@1"), Contrast(0.3), sampling=SHORT)
        for n, folder in enumerate(folders)
    ]
    for _ in range(2):
        answers = few_slots.generate(by_name + by_name)
        assert [answer.token_ids for answer in answers] == expected + expected
    assert few_slots.statistics().adapters_evicted >= 5
    wait_until_idle(few_slots)


def test_an_adapter_in_its_slot_is_not_loaded_again(
    few_slots: Engine, tiny: Tiny, adapter: Tiny
) -> None:
    request = Request(PROMPT, source(adapter(tiny("llama"), seed=1), "ann@1"), sampling=SHORT)
    for _ in range(3):
        few_slots.generate([request, request])
    assert few_slots.statistics().adapters_loaded == 1


def test_loading_an_adapter_again_and_again_leaves_no_object(
    few_slots: Engine, tiny: Tiny, adapter: Tiny
) -> None:
    folder = adapter(tiny("llama"))
    few_slots.load_adapter(folder)
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(50):
        few_slots.load_adapter(folder)
    gc.collect()
    assert sys.getallocatedblocks() - before < 50 * 10


def test_an_adapter_in_use_is_never_evicted_and_the_next_waits(
    few_slots: Engine, tiny: Tiny, adapter: Tiny
) -> None:
    folders = [adapter(tiny("llama"), seed=seed) for seed in (1, 2, 3)]
    running = [
        few_slots.stream(Request(PROMPT, source(folders[n], f"user{n}@1"), sampling=LONG))
        for n in range(2)
    ]
    for stream in running:
        next(stream)
    third = few_slots.stream(Request(PROMPT, source(folders[2], "user2@1"), sampling=SHORT))
    assert few_slots.statistics().adapters_loaded == 2
    for stream in running:
        stream.completion()
    third.completion()
    assert few_slots.statistics().adapters_evicted == 1


def test_another_version_leaves_the_running_request_as_it_is(
    few_slots: Engine, tiny: Tiny, adapter: Tiny
) -> None:
    old, new = (adapter(tiny("llama"), seed=seed) for seed in (1, 2))
    expected = few_slots.generate(
        [Request(PROMPT, few_slots.load_adapter(old), Contrast(0.3), sampling=LONG)]
    )[0]
    stream = few_slots.stream(Request(PROMPT, source(old, "ann@1"), Contrast(0.3), sampling=LONG))
    next(stream)
    other = few_slots.generate(
        [Request(PROMPT, source(new, "ann@2"), Contrast(0.3), sampling=LONG)]
    )[0]
    assert stream.completion().token_ids == expected.token_ids != other.token_ids


def test_a_slow_load_holds_up_nobody_else(few_slots: Engine, tiny: Tiny, adapter: Tiny) -> None:
    folder, may_go = adapter(tiny("llama"), seed=1), threading.Event()

    def slow() -> Path:
        assert may_go.wait(10)
        return folder

    late = few_slots.stream(Request(PROMPT, AdapterSource("slow@1", slow), sampling=SHORT))
    assert len(few_slots.generate([Request(PROMPT, sampling=SHORT)])[0].token_ids) > 0
    assert few_slots.statistics().waiting == 1
    may_go.set()
    late.completion()


def test_an_adapter_that_fails_to_load_fails_alone_and_is_tried_again(
    few_slots: Engine, tiny: Tiny, adapter: Tiny, tmp_path: Path
) -> None:
    folder, calls = adapter(tiny("llama"), seed=1), []

    def flaky() -> Path:
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError("the store is away")
        return folder

    good = few_slots.stream(Request(PROMPT, source(folder, "bob@1"), sampling=LONG))
    with pytest.raises(ConnectionError, match="the store is away"):
        few_slots.generate([Request(PROMPT, AdapterSource("ann@1", flaky), sampling=SHORT)])
    with pytest.raises(ModelError, match="no adapter in"):
        few_slots.generate([Request(PROMPT, source(tmp_path, "eve@1"), sampling=SHORT)])
    few_slots.generate([Request(PROMPT, AdapterSource("ann@1", flaky), sampling=SHORT)])
    good.completion()
    wait_until_idle(few_slots)


def test_an_adapter_that_fails_during_admission_never_answers_as_the_base(
    few_slots: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_fail = threading.Event()

    def away() -> Path:
        assert may_fail.wait(10)
        raise ConnectionError("the store is away")

    def look_at_deadline(active: ActiveRequest) -> bool:
        if active.request.deadline is not None:  # the other request: the first was looked at
            may_fail.set()
            until = time.monotonic() + 10
            while not failing._active.ready and time.monotonic() < until:
                time.sleep(0.001)
        return fail_if_overdue(active)

    fail_if_overdue = ActiveRequest.fail_if_overdue
    failing = few_slots.stream(Request(PROMPT, AdapterSource("ann@1", away), sampling=SHORT))
    monkeypatch.setattr(ActiveRequest, "fail_if_overdue", look_at_deadline)
    other = few_slots.stream(Request(PROMPT, sampling=SHORT, deadline=time.monotonic() + 60))
    with pytest.raises(ConnectionError, match="the store is away"):
        failing.completion()
    other.completion()


def test_deadlines_and_cancelling_hold_while_an_adapter_is_loaded(few_slots: Engine) -> None:
    may_go = threading.Event()

    def stuck() -> Path:
        may_go.wait(10)
        raise FileNotFoundError("nothing there")

    started = time.monotonic()
    request = Request(PROMPT, AdapterSource("ann@1", stuck), sampling=SHORT, deadline=started + 0.1)
    with pytest.raises(TimeoutError):
        few_slots.generate([request])
    assert time.monotonic() - started < 5
    given_up = few_slots.stream(Request(PROMPT, AdapterSource("ann@1", stuck), sampling=SHORT))
    given_up.close()
    may_go.set()
    wait_until_idle(few_slots)


def test_closing_ends_requests_that_wait_for_an_adapter_and_its_thread(few_slots: Engine) -> None:
    def late() -> Path:
        time.sleep(0.2)
        raise FileNotFoundError("nothing there")

    before = threading.active_count()
    stream = few_slots.stream(Request(PROMPT, AdapterSource("ann@1", late), sampling=SHORT))
    few_slots.close()
    with pytest.raises(EngineClosed):
        stream.completion()
    assert threading.active_count() <= before
