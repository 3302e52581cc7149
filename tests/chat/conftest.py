"""What the tests of the chat model share."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache

from langchain_cope import ChatCoPe
from langchain_cope.engine.forward.inputs import Inputs

BeforeForwards = Callable[[ChatCoPe, Callable[[], object]], AbstractContextManager[None]]


@pytest.fixture
def llm_cache() -> Iterator[InMemoryCache]:
    """Core's cache of answers, in use during the test."""
    cache = InMemoryCache()
    set_llm_cache(cache)
    yield cache
    set_llm_cache(None)


@pytest.fixture(scope="session")
def before_forwards() -> BeforeForwards:
    """Lets something happen before every forward of a chat's base, in the block."""

    @contextmanager
    def happens(chat: ChatCoPe, wait: Callable[[], object]) -> Iterator[None]:
        batch = chat._engine()._batch
        forward = batch.forward

        class Waiting:
            sites = forward.sites

            def __call__(self, inputs: Inputs) -> torch.Tensor:
                wait()
                return forward(inputs)

        batch.forward = Waiting()
        try:
            yield
        finally:
            batch.forward = forward

    return happens
