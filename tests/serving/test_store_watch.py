"""A store that is away for a moment ends no server; one that stays away does."""

import asyncio
import threading
from typing import Any

from adapter_store.errors import BackendError
from langchain_cope.serving.store_watch import StoreWatch


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Store:
    """Counts what it is asked; `away` makes it fail, `hang` makes it wait."""

    away, asked = False, 0

    def __init__(self) -> None:
        self.hang = threading.Event()
        self.hang.set()

    def exists(self) -> bool:
        self.asked += 1
        self.hang.wait(5)
        if self.away:
            raise BackendError("out of reach")
        return True


async def ask(watch: StoreWatch) -> bool:
    well = watch.is_well()
    await asyncio.sleep(0.05)
    return well


async def test_a_store_is_asked_seldom_and_given_half_a_minute() -> None:
    clock, store = Clock(), Store()
    watch = StoreWatch(store, clock)  # type: ignore[arg-type]
    seen: list[Any] = []
    for seconds in (0, 1, 10, 10, 10, 10):
        clock.now += seconds
        seen.append(await ask(watch))
        store.away = True
    assert seen == [True, True, True, True, False, False]
    assert store.asked == 5
    store.away = False
    clock.now += 10
    await ask(watch)
    assert await ask(watch)


async def test_a_store_that_hangs_holds_one_thread_at_most() -> None:
    clock, store = Clock(), Store()
    watch = StoreWatch(store, clock)  # type: ignore[arg-type]
    store.hang.clear()
    for _ in range(6):
        clock.now += 11
        well = await ask(watch)
    assert (well, store.asked) == (False, 1)
    store.hang.set()
    await asyncio.sleep(0.1)
    assert watch.is_well()
