"""Which strength users of a base need, and whether choosing one for each user pays.

    python benchmarks/strength.py runs.jsonl --users users.jsonl --jobs FOLDER
        [--task-adapter FOLDER] [--limit 6] [--items 80] [--seconds 3000]

The file of users has one a line (`{"user_id", "history": [{"prompt", "completion"}], "queries"}`).
Each user's adapter is trained by SFT on the newest items of the history, unless the job folder
holds it, as `cope-lc evaluate --job-dir` leaves it (give a copy: what is of other items is
removed). Then all queries are answered greedily at every setting of `GRID`. Texts lie in the job
folder; every finished user is a line of `runs.jsonl`, with figures and no text, and is not run
again. So it can be stopped and go on, by `--seconds` too, and several files of users can have one
`runs.jsonl`; without `--users` it reports alone.

| figure | |
|---|---|
| `rougeL` | with what the user wrote, a query each |
| `chrF` | likewise (`evaluation/likeness.py`): what chooses |
| `style` | the voice of `evaluation/voice.py`, style view: 0 strangers' words, 1 the user's own |
| `loss` | nats a token by which the user's words get less likely than with the adapter alone |

The report: each setting's means over users, and the best common one by ROUGE-L; and the strength
that `personalization/choose_strength.py` chooses from a random half of a user's queries, measured
on the other half against every common setting, the mean over `SPLITS` halvings. The best common one
is known only after all queries were seen, the choice only sees its half. The last line is one JSON
object; its `prior` is what `langchain_cope/strengths.json` may hold for the base.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets.utils import logging as datasets_logging
from transformers.utils import logging as transformers_logging

from langchain_cope.atomic_files import read_json, write_json
from langchain_cope.engine import Engine, load_base
from langchain_cope.evaluation.likeness import gain, likeness
from langchain_cope.evaluation.over_users import difference, mean_over_users
from langchain_cope.evaluation.rouge import mean_rouge
from langchain_cope.evaluation.user_job import UserJob
from langchain_cope.evaluation.users import Comparison
from langchain_cope.evaluation.voice import View, VoiceScale, voice_scale
from langchain_cope.evaluation.ways import ways_named
from langchain_cope.history import read_users
from langchain_cope.personalization.choose_strength import Trial, pick
from langchain_cope.strength import PAPER, Candidate, Strength, StrengthPrior, strength_prior
from langchain_cope.training.progress import Monitor, Stage

BASE = Strength(0.0, adapter_scale=0.0)  # the base alone
GRID = [
    BASE,
    *(Strength(alpha) for alpha in (0.0, 0.1, 0.3, 0.5, 0.8)),
    Strength(0.0, adapter_scale=0.7),
    Strength(0.3, adapter_scale=1.5),
]
LEAST_QUERIES = 8  # of a user whose choice is looked at
LEAST_USERS = 5  # in a report
SPLITS = 40  # random halvings of a user's queries

Record = dict[str, Any]


def key_of(strength: Strength) -> str:
    return json.dumps([strength.alpha, strength.tau, strength.adapter_scale])


KEYS = {key_of(strength): strength for strength in GRID}
PERSONAL = [key for key, strength in KEYS.items() if strength != BASE]


# ── one user ──


def answers_of(engine: Engine, job: UserJob) -> tuple[dict[str, list[str]], dict[str, float]]:
    """Return the answers to the job's queries at each setting, and the losses; what is new."""
    file = job.folder / f"strength-{job.asked[:16]}.json"
    known = read_json(file) if file.exists() else {}
    adapter = engine.load_adapter(job.folder / Stage.SFT.file)
    monitor = Monitor()
    trial = Trial(engine, adapter, job.examples, job.recipe, monitor)
    missing = [strength for key, strength in KEYS.items() if key not in known]
    if missing:
        with monitor.stage(Stage.STRENGTH):
            found = trial.answers(missing)
        known |= {key_of(strength): texts for strength, texts in found.items()}
        write_json(file, known)
    losses = trial.losses([KEYS[key] for key in PERSONAL])
    return known, {key_of(strength): loss for strength, loss in losses.items()}


