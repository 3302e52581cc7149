"""Fixtures that several tests share. Nothing here, and nothing in the tests, may reach a model hub."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", ANONYMIZED_TELEMETRY="False")
os.environ.setdefault(
    "GOMP_SPINCOUNT", "10000"
)  # on a busy machine torch's waiting threads would eat the cores

import pytest
from tiny import make_adapter, make_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny("llama")`` is the folder of a tiny base, made once a session per family and settings."""
    made: dict[str, Path] = {}

    def get(family: str = "llama", **changes: object) -> Path:
        key = f"{family} {sorted(changes.items())}"
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp(family), family, **changes)  # type: ignore[arg-type]
        return made[key]

    return get


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``adapter(base, seed=1)`` is a peft folder with random matrices for the base, made once a session."""
    made: dict[str, Path] = {}

    def get(base: Path, seed: int = 1, **changes: object) -> Path:
        key = f"{base} {seed} {sorted(changes.items(), key=str)}"
        if key not in made:
            made[key] = make_adapter(tmp_path_factory.mktemp("adapter"), base, seed=seed, **changes)  # type: ignore[arg-type]
        return made[key]

    return get


@pytest.fixture
def store_folder(tmp_path: Path) -> Path:
    """An empty folder for a local adapter store."""
    return tmp_path / "adapters"
