"""What personalization gains over several tasks, from what `cope-lc evaluate --json` wrote.

    cope-lc evaluate headlines.jsonl --task-adapter task --ways all --json > headlines.json
    python benchmarks/evidence.py headlines.json subjects.json bodies.json
        [--group authors=headlines,subjects,bodies]

Each file is one task, named after the file. Printed are Markdown tables: each way's figures with
their intervals, and the ratios of the macro-means of ROUGE-L that the paper reports (CoPe over the
task adapter, over SFT, and over retrieval), for each task and jointly for each group of tasks, with
95 % intervals by bootstrap over users: whoever is in several files is drawn in all of them at once.
Also of how many users an adapter is nearer to its own user than another's is. The last line is one
JSON object.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from langchain_cope.evaluation.over_users import (
    Estimate,
    PerUser,
    difference,
    mean_over_users,
    ratio,
)

RATIOS = (
    ("cope", "task"),
    ("cope", "sft"),
    ("cope", "base"),
    ("sft", "task"),
    ("cope+retrieved", "cope"),
    ("cope+retrieved", "base+retrieved"),
    ("cope+retrieved", "task+retrieved"),
    ("another-cope", "cope"),
)
MEASURES = ("nll", "rouge1", "rougeL", "meteor", "voice", "style", "copied", "distinct2", "words")
Users = Sequence[Mapping[str, Any]]


def per_user(users: Users, way: str, measure: str) -> PerUser:
    """Return the figure of each user who has it."""
    return {
        user["user_id"]: user["metrics"][way][measure]
        for user in users
        if measure in user["metrics"].get(way, {})
    }


def written(estimate: Estimate | None, digits: int = 3) -> str:
    """Return the value with its interval, for people."""
    if estimate is None:
        return "–"
    value = f"{estimate.value:.{digits}f}"
    if estimate.interval is None:
        return value
    return f"{value} ({estimate.interval[0]:.{digits}f}–{estimate.interval[1]:.{digits}f})"


def way_table(users: Users, ways: Sequence[str]) -> str:
    """Return the figures of all ways of one task, as Markdown."""
    lines = ["| way | " + " | ".join(MEASURES) + " |", "|---" * (1 + len(MEASURES)) + "|"]
    for way in ways:
        cells = []
        for measure in MEASURES:
            values = per_user(users, way, measure)
            cells.append(written(mean_over_users([values])) if values else "–")
        lines.append(f"| `{way}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gains(tasks: Mapping[str, Users]) -> dict[str, Estimate]:
    """Return the ratio of macro-means of ROUGE-L of each pair of ways that all `tasks` have."""
    found = {}
    for above, below in RATIOS:
        pairs = [
            (per_user(users, above, "rougeL"), per_user(users, below, "rougeL"))
            for users in tasks.values()
        ]
        if all(first and second for first, second in pairs):
            estimate = ratio([first for first, _ in pairs], [second for _, second in pairs])
            if estimate is not None:
                found[f"{above} / {below}"] = estimate
    return found


def own_above_anothers(tasks: Mapping[str, Users], measure: str) -> dict[str, tuple[int, int]]:
    """Return of how many users the own adapter scores above another's, and of how many it can."""
    counts = {}
    for name, users in tasks.items():
        own, other = (per_user(users, way, measure) for way in ("cope", "another-cope"))
        if own and other:
            found = difference([own], [other])
            counts[name] = (found.num_above, found.num_users)
    return counts


def above_the_floor(tasks: Mapping[str, Users], way: str) -> dict[str, tuple[int, int]]:
    """Return of how many users the style lies above strangers, and how many have a style."""
    values = {name: per_user(users, way, "style") for name, users in tasks.items()}
    return {
        name: (sum(value > 0 for value in of.values()), len(of))
        for name, of in values.items()
        if of
    }


def main() -> None:
    """Print the tables, then the figures as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="what evaluate --json wrote")
    parser.add_argument("--group", action="append", default=[], help="NAME=TASK,TASK: told jointly")
    options = parser.parse_args()
    tasks: dict[str, Users] = {}
    for file in options.files:
        facts = json.loads(file.read_text(encoding="utf-8"))
        tasks[file.stem] = facts["users"]
        print(f"### {file.stem}: {len(facts['users'])} users\n")
        print(way_table(facts["users"], facts["ways"]), end="\n\n")
    groups = {name: {name: users} for name, users in tasks.items()}
    for group in options.group:
        name, _, members = group.partition("=")
        groups[name] = {member: tasks[member] for member in members.split(",")}
    groups["all"] = tasks
    ratios = {name: gains(members) for name, members in groups.items()}
    columns = [name for name in (f"{a} / {b}" for a, b in RATIOS) if name in ratios["all"]]
    print("| ROUGE-L | " + " | ".join(columns) + " |\n" + "|---" * (1 + len(columns)) + "|")
    for name, found in ratios.items():
        print(f"| {name} | " + " | ".join(written(found.get(column)) for column in columns) + " |")
    counts = {
        "style, own above another's": own_above_anothers(tasks, "style"),
        "voice, own above another's": own_above_anothers(tasks, "voice"),
        "style of cope above strangers": above_the_floor(tasks, "cope"),
    }
    for name, by_task in counts.items():
        shown = ", ".join(f"{task} {num} of {total}" for task, (num, total) in by_task.items())
        print(f"\n{name}: {shown}")
    plain = {
        name: {pair: [e.value, e.interval] for pair, e in found.items()}
        for name, found in ratios.items()
    }
    print(json.dumps({"benchmark": "evidence", "rougeL": plain, "counts": counts}))


if __name__ == "__main__":
    main()
