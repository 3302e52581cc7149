"""A tiny base, tiny users, and plans that train them within seconds."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fleet_users import histories_in, plan_in, write_users

from langchain_cope.fleet.tasks import Plan


@pytest.fixture(scope="session")
def base(tiny: Callable[..., Path]) -> Path:
    """The folder of a base with random weights that are small enough to learn quickly."""
    return tiny("llama", initializer_range=0.05)


@pytest.fixture
def plan(base: Path, tmp_path: Path) -> Plan:
    """Trains on the tiny base, into an empty store."""
    return plan_in(tmp_path, base)


@pytest.fixture
def histories(tmp_path: Path) -> Path:
    """A folder with three users in two files."""
    return histories_in(tmp_path)


@pytest.fixture
def one_history(tmp_path: Path) -> Path:
    """A file of one user."""
    file = tmp_path / "alice.jsonl"
    write_users(file, ["alice"])
    return file
