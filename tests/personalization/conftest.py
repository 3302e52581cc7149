"""A tiny base, and a `PersonalizeUser` that trains it within seconds."""

from collections.abc import Callable
from pathlib import Path

import pytest
from personal import QUICK
from topics import make_trained_base

from langchain_cope import PersonalizeUser


@pytest.fixture(scope="session")
def base(tiny: Callable[..., Path]) -> Path:
    """The folder of a base with random weights that are small enough to learn quickly."""
    return tiny("llama", initializer_range=0.05)


@pytest.fixture(scope="session")
def trained_base(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny base that has learnt which words belong to which topic."""
    return make_trained_base(tiny, tmp_path_factory.mktemp("trained"))


@pytest.fixture
def personalize(base: Path, store_folder: Path) -> PersonalizeUser:
    """Personalizes on the tiny base, into an empty store."""
    return PersonalizeUser(model=str(base), store=store_folder, recipe=QUICK)
