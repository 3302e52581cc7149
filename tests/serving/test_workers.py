"""Requests that are made ready: few at a time, fair between keys, and no more wait than may."""

import asyncio
import threading
from pathlib import Path

import pytest
from serving.conftest import Running, running, wait_until

from langchain_cope.serving.errors import ApiError
from langchain_cope.serving.routes import chat
from langchain_cope.serving.workers import Workers


async def test_work_beyond_the_line_is_refused_and_keys_take_turns() -> None:
    workers, order = Workers("test", threads=1, max_waiting=3), []
    go = threading.Event()

    async def ask(key: str) -> None:
        await workers.run(key, lambda: (go.wait(5), order.append(key)))

    asked = [asyncio.create_task(ask("greedy")) for _ in range(4)]  # one works, three wait
    await asyncio.sleep(0.01)
    with pytest.raises(ApiError) as refused:
        await ask("greedy")
    assert refused.value.status == 429
    asked.append(asyncio.create_task(ask("polite")))
    await asyncio.sleep(0.01)
    go.set()
    await asyncio.gather(*asked)
    assert order[:2] == ["greedy", "polite"]


async def test_work_that_nobody_waits_for_still_holds_its_thread() -> None:
    workers, begun = Workers("test", threads=1, max_waiting=9), []
    go = threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        go.wait(5)

    for number in range(4):  # each comes and goes
        task = asyncio.create_task(workers.run("key", lambda number=number: work(number)))  # type: ignore[misc]
        await asyncio.sleep(0.01)
        task.cancel()
    await asyncio.sleep(0.01)
    assert begun == [0]
    assert workers.num_waiting == 0
    go.set()
    assert await workers.run("key", lambda: 5) == 5
    assert begun == [0]


def test_a_flood_that_is_hard_to_prepare_gives_429(
    base: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, prepare = threading.Event(), chat._prepare
    monkeypatch.setattr(chat, "_prepare", lambda *rest: (go.wait(10), prepare(*rest))[1])
    with running(base, published, tmp_path, max_waiting=4) as server:
        statuses: list[int] = []

        def ask(server: Running = server) -> None:
            statuses.append(server.ask("alice", max_tokens=1).status_code)

        flood = [threading.Thread(target=ask) for _ in range(12)]
        for thread in flood:
            thread.start()
        wait_until(lambda: len(statuses) == 6)
        assert set(statuses) == {429}
        with server.client(None) as probe:
            assert probe.get("/readyz").status_code == 200
        go.set()
        for thread in flood:
            thread.join()
        assert sorted(statuses) == [200] * 6 + [429] * 6
