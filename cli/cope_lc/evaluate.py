"""`cope-lc evaluate`: the ways of answering side by side, user by user. Nothing is published."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cope_lc.metrics_table import mean_metrics, metrics_table, relative_change
from cope_lc.options import Device, Dtype, Json, Model, Target
from cope_lc.progress import DisplayMonitor, display, duration
from cope_lc.quiet_libraries import prints_to_stderr
from cope_lc.recipe_choice import Paper, TrainingSeed, recipe_choice
from cope_lc.screen import cell, console, number, say, table
from cope_lc.text import print_json, shorten
from langchain_cope.evaluation.ways import BASE, WAYS

if TYPE_CHECKING:
    from langchain_cope.evaluation.comparison import UserEvaluation
    from langchain_cope.history import UserHistory
    from langchain_cope.training.recipe import RecipeChoice

EXAMPLE = "Example: cope-lc evaluate users.jsonl --limit 6"
_WITH_NLL = [way for way in WAYS if way.has_nll]
_LEARNT = [way for way in _WITH_NLL if way.adapter is not None]
_CONTRASTIVE = [way for way in WAYS if way.contrastive]


def evaluate(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="One user a line: user_id, history and queries.")
    ],
    model: Model = "starter",
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", min=1, help="Only the first N users. Default: all."),
    ] = None,
    target: Target = None,
    paper: Paper = False,
    seed: TrainingSeed = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Compare base, SFT, DPO and CoPe: train on each user's history, judge on the queries.

    Nothing is published.
    """
    from langchain_cope.history import read_users

    with prints_to_stderr():
        users = read_users(file, target=target.value if target else None)[:limit]
        _check(users, file)
        settings = {"model": model, "device": device, "dtype": dtype}
        recipe = recipe_choice(paper=paper, seed=seed)
        evaluations = _evaluate_all(users, settings, recipe)
    if as_json:
        print_json(_facts(evaluations, model))
    else:
        _show(evaluations)


def _check(users: "list[UserHistory]", file: Path) -> None:
    """Refuse a file with a user that cannot be evaluated before the first one is trained."""
    from langchain_cope.errors import HistoryError

    for index, user in enumerate(users, 1):
        if not user.items or not user.queries:
            raise HistoryError(
                f"{file}: user {index} ({user.user_id!r:.80}) has {len(user.items)} items to train "
                f"on and {len(user.queries)} queries to judge by, and both are needed: "
                "user_id, history and queries on one line"
            )


def _evaluate_all(
    users: "list[UserHistory]", settings: dict[str, Any], recipe: "RecipeChoice"
) -> "list[UserEvaluation]":
    from langchain_cope.engine import Engine, load_base
    from langchain_cope.evaluation.comparison import evaluate_user

    engine = Engine.of(load_base(**settings))
    evaluations = []
    for index, user in enumerate(users, 1):
        prefix = f"[{index}/{len(users)}] {_name_of(user, 24)}: "
        with display(prefix, transient=True) as shown:
            evaluation = evaluate_user(engine, user, recipe, monitor=DisplayMonitor(shown))
        print(f"{prefix}{_summary(evaluation)}", file=sys.stderr, flush=True)
        evaluations.append(evaluation)
    return evaluations


def _name_of(user: "UserHistory | UserEvaluation", limit: int) -> str:
    return shorten(user.user_id or "the user", limit)


def _summary(user: "UserEvaluation") -> str:
    names = " → ".join(way.name for way in _WITH_NLL)
    figures = " → ".join(f"{user.metrics[way.name]['nll']:.3f}" for way in _WITH_NLL)
    return f"NLL {figures} ({names}) in {duration(sum(user.timings.values()))}"


def _facts(evaluations: "list[UserEvaluation]", model: str) -> dict[str, Any]:
    from dataclasses import asdict

    mean = mean_metrics([user.metrics for user in evaluations])
    users_better = {}
    for way in _LEARNT:
        better = [user for user in evaluations if relative_change(user.metrics, way) < 0]
        users_better[way.name] = len(better)
    return {
        "model": model,
        "users": [{**asdict(user), "nll_change": _changes(user.metrics)} for user in evaluations],
        "mean": mean,
        "nll_change": _changes(mean),
        "users_better": users_better,
    }


def _changes(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
    return {way.name: relative_change(metrics, way) for way in _LEARNT}


def _show(evaluations: "list[UserEvaluation]") -> None:
    out = console()
    facts = _facts(evaluations, "")
    num_users = len(evaluations)
    seconds = sum(sum(user.timings.values()) for user in evaluations)
    out.print()
    out.print(_user_table(evaluations))
    out.print()
    noun = "users" if num_users > 1 else "user"
    out.print(metrics_table(facts["mean"], f"mean of {num_users} {noun}"))
    out.print()
    for name, change in facts["nll_change"].items():
        better = f"lower for {facts['users_better'][name]} of {num_users}"
        say(out, f"{name}: NLL {change:+.2%} against the base; {better}")
    for line in _notes(evaluations):
        say(out, f"note: {line}", "dim")
    say(out, f"time: {duration(seconds)}; nothing was published", "dim")


def _notes(evaluations: "list[UserEvaluation]") -> list[str]:
    """Return the notes of all users, once where a note is the same for several."""
    users_of: dict[str, list[str]] = {}
    for user in evaluations:
        for note in user.notes:
            users_of.setdefault(note, []).append(_name_of(user, 30))
    lines = []
    for note, names in users_of.items():
        about = names[0] if len(names) == 1 else f"{len(names)} users"
        lines.append(f"{about}: {shorten(note, 300)}")
    return lines


def _user_table(evaluations: "list[UserEvaluation]") -> Any:
    """Return a row for each user: NLL, its change against the base, and ROUGE-L."""
    by_rouge = [BASE, *_CONTRASTIVE]
    nll_columns = [way.name for way in _WITH_NLL]
    change_columns = [f"{way.name} %" for way in _LEARNT]
    rouge_columns = [way.name for way in by_rouge]
    nll_columns[0] = f"NLL {nll_columns[0]}"
    rouge_columns[0] = f"ROUGE-L {rouge_columns[0]}"
    columns = (*nll_columns, *change_columns, *rouge_columns)
    rows = table("user", *columns, right=columns)
    for user in evaluations:
        nll = [number(user.metrics[way.name]["nll"]) for way in _WITH_NLL]
        changes = [f"{change:+.2%}" for change in _changes(user.metrics).values()]
        rouge = [number(user.metrics[way.name]["rougeL"]) for way in by_rouge]
        rows.add_row(cell(_name_of(user, 30)), *nll, *changes, *rouge)
    return rows
