"""A tiny base, tiny users, and plans that train them within seconds."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fleet_users import rows_of, write_users
from personal import QUICK

from langchain_cope.fleet.tasks import Plan

FAST = replace(QUICK, negatives=None)


@pytest.fixture(scope="session")
def base(tiny: Callable[..., Path]) -> Path:
    """The folder of a base with random weights that are small enough to learn quickly."""
    return tiny("llama", initializer_range=0.05)


def plan_in(folder: Path, base: Path) -> Plan:
    """Return a plan that trains on the tiny base, into an empty store."""
    return Plan(
        model=str(base),
        store=str(folder / "adapters"),
        job_dir=str(folder / "jobs"),
        recipe=FAST,
        device="cpu",
        threads=1,
    )


def histories_in(folder: Path) -> Path:
    """Make a folder with three users in two files."""
    made = folder / "histories"
    made.mkdir()
    write_users(made / "several.jsonl", ["alice", "bob"])
    rows = rows_of("carol")
    (made / "carol.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


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
