"""``cope-lc evaluate``: base, SFT, DPO and CoPe side by side, user by user. Nothing is published."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cope_lc.options import Device, Dtype, Json, Model, Target

if TYPE_CHECKING:
    from langchain_cope.evaluation.comparison import UserEvaluation
    from langchain_cope.history import UserHistory

EXAMPLE = "Example: cope-lc evaluate users.jsonl --limit 6"
_LEARNT = ("sft", "dpo")  # the ways that are trained and have an NLL


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
    paper: Annotated[
        bool,
        typer.Option(
            "--paper", help="Use the paper's settings, chosen for 7B models, as they are."
        ),
    ] = False,
    seed: Annotated[
        int,
        typer.Option("--seed", metavar="N", min=0, max=2**32 - 1, help="Same seed, same result."),
    ] = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Compare base, SFT, DPO and CoPe: train on each user's history, judge on the queries, publish nothing."""
    from cope_lc.quiet_libraries import prints_to_stderr
    from cope_lc.text import print_json
    from langchain_cope.history import read_users

    with prints_to_stderr():
        users = read_users(file, target=target.value if target else None)[:limit]
        _check(users, file)
        found = _evaluate_all(
            users, {"model": model, "device": device, "dtype": dtype}, paper=paper, seed=seed
        )
    if as_json:
        print_json(_facts(found, model))
    else:
        _show(found)


def _check(users: "list[UserHistory]", file: Path) -> None:
    """Refuse a file with a user who cannot be evaluated before the first one is trained."""
    from langchain_cope.errors import HistoryError

    for index, user in enumerate(users, 1):
        if not user.items or not user.queries:
            raise HistoryError(
                f"{file}: user {index} ({user.user_id!r:.80}) has {len(user.items)} items to train on and "
                f"{len(user.queries)} queries to judge by, and both are needed: user_id, history and queries on one line"
            )


def _evaluate_all(
    users: "list[UserHistory]", settings: dict[str, Any], *, paper: bool, seed: int
) -> "list[UserEvaluation]":
    from dataclasses import replace

    from cope_lc.progress import display, follower
    from cope_lc.text import shorten
    from langchain_cope import Recipe
    from langchain_cope.engine import Engine, load_base
    from langchain_cope.evaluation.comparison import evaluate_user

    base = load_base(**settings)
    found = []
    for index, user in enumerate(users, 1):
        made = Recipe.paper() if paper else Recipe.for_model(base, user.items)
        prefix = f"[{index}/{len(users)}] {shorten(user.user_id or 'the user', 24)}: "
        with display(prefix, transient=True) as shown:
            recipe = replace(made, seed=seed)
            found.append(evaluate_user(Engine.of(base), user, recipe, on_progress=follower(shown)))
        print(f"{prefix}{_summary(found[-1])}", file=sys.stderr, flush=True)
    return found


def _summary(user: "UserEvaluation") -> str:
    from cope_lc.progress import duration

    nll = " → ".join(f"{user.metrics[way]['nll']:.3f}" for way in ("base", *_LEARNT))
    return f"NLL {nll} (base → sft → dpo) in {duration(sum(user.timings.values()))}"


def _facts(found: "list[UserEvaluation]", model: str) -> dict[str, Any]:
    from dataclasses import asdict

    from cope_lc.metrics_table import mean_metrics, relative_change

    mean = mean_metrics([user.metrics for user in found])
    return {
        "model": model,
        "users": [{**asdict(user), "nll_change": _changes(user.metrics)} for user in found],
        "mean": mean,
        "nll_change": {way: relative_change(mean, way) for way in _LEARNT},
        "users_better": {
            way: sum(relative_change(user.metrics, way) < 0 for user in found) for way in _LEARNT
        },
    }


def _changes(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
    from cope_lc.metrics_table import relative_change

    return {way: relative_change(metrics, way) for way in _LEARNT}


def _show(found: "list[UserEvaluation]") -> None:
    from cope_lc.metrics_table import metrics_table
    from cope_lc.progress import duration
    from cope_lc.screen import console, say

    out = console()
    facts = _facts(found, "")
    seconds = sum(sum(user.timings.values()) for user in found)
    out.print()
    out.print(_user_table(found))
    out.print()
    out.print(
        metrics_table(facts["mean"], f"mean of {len(found)} user{'s' if len(found) > 1 else ''}")
    )
    out.print()
    for way in _LEARNT:
        better = f"lower for {facts['users_better'][way]} of {len(found)}"
        say(out, f"{way}: NLL {facts['nll_change'][way]:+.2%} against the base; {better}")
    for line in _notes(found):
        say(out, f"note: {line}", "dim")
    say(out, f"time: {duration(seconds)}; nothing was published", "dim")


def _notes(found: "list[UserEvaluation]") -> list[str]:
    """What is to be said of the users, once where it is the same for several."""
    from cope_lc.text import shorten

    about: dict[str, list[str]] = {}
    for user in found:
        for note in user.notes:
            about.setdefault(note, []).append(shorten(user.user_id or "the user", 30))
    return [
        f"{names[0] if len(names) == 1 else f'{len(names)} users'}: {shorten(note, 300)}"
        for note, names in about.items()
    ]


def _user_table(found: "list[UserEvaluation]") -> Any:
    from cope_lc.screen import cell, number, table
    from cope_lc.text import shorten

    figures = ("NLL base", "sft", "dpo", "sft %", "dpo %", "ROUGE-L base", "cope")
    rows = table("user", *figures, right=figures)
    for user in found:
        nll = [number(user.metrics[way]["nll"]) for way in ("base", "sft", "dpo")]
        changes = [f"{change:+.2%}" for change in _changes(user.metrics).values()]
        rouge = [number(user.metrics[way]["rougeL"]) for way in ("base", "cope")]
        rows.add_row(cell(shorten(user.user_id or "the user", 30)), *nll, *changes, *rouge)
    return rows
