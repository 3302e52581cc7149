"""How long a base stays in memory: `load`, `close`, `with`, several chats on one base."""

import asyncio
import gc
import pickle
import random
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import HumanMessage
from personal import QUICK, ROWS

from langchain_cope import ChatCoPe, PersonalizeUser
from langchain_cope.engine import Engine
from langchain_cope.engine.base import loading
from langchain_cope.engine.engine import _engines
from langchain_cope.errors import EngineClosed

QUESTION = "What is rain?"
SCHEMA = {"title": "a", "type": "object", "properties": {}}
SlowSteps = Callable[[ChatCoPe], AbstractContextManager[None]]
CLOSED = r"this ChatCoPe is closed: `load\(\)` opens it again"


@pytest.fixture
def model(tiny: Callable[..., Path]) -> Iterator[str]:
    """A base that nothing but the test holds."""
    folder = str(tiny("llama", seed=131, context=2048))
    yield folder
    for engine in [engine for engine in _engines.values() if engine.base.source == folder]:
        engine.close()
        loading.unload_base(engine.base)


def is_loaded(model: str) -> bool:
    return any(base.source == model for base in loading._loaded.values())


@pytest.fixture
def slow_steps(
    before_forwards: Callable[..., AbstractContextManager[None]],
) -> SlowSteps:
    """Lets every forward of a chat's base take a little, so that a long answer takes seconds."""
    return lambda chat: before_forwards(chat, lambda: time.sleep(0.01))


def long_answer(model: str) -> ChatCoPe:
    """Return a chat whose answers use all their tokens: with other seeds they end sooner."""
    return ChatCoPe(model=model, max_tokens=1000, temperature=2.0, seed=1)


def opened_by(chat: ChatCoPe) -> dict[str, Callable[[], Any]]:
    return {
        "load": chat.load,
        "with": chat.__enter__,
        "invoke": partial(chat.invoke, QUESTION),
        "aload": chat.aload,
        "async with": chat.__aenter__,
        "ainvoke": partial(chat.ainvoke, QUESTION),
    }


def closed_by(chat: ChatCoPe, way: str) -> Any:
    if way == "with":
        return chat.__exit__(None, None, None)
    if way == "async with":
        return chat.__aexit__(None, None, None)
    return chat.aclose() if way.startswith("a") else chat.close()


async def finish(result: Any) -> Any:
    return await result if asyncio.iscoroutine(result) else result


@pytest.mark.parametrize("way", ["load", "with", "invoke", "aload", "async with", "ainvoke"])
async def test_a_base_leaves_memory_when_its_chat_closes(way: str, model: str) -> None:
    chat = ChatCoPe(model=model, max_tokens=4)
    assert not is_loaded(model), "nothing is loaded before it is asked for"
    await finish(opened_by(chat)[way]())
    assert is_loaded(model)
    weights = weakref.ref(chat._engine().base.model)
    await finish(closed_by(chat, way))
    assert not is_loaded(model)
    gc.collect()
    assert weights() is None, "something keeps the weights"
    chat.close()  # twice is harmless


def test_a_chat_that_was_never_used_closes_and_loads_nothing(model: str) -> None:
    chat = ChatCoPe(model=model)
    chat.close()
    assert not is_loaded(model)
    with pytest.raises(EngineClosed, match=CLOSED):
        chat.invoke(QUESTION)


async def collect(stream: Any) -> list[Any]:
    return [each async for each in stream]


