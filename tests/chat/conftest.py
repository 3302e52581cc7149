"""What the tests of the chat model share."""

from collections.abc import Iterator

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache


@pytest.fixture
def llm_cache() -> Iterator[InMemoryCache]:
    """Core's cache of answers, in use during the test."""
    cache = InMemoryCache()
    set_llm_cache(cache)
    yield cache
    set_llm_cache(None)
