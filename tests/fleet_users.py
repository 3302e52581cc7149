"""Histories of tiny users, and plans that train them within seconds, for fleets."""

import json
from dataclasses import replace
from pathlib import Path

from personal import QUICK

from langchain_cope.fleet.tasks import Plan

FAST = replace(QUICK, negatives=None)


def rows_of(user: str, num_items: int = 12) -> list[dict[str, str]]:
    """Return items that are easily learnt: each user says the same of everything."""
    return [
        {"prompt": f"Headline for story {i}?", "completion": f"The fox says {user} {user}, dog {i}"}
        for i in range(num_items)
    ]


def write_users(file: Path, users: list[str], num_items: int = 12) -> None:
    """Write users to a JSONL, one a line."""
    lines = [json.dumps({"user_id": user, "history": rows_of(user, num_items)}) for user in users]
    file.write_text("\n".join(lines) + "\n")


def histories_in(folder: Path) -> Path:
    """Make a folder with three users in two files."""
    made = folder / "histories"
    made.mkdir()
    write_users(made / "several.jsonl", ["alice", "bob"])
    rows = rows_of("carol")
    (made / "carol.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


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
