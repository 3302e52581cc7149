"""`timeout` ends a call even where the engine's own thread is stuck."""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from langchain_core.exceptions import ModelTimeoutError
from langchain_core.messages import HumanMessage

from langchain_cope import ChatCoPe
from langchain_cope.errors import InputError

QUESTION = "What is rain?"


@pytest.fixture
def stuck(
    tiny: Callable[..., Path],
    before_forwards: Callable[..., AbstractContextManager[None]],
) -> Iterator[ChatCoPe]:
    """A chat whose model does not come back from its forward until the test is over."""
    over = threading.Event()
    with (
        ChatCoPe(model=str(tiny("llama", seed=132)), max_tokens=4) as chat,
        before_forwards(chat, lambda: over.wait(30)),
    ):
        yield chat
        over.set()


async def collect(stream: Any) -> list[Any]:
    return [each async for each in stream]


CALLS: dict[str, Callable[[ChatCoPe], Any]] = {
    "invoke": lambda chat: chat.invoke(QUESTION, timeout=0.2),
    "stream": lambda chat: list(chat.stream(QUESTION, timeout=0.2)),
    "batch": lambda chat: chat.batch([QUESTION] * 2, timeout=0.2),
    "generate": lambda chat: chat.generate([[HumanMessage(QUESTION)]], timeout=0.2),
    "bound": lambda chat: chat.bind(timeout=0.2).invoke(QUESTION),
    "own": lambda chat: chat.model_copy(update={"timeout": 0.2}).invoke(QUESTION),
    "ainvoke": lambda chat: asyncio.run(chat.ainvoke(QUESTION, timeout=0.2)),
    "astream": lambda chat: asyncio.run(collect(chat.astream(QUESTION, timeout=0.2))),
    "abatch": lambda chat: asyncio.run(chat.abatch([QUESTION] * 2, timeout=0.2)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_timeout_ends_a_call_although_the_model_is_stuck(
    call: Callable[[ChatCoPe], Any], stuck: ChatCoPe
) -> None:
    started = time.monotonic()
    with pytest.raises(ModelTimeoutError, match="not done in time"):
        call(stuck)
    assert time.monotonic() - started < 8


@pytest.mark.parametrize("timeout", ["5", (3, 5), True])
def test_a_timeout_that_is_no_number_is_refused(timeout: Any, tiny: Callable[..., Path]) -> None:
    chat = ChatCoPe(model=str(tiny("llama")))
    with pytest.raises(InputError, match="timeout must be a number of seconds or None, not"):
        chat.invoke(QUESTION, timeout=timeout)


@pytest.mark.parametrize("timeout", [math.inf, 1e300, None])
def test_a_timeout_without_end_is_none(timeout: float | None, tiny: Callable[..., Path]) -> None:
    chat = ChatCoPe(model=str(tiny("llama")), max_tokens=3)
    expected = chat.invoke(QUESTION).content
    assert chat.invoke(QUESTION, timeout=timeout).content == expected
    assert asyncio.run(chat.ainvoke(QUESTION, timeout=timeout)).content == expected
