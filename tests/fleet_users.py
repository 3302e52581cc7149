"""Histories of tiny users, for fleets."""

import json
from pathlib import Path


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
