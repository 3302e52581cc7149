"""Tables of what `sweep.py` found, and the figures that are kept of it.

    python benchmarks/recipes/report.py runs.jsonl … [--users NAME=USERS.jsonl …] [--out FILE.json]
    python benchmarks/recipes/report.py benchmarks/recipes/smollm2.json

`--out` writes every run's figures without a text; such a file is read as well. With `--users` the
style voice is added, which needs the users' texts. A table compares arms over the users that all of
them have: the NLL against the base's, then ROUGE-L (and style) for every α:τ.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from langchain_cope.evaluation.over_users import difference
from langchain_cope.evaluation.voice import Silent, View, voice_scale
from langchain_cope.history import read_users

Kept = dict[str, dict[str, dict[str, Any]]]
"""By the setting (model, task, with or without a task adapter, items), then the arm, the figures.

`nll` and each `α:τ` have a figure a user, by the user's number in the file.
"""


def kept_of(files: Sequence[Path], users: dict[str, str]) -> Kept:
    """Return the figures of all runs in `files`."""
    kept: Kept = {}
    texts: dict[tuple[str, str, str, str], dict[int, list[str]]] = {}
    for file in files:
        if file.suffix == ".json":
            kept |= json.loads(file.read_text(encoding="utf-8"))
            continue
        for line in file.read_text(encoding="utf-8").splitlines():
            run = json.loads(line)
            model, task, on_task, number, _, arm, *rest = run["key"]
            setting = f"{model}, {task}{', on a task adapter' if on_task else ''}"
            figures = kept.setdefault(setting, {}).setdefault(arm, {})
            if "nll" in run:
                figures.setdefault("nll", {})[str(number)] = round(fmean(run["nll"]), 4)
            elif "rougeL" in run:
                contrast = f"{rest[0]:g}:{rest[1]:g}"
                figures.setdefault(contrast, {})[str(number)] = round(fmean(run["rougeL"]), 4)
                texts.setdefault((setting, task, arm, contrast), {})[number] = run["texts"]
    for (setting, task, arm, contrast), answers in texts.items():
        if task in users:
            kept[setting][arm][f"style {contrast}"] = styles(users[task], answers)
    return kept


def styles(file: str, answers: dict[int, list[str]]) -> dict[str, float]:
    """Return each user's place between strangers' words (0) and the own ones (1), by style."""
    users = {str(number): user for number, user in enumerate(read_users(file))}
    histories = {name: [item.completion for item in user.items] for name, user in users.items()}
    own = {name: [item.completion for item in user.queries] for name, user in users.items()}
    scale = voice_scale(histories, own, View.STYLE)
    if isinstance(scale, Silent):
        return {}
    score = scale.score({str(number): texts for number, texts in answers.items()})
    return {} if isinstance(score, Silent) else score.of_user


def table(arms: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of one setting's table."""
    columns = [name for figures in arms.values() for name in figures]
    lines = []
    for column in dict.fromkeys(sorted(columns, key=lambda name: name != "nll")):
        having = {arm: figures[column] for arm, figures in arms.items() if column in figures}
        reference = having.get("plain") or next(iter(having.values()))
        for arm, of_users in having.items():
            shared = [user for user in of_users if user in reference]
            gap = difference([of_users], [{user: reference[user] for user in shared}])
            mean = fmean(of_users[user] for user in shared)
            lines.append(
                f"{column:16s} {arm:18s} {mean:8.4f} {gap.value:+8.4f} "
                f"{gap.num_above}/{gap.num_users} above, p {gap.p:.2f}"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--users", action="append", default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    kept = kept_of(options.files, dict(text.split("=", 1) for text in options.users))
    for setting, arms in kept.items():
        print(f"\n{setting}")
        print("\n".join(table(arms)))
    if options.out:
        options.out.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
