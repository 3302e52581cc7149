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
| `style` | the voice of `evaluation/voice.py`, style view: 0 strangers' words, 1 the user's own |
| `loss` | nats a token by which the user's words get less likely than with the adapter alone |
| `gain` | of `evaluation/own_voice.py` over the paper's strength, with its error: what chooses |

The report: each setting's means over users; the best common one, which is the weakest whose mean
lies within one standard error (over users, paired) of the best mean; and the strength chosen by
`personalization/choose_strength.py` from every other query of a user, measured on the other half,
both ways round, against the best common one. That, and all that is believed beforehand, is then of
the *other* users alone. The last line is one JSON object; its `prior` is what
`langchain_cope/strengths.json` may hold for the base.
"""

import argparse
import json
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
from langchain_cope.evaluation.over_users import difference, mean_over_users
from langchain_cope.evaluation.own_voice import OwnVoice, gain, own_voice
from langchain_cope.evaluation.rouge import mean_rouge
from langchain_cope.evaluation.user_job import UserJob
from langchain_cope.evaluation.users import Comparison
from langchain_cope.evaluation.voice import View, VoiceScale, voice_scale
from langchain_cope.evaluation.ways import ways_named
from langchain_cope.history import read_users
from langchain_cope.personalization.choose_strength import TOLERANCE, Trial, pick
from langchain_cope.strength import PAPER, Candidate, Strength, StrengthPrior
from langchain_cope.training.progress import Monitor, Stage

BASE = Strength(0.0, adapter_scale=0.0)  # the base alone
GRID = [
    BASE,
    *(Strength(alpha) for alpha in (0.0, 0.1, 0.3, 0.5, 0.8)),
    Strength(0.0, adapter_scale=0.7),
    Strength(0.3, adapter_scale=1.5),
]
LEAST_HALF = 5  # queries in half a user's
LEAST_USERS = 5  # in a report: what is believed of one comes of the others

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
    history = [item.completion for item in job.history.items]
    halves = [range(len(own))[start::2] for start in (0, 1)]
    user = job.history.user_id or ""

    def style(texts: Sequence[str]) -> float | None:
        found = scale.score({user: texts}) if scale else None
        return found.of_user.get(user) if hasattr(found, "of_user") else None

    def of_rows(rows: Sequence[int]) -> dict[str, Any]:
        chosen = {key: [texts[row] for row in rows] for key, texts in answers.items()}
        voice = own_voice(history, [own[row] for row in rows], chosen[key_of(BASE)])
        gains = None
        if isinstance(voice, OwnVoice):
            usual = chosen[key_of(PAPER)]
            gains = {key: gain(voice, chosen[key], usual) for key in PERSONAL}
        return {"style": {key: style(chosen[key]) for key in KEYS}, "gain": gains}

    return {
        "items": len(history),
        "rougeL": {
            key: [
                round(mean_rouge([reference], [text])["rougeL"], 4)
                for reference, text in zip(own, answers[key], strict=True)
            ]
            for key in KEYS
        },
        "loss": losses,
        "all": of_rows(range(len(own))),
        "halves": [of_rows(half) for half in halves] if len(own) >= 2 * LEAST_HALF else None,
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


def rouge_l(record: Record, key: str, rows: slice = slice(None)) -> float:
    return statistics.fmean(record["rougeL"][key][rows])


def style_of(record: Record, key: str) -> float | None:
    value: float | None = record["all"]["style"][key]
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


def best_common(records: Sequence[Record], figure: Callable[[Record, str], float | None]) -> str:
    """Return the weakest setting whose mean is within one standard error of the best mean."""
    values = {
        key: [value for record in records if (value := figure(record, key)) is not None]
        for key in PERSONAL
    }
    best = max(PERSONAL, key=lambda key: statistics.fmean(values[key]))
    for key in sorted(PERSONAL, key=lambda key: (KEYS[key].adapter_scale, KEYS[key].alpha)):
        behind = [a - b for a, b in zip(values[best], values[key], strict=True)]
        error = statistics.stdev(behind) / len(behind) ** 0.5
        if KEYS[key].adapter_scale == 1 and statistics.fmean(behind) <= error:
            return key
    return best


def prior_of(records: Sequence[Record], usual: str) -> StrengthPrior:
    """Return what these users say of the gain of each strength over the usual one, by moments."""
    candidates = []
    for key in sorted(PERSONAL, key=lambda key: (KEYS[key].adapter_scale, KEYS[key].alpha)):
        pairs = [relative(record["all"]["gain"], key, usual) for record in records]
        known = [pair for pair in pairs if pair is not None]
        allowed = statistics.fmean(record["loss"][key] for record in records) <= TOLERANCE
        if key == usual or KEYS[key].tau != PAPER.tau or len(known) < 4 or not allowed:
            continue
        gains, errors = zip(*known, strict=True)
        spread = statistics.variance(gains) - statistics.fmean(error**2 for error in errors)
        sd = max(0.0, spread) ** 0.5
        candidates.append(Candidate(KEYS[key], statistics.fmean(gains), sd))
    return StrengthPrior(KEYS[usual], tuple(candidates), is_measured=True)


def relative(gains: dict[str, Any] | None, key: str, usual: str) -> tuple[float, float] | None:
    """Return the gain over the usual strength, and an error that is rather too large."""
    if gains is None:
        return None
    (gain_, error), (of_usual, error_of_usual) = gains[key], gains[usual]
    return gain_ - of_usual, (error**2 + error_of_usual**2) ** 0.5


def chosen(records: Sequence[Record]) -> dict[str, Any]:
    """Choose for each user by half of the queries; compare on the other half with the best common.

    What is usual, and what is believed of gains, is of the other users.
    """
    pairs: list[dict[str, Any]] = []
    for record in records:
        if record["halves"] is None:
            continue
        others = [other for other in records if other["user"] != record["user"]]
        usual = best_common(others, style_of)
        prior = prior_of(others, usual)
        for half, other in ((0, 1), (1, 0)):
            gains = record["halves"][half]["gain"]
            better = None
            if gains is not None:
                known = {KEYS[key]: relative(gains, key, usual) for key in PERSONAL}
                better = pick(prior, known)  # type: ignore[arg-type]
            key = usual if better is None else key_of(better.strength)
            style = record["halves"][other]["style"]
            rows = slice(other, None, 2)
            has_style = style[key] is not None
            pairs.append(
                {
                    "task": record["task"],
                    "user": record["user"],
                    "changed": key != usual,
                    "style": style[key] - style[usual] if has_style else None,
                    "rougeL": rouge_l(record, key, rows) - rouge_l(record, usual, rows),
                }
            )
    report: dict[str, Any] = {"changed": statistics.fmean(pair["changed"] for pair in pairs)}
    for name in ("style", "rougeL"):
        tables: dict[str, dict[str, list[float]]] = {}
        for pair in pairs:
            if pair[name] is not None:
                tables.setdefault(pair["task"], {}).setdefault(pair["user"], []).append(pair[name])
        means = [
            {user: statistics.fmean(values) for user, values in table.items()}
            for table in tables.values()
        ]
        nothing = [dict.fromkeys(table, 0.0) for table in means]
        found = difference(means, nothing)
        report[name] = {
            "mean": found.value,
            "interval": found.interval,
            "better": found.num_above,
            "worse": sum(value < 0 for table in means for value in table.values()),
            "users": found.num_users,
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
    by_style = best_common(records, style_of)
    by_rouge = best_common(records, rouge_l)
    prior = prior_of(records, by_style)
    return {
        "users": len({record["user"] for record in records}),
        "settings": settings,
        "best_common": {"style": by_style, "rougeL": by_rouge},
        "chosen_against_best_common": chosen(records),
        "prior": [
            {"setting": key_of(one.strength), "mean": round(one.mean, 3), "sd": round(one.sd, 3)}
            for one in prior.candidates
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
