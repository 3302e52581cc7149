"""`cope-lc evaluate`: the ways of answering side by side, user by user. Nothing is published."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cope_lc.options import DEFAULT_MODEL, Device, Dtype, Json, Model, Target
from cope_lc.output import Output
from cope_lc.quiet_libraries import prints_to_stderr
from cope_lc.recipe_choice import Paper, TrainingSeed, recipe_choice
from cope_lc.screen import console, say
from cope_lc.text import plural, shorten

if TYPE_CHECKING:
    from langchain_cope.evaluation.comparison import UserEvaluation
    from langchain_cope.history import UserHistory
    from langchain_cope.training.recipe import RecipeChoice


def evaluate(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="One user a line: user_id, history and queries.")
    ],
    model: Model = DEFAULT_MODEL,
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
    facts = _facts(evaluations, model)
    Output(as_json).show(facts, lambda: _show(evaluations, facts))


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
    from cope_lc.progress import DisplayMonitor, progress_display
    from langchain_cope.engine import Engine, load_base
    from langchain_cope.evaluation.comparison import evaluate_user

    engine = Engine.of(load_base(**settings))
    evaluations = []
    for index, user in enumerate(users, 1):
        prefix = f"[{index}/{len(users)}] {_name_of(user, 24)}: "
        with progress_display(prefix, transient=True) as display:
            evaluation = evaluate_user(engine, user, recipe, monitor=DisplayMonitor(display))
        print(f"{prefix}{_summary(evaluation)}", file=sys.stderr, flush=True)
        evaluations.append(evaluation)
    return evaluations


def _name_of(user: "UserHistory | UserEvaluation", limit: int) -> str:
    return shorten(user.user_id or "the user", limit)


def _summary(user: "UserEvaluation") -> str:
    from cope_lc.metrics_table import WITH_NLL
    from cope_lc.progress import duration

    names = " → ".join(way.name for way in WITH_NLL)
    figures = " → ".join(f"{user.metrics[way.name]['nll']:.3f}" for way in WITH_NLL)
    return f"NLL {figures} ({names}) in {duration(sum(user.timings.values()))}"


def _facts(evaluations: "list[UserEvaluation]", model: str) -> dict[str, Any]:
    """Return all figures, as `--json` prints them."""
    from dataclasses import asdict

    from cope_lc.metrics_table import mean_metrics, nll_changes

    mean = mean_metrics([user.metrics for user in evaluations])
    mean_changes = nll_changes(mean)
    users = []
    users_better = dict.fromkeys(mean_changes, 0)
    for user in evaluations:
        changes = nll_changes(user.metrics)
        users.append({**asdict(user), "nll_change": changes})
        for name, change in changes.items():
            if change < 0:
                users_better[name] += 1
    return {
        "model": model,
        "users": users,
        "mean": mean,
        "nll_change": mean_changes,
        "users_better": users_better,
    }


def _show(evaluations: "list[UserEvaluation]", facts: dict[str, Any]) -> None:
    from cope_lc.metrics_table import metrics_table, user_table
    from cope_lc.progress import duration

    out = console()
    num_users = len(evaluations)
    seconds = sum(sum(user.timings.values()) for user in evaluations)
    out.print()
    out.print(user_table([(_name_of(user, 30), user.metrics) for user in evaluations]))
    out.print()
    out.print(metrics_table(facts["mean"], f"mean of {plural(num_users, 'user')}"))
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
        about = names[0] if len(names) == 1 else plural(len(names), "user")
        lines.append(f"{about}: {shorten(note, 300)}")
    return lines
