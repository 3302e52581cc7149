"""Tiny real bases, recipes and items for the training tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import DEVICE
from training.tiny import make_item, write_model

from langchain_cope.engine import Base, Engine, load_base
from langchain_cope.history.items import Item
from langchain_cope.training.progress import Monitor, Stage
from langchain_cope.training.recipe import DPO, SFT, Negatives, Recipe

MakeBase = Callable[..., Base]


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    """Build, or find again, a tiny base: `make_base("gpt2", "plain", context=256)`."""
    folders: dict[tuple[str, str, int], Path] = {}

    def make(architecture: str = "llama", template: str = "plain", context: int = 256) -> Base:
        key = (architecture, template, context)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(architecture)
            write_model(folders[key], *key)
        return load_base(folders[key], device=DEVICE)

    return make


@pytest.fixture(scope="session")
def base(make_base: MakeBase) -> Base:
    return make_base()


@pytest.fixture(scope="session")
def engine(base: Base) -> Iterator[Engine]:
    engine = Engine.of(base)
    yield engine
    engine.close()


@pytest.fixture
def items() -> list[Item]:
    return [make_item(number) for number in range(6)]


@pytest.fixture
def recipe() -> Recipe:
    """Steps large enough that a tiny random model moves, small enough to be quick."""
    return Recipe(
        sft=SFT(learning_rate=2e-2, epochs=3, batch_size=4, rank=2, lora_alpha=4),
        negatives=Negatives(candidates=3),
        dpo=DPO(learning_rate=1e-2, batch_size=8),
        max_new_tokens=8,
        seed=5,  # with which no candidate is empty
    )


@pytest.fixture
def monitor() -> Iterator[Monitor]:
    """Give a silent monitor in the middle of a stage."""
    monitor = Monitor()
    with monitor.stage(Stage.SFT):
        yield monitor
