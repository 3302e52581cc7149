"""Answers given up at random moments: the engine is idle within a step, and nothing is left."""

import asyncio
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adapter_store import AdapterStore
from langchain_cope import ChatCoPe
from langchain_cope.engine import Engine, load_base

ROUNDS = 100


@pytest.fixture(scope="module")
def chat(
    tiny: Callable[..., Path],
    adapter: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> ChatCoPe:
    base = tiny("llama", context=2048)
    store = AdapterStore(tmp_path_factory.mktemp("cancel"))
    for seed, user in enumerate(("alice", "bob"), 1):
        store.publish(user, adapter(base, seed=seed), base=load_base(base).fingerprint())
    return ChatCoPe(model=str(base), store=store, max_tokens=1500, contrast="fixed")


@pytest.mark.parametrize("how", ["ainvoke", "astream", "with tools"])
async def test_a_hundred_cancelled_calls_leave_nothing(how: str, chat: ChatCoPe) -> None:
    engine = Engine.of(load_base(chat.model))
    random_moments = random.Random(0)
    text = {"a": {"type": "string"}}
    bound = chat.bind_tools(
        [{"title": "f", "description": "", "type": "object", "properties": text}]
    )

    async def ask(user: str) -> None:
        config = {"configurable": {"user_id": user}}
        if how == "astream":
            async for _ in chat.astream("Hello", config):
                pass
        else:
            await (bound if how == "with tools" else chat).ainvoke("Hello", config)

    threads: set[str] = set()
    for round_number in range(ROUNDS):
        task = asyncio.ensure_future(ask("alice" if round_number % 2 else "bob"))
        await asyncio.sleep(random_moments.uniform(0, 0.03))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        if round_number == 10:  # by then every pool has its threads
            threads = {thread.name for thread in threading.enumerate()}
    steps = engine.statistics().steps
    deadline = time.monotonic() + 5
    while (engine.statistics().rows or engine.statistics().waiting) and time.monotonic() < deadline:
        await asyncio.sleep(0.005)
    held = engine.statistics()
    assert (held.rows, held.waiting, held.adapters_in_use) == (0, 0, 0)
    assert held.steps - steps <= 2
    extra = {thread.name for thread in threading.enumerate()} - threads
    assert not {name for name in extra if not name.startswith("asyncio_")}
    answer = await chat.ainvoke("Hello", max_tokens=3)
    assert answer.usage_metadata["output_tokens"] == 3  # type: ignore[index]