def record_of(engine: Engine, job: UserJob, scale: VoiceScale | None) -> Record:
    """Return all figures of one user."""
    answers, losses = answers_of(engine, job)
    own = [example.item.completion for example in job.examples]
    user = job.history.user_id or ""

    def style(texts: Sequence[str]) -> float | None:
        found = scale.score({user: texts}) if scale else None
        return found.of_user.get(user) if hasattr(found, "of_user") else None

    return {
        "items": len(job.history.items),
        "rougeL": {
            key: [
                round(mean_rouge([reference], [text])["rougeL"], 4)
                for reference, text in zip(own, answers[key], strict=True)
            ]
            for key in KEYS
        },
        "chrF": {key: [round(one, 4) for one in likeness(own, answers[key])] for key in KEYS},
        "loss": losses,
        "style": {key: style(answers[key]) for key in KEYS},
    }


def make(options: Any, done: set[tuple[str, str]]) -> None:
    started = time.monotonic()
    everybody, newest = read_users(options.users), -options.items
    users = [user.model_copy(update={"items": user.items[newest:]}) for user in everybody]
    engine = task_engine = Engine.of(load_base(options.model))
    if options.task_adapter:
        task_engine = Engine.of(load_base(options.model, task_adapter=options.task_adapter))
    comparison = Comparison(
        engine,
        users,
        options.jobs,
        ways_named(["sft"]),
        task_engine=task_engine if options.task_adapter else None,
    )
    scale = voice_scale(
        {user.user_id or "": [item.completion for item in user.items] for user in everybody},
        {user.user_id or "": [item.completion for item in user.queries] for user in everybody},
        View.STYLE,
    )
    task = f"{options.users.stem}{' on its task adapter' if options.task_adapter else ''}"
    for number, job in enumerate(comparison.jobs[: options.limit]):
        user = f"{options.users.stem} {number}"
        if (task, user) in done:
            continue
        if options.seconds and time.monotonic() - started > options.seconds:
            break
        comparison.train(job, Monitor())
        record = record_of(task_engine, job, scale if isinstance(scale, VoiceScale) else None)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"task": task, "user": user, **record}) + "\n")
        print(f"{task}, {user}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


# ── over users ──


def rouge_l(record: Record, key: str) -> float:
    return statistics.fmean(record["rougeL"][key])


def style_of(record: Record, key: str) -> float | None:
    value: float | None = record["style"][key]
    return value


def per_user(
    records: Sequence[Record], figure: Callable[[Record], float | None]
) -> list[dict[str, float]]:
    """Return a figure of each user, a table a task."""
    tables: dict[str, dict[str, float]] = {}
    for record in records:
        value = figure(record)
        if value is not None:
            tables.setdefault(record["task"], {})[record["user"]] = value
    return list(tables.values())


def gain_of(record: Record, key: str, rows: Sequence[int]) -> tuple[float, float]:
    """Return the gain over the paper's strength on these queries, and its error."""
    usual = record["chrF"][key_of(PAPER)]
    return gain([record["chrF"][key][row] for row in rows], [usual[row] for row in rows])


def prior_of(records: Sequence[Record]) -> StrengthPrior:
    """Return what these users say of the gain of each strength over the paper's, by moments."""
    candidates = []
    for key in sorted(PERSONAL, key=lambda key: (KEYS[key].adapter_scale, KEYS[key].alpha)):
        if KEYS[key] != PAPER:
            found = [gain_of(record, key, range(len(record["chrF"][key]))) for record in records]
            gains, errors = zip(*found, strict=True)
            spread = statistics.variance(gains) - statistics.fmean(error**2 for error in errors)
            candidates.append(
                Candidate(KEYS[key], statistics.fmean(gains), max(0.0, spread) ** 0.5)
            )
    return StrengthPrior(PAPER, tuple(candidates), is_measured=True)


def after_choosing(record: Record, prior: StrengthPrior) -> tuple[dict[str, float], float]:
    """Return ROUGE-L above each common setting's, and how often the usual strength was left.

    Chosen is by half of the queries, measured on the other half.
    """
    rows, chance = list(range(len(record["chrF"][key_of(PAPER)]))), random.Random(record["user"])
    above: dict[str, list[float]] = {key: [] for key in PERSONAL}
    changed = 0
    for _ in range(SPLITS):
        chance.shuffle(rows)
        choosing, judging = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        gains = {
            one.strength: gain_of(record, key_of(one.strength), choosing)
            for one in prior.candidates
        }
        better = pick(prior, gains)
        changed += better is not None
        key = key_of(PAPER if better is None else better.strength)
        for common in PERSONAL:
            pairs = zip(record["rougeL"][key], record["rougeL"][common], strict=True)
            differences = [chosen - fixed for chosen, fixed in pairs]
            above[common].append(statistics.fmean(differences[row] for row in judging))
    return {key: statistics.fmean(values) for key, values in above.items()}, changed / SPLITS


def chosen(records: Sequence[Record]) -> dict[str, Any]:
    """Compare what is chosen for each user with every common setting, in ROUGE-L."""
    prior, found = strength_prior({}), []
    for record in records:
        if len(record["chrF"][key_of(PAPER)]) >= LEAST_QUERIES:
            found.append((record, *after_choosing(record, prior)))
    report: dict[str, Any] = {"changed": statistics.fmean(share for _, _, share in found)}
    for key in PERSONAL:
        tables: dict[str, dict[str, float]] = {}
        for record, above, _ in found:
            tables.setdefault(record["task"], {})[record["user"]] = above[key]
        nothing = [dict.fromkeys(table, 0.0) for table in tables.values()]
        against = difference(list(tables.values()), nothing)
        print(
            f"chosen above {KEYS[key]}: {against.value:+.4f} {against.interval}, "
            f"better for {against.num_above} of {against.num_users}"
        )
        report[key] = {
            "mean": against.value,
            "interval": against.interval,
            "better": against.num_above,
            "users": against.num_users,
        }
    return report


def report(records: Sequence[Record]) -> dict[str, Any]:
    """Print the table, and return the same as numbers."""
    print(f"{'α':>5}{'τ':>6}{'scale':>7}{'ROUGE-L':>28}{'style':>28}{'loss':>8}")
    settings = []
    for key, strength in KEYS.items():
        rouge_l_mean = mean_over_users(per_user(records, lambda r, k=key: rouge_l(r, k)))
        style = mean_over_users(per_user(records, lambda r, k=key: style_of(r, k)))
        losses = [record["loss"].get(key) for record in records]
        loss = statistics.fmean(losses) if key in PERSONAL else None
        figures = "".join(
            f"{one.value:>10.4f} [{one.interval[0]:.4f}, {one.interval[1]:.4f}]"
            for one in (rouge_l_mean, style)
            if one.interval
        )
        print(
            f"{strength.alpha:>5}{strength.tau:>6}{strength.adapter_scale:>7}{figures}"
            f"{'' if loss is None else f'{loss:>8.3f}'}"
        )
        settings.append({"setting": key, "rougeL": rouge_l_mean.value, "style": style.value})
    means = {key: statistics.fmean(rouge_l(record, key) for record in records) for key in PERSONAL}
    return {
        "users": len({record["user"] for record in records}),
        "settings": settings,
        "best_common": max(PERSONAL, key=lambda key: means[key]),
        "chosen_against_common": chosen(records),
        "prior": [
            {"setting": key_of(one.strength), "mean": round(one.mean, 3), "sd": round(one.sd, 3)}
            for one in prior_of(records).candidates
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--users", type=Path)
    parser.add_argument("--jobs", type=Path)
    parser.add_argument("--task-adapter", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--items", type=int, default=80)
    parser.add_argument("--seconds", type=float)
    options = parser.parse_args(arguments)
    if options.users and not options.jobs:
        parser.error("--users needs --jobs FOLDER: it holds what users wrote, keep it private")
    transformers_logging.disable_progress_bar()
    datasets_logging.disable_progress_bar()

    def read() -> list[Record]:
        if not options.out.exists():
            return []
        return [json.loads(line) for line in options.out.read_text(encoding="utf-8").splitlines()]

    if options.users:
        make(options, {(record["task"], record["user"]) for record in read()})
    records = read()
    if len(records) < LEAST_USERS:
        parser.exit(message=f"{len(records)} users are done; a report needs {LEAST_USERS}\n")
    print(json.dumps(report(records)))


if __name__ == "__main__":
    main()
