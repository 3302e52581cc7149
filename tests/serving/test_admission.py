"""The line before the engine: fair between keys, bounded, and honest about how long it takes."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from langchain_cope.serving.admission import Admission
from langchain_cope.serving.errors import ApiError
from langchain_cope.serving.limits import KeyLimits
from langchain_cope.serving.principals import Limits, Principal


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_polite_key_passes_a_greedy_ones_line() -> None:
    admission, order = Admission(rows=4, max_waiting=100), []
    end = asyncio.Event()

    async def ask(key: str, number: int) -> None:
        async with admission.place(key, 2):
            order.append((key, number))
            await end.wait()

    greedy = [asyncio.create_task(ask("greedy", number)) for number in range(20)]
    await settle()
    polite = [asyncio.create_task(ask(f"polite {number}", 0)) for number in range(2)]
    await settle()
    assert order == [("greedy", 0), ("greedy", 1)]
    greedy[0].cancel()
    greedy[1].cancel()
    await settle()
    assert order[2:] == [("polite 0", 0), ("polite 1", 0)]
    end.set()
    await asyncio.gather(*greedy[2:], *polite)
    assert [number for key, number in order if key == "greedy"] == list(range(20))
    assert admission.num_waiting == 0


async def test_a_full_line_refuses_but_keeps_each_keys_share() -> None:
    clock = Clock()
    admission = Admission(rows=2, max_waiting=4, clock=clock)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(admission.place("greedy", 2))
        waiting = [asyncio.create_task(admission.place("greedy", 2).__aenter__()) for _ in range(4)]
        await settle()
        with pytest.raises(ApiError) as refused:
            admission.check("greedy")
        assert refused.value.status == 429
        assert refused.value.headers["Retry-After"] == "5"  # nothing was measured yet
        admission.check("polite")
        for task in waiting:
            task.cancel()
        await settle()
    assert admission.num_waiting == 0


async def test_who_leaves_the_end_of_the_line_makes_room_in_it() -> None:
    admission = Admission(rows=2, max_waiting=2)
    async with admission.place("one", 2):
        waiting = [asyncio.create_task(admission.place("one", 2).__aenter__()) for _ in range(2)]
        await settle()
        waiting[1].cancel()
        await settle()
        assert admission.num_waiting == 1
        admission.check("one")
        waiting[0].cancel()
        await settle()


async def test_retry_after_follows_the_measured_rate() -> None:
    clock = Clock()
    admission = Admission(rows=2, max_waiting=1, clock=clock)
    for second in range(10):  # one answer in two seconds
        clock.now = 2.0 * second
        async with admission.place("key", 2):
            pass
    clock.now = 20.0
    assert admission.seconds_to_serve(8) == pytest.approx(16)
    assert admission.seconds_to_serve(10_000) == 120


async def test_room_comes_back_from_those_who_leave_in_any_way() -> None:
    admission = Admission(rows=2, max_waiting=10)
    holding = admission.place("a", 2)
    await holding.__aenter__()
    called = asyncio.create_task(admission.place("b", 2).__aenter__())
    await settle()
    await holding.__aexit__(None, None, None)  # calls b,
    called.cancel()  # which goes in the same moment
    await settle()
    async with asyncio.timeout(1), admission.place("c", 2):
        pass


def test_a_key_is_held_to_its_requests_and_tokens_a_minute() -> None:
    clock = Clock()
    limits = KeyLimits(None, clock)
    key = Principal("k", frozenset(), limits=Limits(requests_per_minute=2, tokens_per_minute=60))
    limits.take_request(key)
    limits.take_request(key)
    with pytest.raises(ApiError) as refused:
        limits.take_request(key)
    assert refused.value.headers["Retry-After"] == "30"
    clock.now += 30
    limits.take_request(key)
    limits.take_tokens(key, 90)
    clock.now += 30  # 60 - 90 + 30 tokens: none are left
    with pytest.raises(ApiError, match="tokens a minute"):
        limits.take_request(key)
    clock.now += 31
    limits.take_request(key)


def test_a_key_may_have_so_many_answers_at_a_time() -> None:
    limits = KeyLimits(max_concurrent=3)
    key = Principal("k", frozenset())
    with limits.running(key, 2), pytest.raises(ApiError), limits.running(key, 2):
        pass
    with limits.running(key, 3):
        pass
