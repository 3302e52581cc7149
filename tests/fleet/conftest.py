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


@pytest.fixture
def plan(base: Path, tmp_path: Path) -> Plan:
    """Trains on the tiny base, into an empty store."""
    return Plan(
        model=str(base),
        store=str(tmp_path / "adapters"),
        job_dir=str(tmp_path / "jobs"),
        recipe=FAST,
        device="cpu",
        threads=1,
    )


@pytest.fixture
def histories(tmp_path: Path) -> Path:
    """A folder with three users in two files."""
    folder = tmp_path / "histories"
    folder.mkdir()
    write_users(folder / "several.jsonl", ["alice", "bob"])
    rows = rows_of("carol")
    (folder / "carol.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
