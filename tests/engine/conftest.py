"""Engines over the tiny bases of `tests/tiny.py`, closed at the end of the session."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny import DEVICE

from langchain_cope.engine import Engine, load_base

EngineFor = Callable[..., Engine]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny matrices only lose by a second thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def engine_for() -> Iterator[EngineFor]:
    """`engine_for(folder)` is the engine of the base in that folder, in float32, on `DEVICE`."""
    engines = []

    def get(folder: Path, dtype: str = "float32") -> Engine:
        engines.append(Engine.of(load_base(folder, device=DEVICE, dtype=dtype)))
        return engines[-1]

    yield get
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(tiny: Callable[..., Path], engine_for: EngineFor) -> Engine:
    """The engine of the tiny Llama."""
    return engine_for(tiny("llama"))
