"""Fixtures that several tests share. Nothing here or in the tests may reach a model hub."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("COPE_MODEL", "starter")  # the default is larger than most tests need
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", ANONYMIZED_TELEMETRY="False")
# On a busy machine torch's waiting threads would otherwise eat the cores.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import pytest
from tiny import make_adapter, make_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return `tiny(family, **changes)`: the folder of a tiny base, made once a session."""
    bases: dict[str, Path] = {}

    def get(family: str = "llama", **changes: Any) -> Path:
        key = f"{family} {sorted(changes.items())}"
        if key not in bases:
            bases[key] = make_model(tmp_path_factory.mktemp(family), family, **changes)
        return bases[key]

    return get


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return `adapter(base, seed, **changes)`: a random peft folder, made once a session."""
    adapters: dict[str, Path] = {}

    def get(base: Path, seed: int = 1, **changes: Any) -> Path:
        key = f"{base} {seed} {sorted(changes.items(), key=str)}"
        if key not in adapters:
            folder = tmp_path_factory.mktemp("adapter")
            adapters[key] = make_adapter(folder, base, seed=seed, **changes)
        return adapters[key]

    return get


@pytest.fixture
def store_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an empty folder for a local adapter store."""
    return tmp_path_factory.mktemp("s") / "adapters"  # short: tables show it
