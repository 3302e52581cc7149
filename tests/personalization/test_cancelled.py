"""A training cancelled at any moment stops within a step and leaves nothing behind.

No thread, no file, no version, and an idle engine.
"""

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig, RunnablePassthrough
from langgraph.graph import START, StateGraph
from personal import ROWS, Recorder

from adapter_store import AdapterStore
from langchain_cope import PersonalizeUser
from langchain_cope.engine import Engine, load_base

REQUEST = {"user_id": "alice", "history": ROWS}
NUM_CANCELS = 20


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder for temporary files, for this test alone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def left_behind(
    personalize: PersonalizeUser, temporary: Path, threads: set[threading.Thread]
) -> list[str]:
    """Return whatever a cancelled training should not have left."""
    left = [f"version {one.version}" for one in AdapterStore(personalize.store).versions("alice")]
    folder = Path(personalize.store)
    files = [*folder.rglob("versions/*"), *folder.glob("staging/*"), *temporary.iterdir()]
    left += [f"file {path.name}" for path in files]
    for name in {thread.name for thread in set(threading.enumerate()) - threads}:
        if not name.startswith("asyncio_"):  # the event loop's own pool
            left.append(f"thread {name}")
    statistics = Engine.of(load_base(personalize.model)).statistics()
    if statistics.rows:
        left.append(f"{statistics.rows} rows")
    if statistics.waiting:
        left.append(f"{statistics.waiting} waiting")
    return left


async def test_cancelled_at_random_moments_it_stops_soon_and_leaves_nothing(
    personalize: PersonalizeUser, temporary: Path, tmp_path: Path
) -> None:
    whole = personalize.model_copy(update={"store": tmp_path / "other"})
    await whole.ainvoke(REQUEST)  # whatever is loaded once
    started = time.monotonic()
    await whole.ainvoke({"user_id": "bob", "history": ROWS})
    seconds = time.monotonic() - started
    threads = set(threading.enumerate())
    draw = random.Random(7)
    num_cancelled = 0
    while num_cancelled < NUM_CANCELS:
        task = asyncio.create_task(personalize.ainvoke(REQUEST))
        await asyncio.sleep(draw.uniform(0, 0.9 * seconds))
        if task.done():  # this machine is faster now than it was
            seconds *= 0.8
            AdapterStore(personalize.store).delete_version("alice", (await task).version or "")
            continue
        cancelled = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - cancelled < 3
        num_cancelled += 1
        deadline = time.monotonic() + 1  # one step of the engine, on a busy machine
        while left_behind(personalize, temporary, threads) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert left_behind(personalize, temporary, threads) == []
    assert (await personalize.ainvoke(REQUEST)).published


class AtEndOf(Recorder):
    """Does something as a stage ends, on the training's thread."""

    def __init__(self, stage: str, act: Callable[[], object]) -> None:
        super().__init__()
        self.stage = stage
        self.act = act

    def on_chain_end(self, outputs: Any, **kwargs: Any) -> None:
        super().on_chain_end(outputs, **kwargs)
        if self.started[-1][0] == self.stage and len(self.outputs) == len(self.started) - 1:
            self.act()


@pytest.mark.parametrize("had_one", [False, True])
async def test_a_cancel_just_after_the_publish_takes_it_back(
    personalize: PersonalizeUser, temporary: Path, had_one: bool
) -> None:
    store = AdapterStore(personalize.store)
    personalize = personalize.model_copy(update={"gate": "always"})
    before = (await personalize.ainvoke(REQUEST)).version if had_one else None
    loop = asyncio.get_running_loop()
    published: list[str | None] = []

    def cancel() -> None:
        published.append(store.active("alice"))
        loop.call_soon_threadsafe(task.cancel)
        time.sleep(0.2)

    task = asyncio.create_task(
        personalize.ainvoke(REQUEST, {"callbacks": [AtEndOf("publish", cancel)]})
    )
    with pytest.raises(asyncio.CancelledError):
        await task
    assert published not in ([None], [before])
    assert store.active("alice") == before
    kept = [version.version for version in store.versions("alice")]
    assert kept == ([before] if had_one else [])


async def test_a_second_cancel_does_not_leave_the_training_at_work(
    personalize: PersonalizeUser, temporary: Path, tmp_path: Path
) -> None:
    loop = asyncio.get_running_loop()

    def cancel_twice() -> None:
        loop.call_soon_threadsafe(task.cancel)
        time.sleep(0.2)
        loop.call_soon_threadsafe(task.cancel)
        time.sleep(0.2)

    await personalize.model_copy(update={"store": tmp_path / "warm"}).ainvoke(REQUEST)
    threads = set(threading.enumerate())
    task = asyncio.create_task(
        personalize.ainvoke(REQUEST, {"callbacks": [AtEndOf("sft", cancel_twice)]})
    )
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left_behind(personalize, temporary, threads) == []


async def consume(chunks: AsyncIterator[Any]) -> None:
    async for _ in chunks:
        pass


def in_a_graph(personalize: PersonalizeUser, config: RunnableConfig) -> Coroutine[Any, Any, Any]:
    builder = StateGraph(dict)
    builder.add_node("learn", personalize)
    builder.add_edge(START, "learn")
    return consume(builder.compile().astream(REQUEST, config, stream_mode="custom"))


def in_a_chain(personalize: PersonalizeUser, config: RunnableConfig) -> Coroutine[Any, Any, Any]:
    return (RunnablePassthrough() | personalize.map()).ainvoke(
        [REQUEST, {**REQUEST, "user_id": "bob"}], config
    )


def streamed(personalize: PersonalizeUser, config: RunnableConfig) -> Coroutine[Any, Any, Any]:
    return consume(personalize.astream(REQUEST, config))


@pytest.mark.parametrize("used", [in_a_graph, in_a_chain, streamed])
async def test_wherever_it_is_used_a_cancel_reaches_it(
    personalize: PersonalizeUser,
    temporary: Path,
    tmp_path: Path,
    used: Callable[..., Coroutine[Any, Any, Any]],
) -> None:
    await personalize.model_copy(update={"store": tmp_path / "warm"}).ainvoke(REQUEST)
    threads = set(threading.enumerate())
    loop, training = asyncio.get_running_loop(), asyncio.Event()

    class Listener(Recorder):
        def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
            loop.call_soon_threadsafe(training.set)

    task = asyncio.create_task(used(personalize, {"callbacks": [Listener()]}))
    await asyncio.wait_for(training.wait(), 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left_behind(personalize, temporary, threads) == []


async def test_a_timeout_stops_it(
    personalize: PersonalizeUser, temporary: Path, tmp_path: Path
) -> None:
    await personalize.model_copy(update={"store": tmp_path / "warm"}).ainvoke(REQUEST)
    threads = set(threading.enumerate())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(personalize.ainvoke(REQUEST), 0.2)
    assert left_behind(personalize, temporary, threads) == []