CALLS: dict[str, Callable[[ChatCoPe], Any]] = {
    "invoke": lambda chat: chat.invoke(QUESTION),
    "ainvoke": lambda chat: chat.ainvoke(QUESTION),
    "stream": lambda chat: list(chat.stream(QUESTION)),
    "astream": lambda chat: collect(chat.astream(QUESTION)),
    "batch": lambda chat: chat.batch([QUESTION, QUESTION]),
    "abatch": lambda chat: chat.abatch([QUESTION]),
    "generate": lambda chat: chat.generate([[HumanMessage(QUESTION)]]),
    "agenerate": lambda chat: chat.agenerate([[HumanMessage(QUESTION)]]),
    "count tokens": lambda chat: chat.get_num_tokens(QUESTION),
    "bound": lambda chat: chat.bind(max_tokens=2).invoke(QUESTION),
    "retried": lambda chat: chat.with_retry(stop_after_attempt=1).invoke(QUESTION),
    "structured": lambda chat: chat.with_structured_output(SCHEMA).invoke(QUESTION),
    "pickled": lambda chat: pickle.loads(pickle.dumps(chat)).invoke(QUESTION),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_every_call_of_a_closed_chat_says_that_it_is_closed(
    call: Callable[[ChatCoPe], Any], model: str
) -> None:
    with ChatCoPe(model=model) as chat:
        pass
    with pytest.raises(EngineClosed, match=CLOSED):
        await finish(call(chat))
    assert not is_loaded(model)


def test_a_closed_chat_can_be_opened_again(model: str) -> None:
    chat = ChatCoPe(model=model, max_tokens=8)
    with chat:
        expected = chat.invoke(QUESTION).content
    with chat:
        assert chat.invoke(QUESTION).content == expected
    chat.load()
    assert chat.invoke(QUESTION).content == expected
    chat.close()


def invoked(chat: ChatCoPe) -> Any:
    return chat.invoke(QUESTION)


def streamed(chat: ChatCoPe) -> Any:
    return list(chat.stream(QUESTION))


def awaited(chat: ChatCoPe) -> Any:
    return asyncio.run(chat.ainvoke(QUESTION))


def astreamed(chat: ChatCoPe) -> Any:
    return asyncio.run(collect(chat.astream(QUESTION)))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("call", [invoked, streamed, awaited, astreamed])
def test_a_call_under_way_ends_soon_when_its_chat_closes(
    call: Callable[[ChatCoPe], Any], shared: bool, model: str, slow_steps: SlowSteps
) -> None:
    chat, neighbour = long_answer(model), ChatCoPe(model=model, max_tokens=40)
    chat.load()
    if shared:
        neighbour.load()
        expected = neighbour.invoke(QUESTION).content
    engine = chat._engine()
    with slow_steps(chat), ThreadPoolExecutor(2) as threads:
        answer = threads.submit(call, chat)
        other = threads.submit(neighbour.invoke, QUESTION) if shared else None
        while engine.statistics().rows < 1 + shared:
            time.sleep(0.002)
        started = time.monotonic()
        chat.close()
        with pytest.raises(EngineClosed, match="closed"):
            answer.result(timeout=30)
        assert time.monotonic() - started < 8, "the whole answer takes more than ten"
        if other is not None:
            assert other.result(timeout=30).content == expected, "the neighbour was not disturbed"
    assert is_loaded(model) == shared
    neighbour.close()
    assert not is_loaded(model), "the last one takes it along"


def test_requests_in_the_waiting_line_end_too(model: str, slow_steps: SlowSteps) -> None:
    busy, chat = long_answer(model), long_answer(model)
    busy.load()
    engine = chat._engine()
    with slow_steps(busy), ThreadPoolExecutor(80) as threads:
        running = [threads.submit(busy.invoke, QUESTION) for _ in range(engine.options.max_rows)]
        while engine.statistics().rows < engine.options.max_rows:
            time.sleep(0.002)
        waiting = threads.submit(chat.invoke, QUESTION)
        while not engine.statistics().waiting:
            time.sleep(0.002)
        chat.close()
        with pytest.raises(EngineClosed):
            waiting.result(timeout=30)
        assert engine.statistics().rows == engine.options.max_rows
        busy.close()
        assert all(isinstance(call.exception(timeout=30), EngineClosed) for call in running)


def copied(chat: ChatCoPe) -> ChatCoPe:
    return chat.model_copy(update={"user_id": None})


def constructed(chat: ChatCoPe) -> ChatCoPe:
    return ChatCoPe(model=chat.model)


def unpickled(chat: ChatCoPe) -> ChatCoPe:
    copy: ChatCoPe = pickle.loads(pickle.dumps(chat))
    return copy


@pytest.mark.parametrize("make", [copied, constructed, unpickled])
def test_closing_a_chat_leaves_others_of_the_base_alone(
    make: Callable[[ChatCoPe], ChatCoPe], model: str
) -> None:
    chat = ChatCoPe(model=model, max_tokens=4)
    expected = chat.invoke(QUESTION).content
    other = make(chat)
    assert other.invoke(QUESTION, max_tokens=4).content == expected
    base = other._engine().base
    chat.close()
    assert other.invoke(QUESTION, max_tokens=4).content == expected
    assert other._engine().base is base, "it was not loaded anew"
    other.close()
    assert not is_loaded(model)


def test_chats_that_are_gone_do_not_keep_the_base(model: str) -> None:
    for _ in range(3):
        ChatCoPe(model=model, max_tokens=2).invoke(QUESTION)
    gc.collect()
    assert is_loaded(model), "one chat a request is a common way; each finds the base there"
    with ChatCoPe(model=model):
        pass
    assert not is_loaded(model)


def test_a_training_keeps_its_base_when_a_chat_closes(model: str, tmp_path: Path) -> None:
    chat = ChatCoPe(model=model, max_tokens=4)
    chat.load()

    class CloseAtFirstStep(BaseCallbackHandler):
        def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
            chat.close()

    personalize = PersonalizeUser(
        model=model, store=tmp_path / "store", recipe=QUICK, gate="always"
    )
    request = {"user_id": "alice", "history": ROWS}
    result = personalize.invoke(request, {"callbacks": [CloseAtFirstStep()]})
    assert chat._closed
    assert result.published
    gc.collect()
    with ChatCoPe(model=model):
        pass
    assert not is_loaded(model), "a training that is done holds nothing"


def test_chats_opened_and_closed_by_many_threads_stay_whole(model: str) -> None:
    expected = ChatCoPe(model=model, max_tokens=3).invoke(QUESTION).content
    chats = [ChatCoPe(model=model, max_tokens=3) for _ in range(3)]
    until = time.monotonic() + 1.5

    def use(seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < until:
            chat = draw.choice(chats)
            try:
                draw.choice([chat.load, chat.close, partial(check, chat)])()
            except EngineClosed:
                continue

    def check(chat: ChatCoPe) -> None:
        assert chat.invoke(QUESTION).content == expected

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(use, seed) for seed in range(4)]:
            done.result(timeout=30)
    for chat in chats:
        chat.close()
    assert not is_loaded(model)
    assert not [engine for engine in _engines.values() if engine.base.source == model]


def test_a_base_that_was_unloaded_is_refused_by_name(model: str) -> None:
    base = loading.load_base(model, device="cpu")
    with ChatCoPe(model=model, device="cpu"):
        pass
    with pytest.raises(EngineClosed, match="was unloaded: load it again"):
        Engine.of(base)
    assert loading.load_base(model, device="cpu") is not base
