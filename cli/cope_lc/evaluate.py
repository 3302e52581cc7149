"""`cope-lc evaluate`: the ways of answering side by side, over users. Nothing is published."""

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cope_lc.options import DEFAULT_MODEL, Device, Dtype, Json, Model, Target, TaskAdapter
from cope_lc.output import Output
from cope_lc.page import check_page_file, write_page
from cope_lc.quiet_libraries import prints_to_stderr
from cope_lc.recipe_choice import Paper, TrainingSeed, recipe_choice
from cope_lc.screen import console, say
from cope_lc.text import plural, shorten

if TYPE_CHECKING:
    from langchain_cope.evaluation.measures import Report, UserFigures
    from langchain_cope.evaluation.user_job import UserJob
    from langchain_cope.evaluation.users import Comparison
    from langchain_cope.evaluation.ways import Way
    from langchain_cope.history import UserHistory

_SHOWN_WAYS = 6  # columns of a way in the users' table


def evaluate(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="One user a line: user_id, history and queries.")
    ],
    model: Model = DEFAULT_MODEL,
    task_adapter: TaskAdapter = None,
    ways: Annotated[
        str | None,
        typer.Option(
            "--ways",
            metavar="A,B,…",
            help="Ways of answering to compare, by name, or all. A name that does not exist shows "
            "the list. Default: base, base+retrieved, task (with --task-adapter), sft, dpo, cope.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", min=1, help="Only the first N users. Default: all."),
    ] = None,
    target: Target = None,
    paper: Paper = False,
    seed: TrainingSeed = 0,
    device: Device = None,
    dtype: Dtype = None,
    job_dir: Annotated[
        Path | None,
        typer.Option(
            "--job-dir",
            metavar="FOLDER",
            help="Keep adapters and answers there, a folder a user: the same command goes on where "
            "it was stopped, and another choice of ways runs the new ones only.",
        ),
    ] = None,
    grid: Annotated[
        bool,
        typer.Option(
            "--grid",
            help="Also answer at 13 settings of α and τ, up to 10 queries a user.",
        ),
    ] = False,
    matrix: Annotated[
        bool,
        typer.Option("--matrix", help="Also score each user's queries under everybody's adapter."),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE.html", help="Write a page with charts and samples."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare ways of answering: train on each user's history, judge on the queries.

    Nothing is published.
    """
    from langchain_cope.history import read_users

    with prints_to_stderr():
        users = read_users(file, target=target.value if target else None)[:limit]
        _check(users, file)
        chosen = _chosen(ways, task_adapter, len(users))
        _check_views(chosen, len(users), grid=grid, matrix=matrix)
        check_page_file(report)
        settings = {"model": model, "device": device, "dtype": dtype}
        with _folder(job_dir) as folder:
            comparison = _comparison(
                users, chosen, folder, settings, task_adapter, paper=paper, seed=seed
            )
            found = _found(comparison, job_dir, grid=grid, matrix=matrix)
        notes = _leaks(users, task_adapter)
        found.notes.extend(notes)
    facts = _facts(found, model, task_adapter)
    Output(as_json).show(facts, lambda: _show(found, facts))
    if report is not None:  # last: no figure is lost to a full disk
        from cope_lc.report import html_report

        write_page(report, html_report(found, model, task_adapter))


def _chosen(names: str | None, task_adapter: str | None, num_users: int) -> "tuple[Way, ...]":
    """Return the ways asked for, else the quick ones that can be had here."""
    from langchain_cope.evaluation.ways import ALL_WAYS, QUICK_WAYS, ways_named

    if names is None or names.strip() == "all":
        named = ALL_WAYS if names else ways_named(QUICK_WAYS)
        return tuple(
            way
            for way in named
            if (task_adapter or not way.needs_task) and (num_users > 1 or not way.of_another)
        )
    return ways_named(name.strip() for name in names.split(","))


def _check(users: "list[UserHistory]", file: Path) -> None:
    """Refuse a file with a user that cannot be evaluated before the first one is trained."""
    from langchain_cope.evaluation.comparison import check_has_queries

    for index, user in enumerate(users, 1):
        check_has_queries(user, f"{file}: user {index} ({user.user_id!r:.80})")


def _check_views(ways: "tuple[Way, ...]", num_users: int, *, grid: bool, matrix: bool) -> None:
    """Refuse `--grid` and `--matrix` where they have nothing to look at, before any training."""
    from langchain_cope.evaluation.over_users import require_scikit_learn

    if not grid and not matrix:
        return
    require_scikit_learn()
    option = "--matrix" if matrix else "--grid"
    if all(way.adapter is None for way in ways):
        raise typer.BadParameter("no way has an adapter: add sft or cope", param_hint=option)
    if matrix and num_users < 2:
        raise typer.BadParameter("it needs two users or more", param_hint=option)


@contextmanager
def _folder(job_dir: Path | None) -> Iterator[Path]:
    if job_dir is not None:
        job_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield job_dir
        return
    with tempfile.TemporaryDirectory(prefix="cope-") as name:
        yield Path(name)


def _comparison(
    users: "list[UserHistory]",
    ways: "tuple[Way, ...]",
    folder: Path,
    settings: dict[str, Any],
    task_adapter: str | None,
    *,
    paper: bool,
    seed: int,
) -> "Comparison":
    from langchain_cope.engine import Engine, load_base
    from langchain_cope.evaluation.users import Comparison

    engine = Engine.of(load_base(**settings))
    task_engine = None
    if task_adapter is not None:
        task_engine = Engine.of(load_base(**settings, task_adapter=task_adapter))
    recipe = recipe_choice(paper=paper, seed=seed)
    return Comparison(engine, users, folder, ways, task_engine=task_engine, recipe=recipe)


def _found(comparison: "Comparison", job_dir: Path | None, *, grid: bool, matrix: bool) -> "Report":
    """Do all that is not done yet, with progress, and return the figures."""
    from dataclasses import replace

    from cope_lc.progress import DisplayMonitor, progress_display
    from langchain_cope.errors import Cancelled
    from langchain_cope.evaluation.adapter_matrix import score_adapters
    from langchain_cope.evaluation.grid import answer_grid, measure_grid
    from langchain_cope.evaluation.measures import measure

    try:
        _run(comparison)
        found = measure(comparison)
        if grid:
            with progress_display("α and τ: ", transient=True) as display:
                answer_grid(comparison, DisplayMonitor(display))
            found = replace(found, grid=measure_grid(comparison, found.voice))
        if matrix:
            with progress_display("adapters: ", transient=True) as display:
                found = replace(found, matrix=score_adapters(comparison, DisplayMonitor(display)))
    except KeyboardInterrupt:
        kept = f"; what was finished is kept in {job_dir}: the same command goes on after it"
        line = "stopped; nothing was published"
        raise Cancelled(line + (kept if job_dir else "")) from None
    return found


def _run(comparison: "Comparison") -> None:
    """Train and score user by user, then let all ways answer, with progress."""
    from cope_lc.progress import DisplayMonitor, duration, progress_display

    jobs, started = comparison.jobs, time.monotonic()
    for index, job in enumerate(jobs, 1):
        prefix = f"[{index}/{len(jobs)}] {_name_of(job, 24)}: "
        with progress_display(prefix, transient=True) as display:
            comparison.train(job, DisplayMonitor(display))
        left = (time.monotonic() - started) / index * (len(jobs) - index)
        took = duration(sum(job.timings.values()))
        line = f"{prefix}trained in {took}" if job.timings else f"{prefix}nothing to train"
        others = f", about {duration(left)} left for the others" if index < len(jobs) else ""
        print(f"{line}{others}", file=sys.stderr, flush=True)
    with progress_display(transient=True) as display:
        monitor = DisplayMonitor(display)
        for index, job in enumerate(jobs, 1):
            comparison.score(job, monitor)
            summary = f"[{index}/{len(jobs)}] {_name_of(job, 24)}: {_summary(comparison, job)}"
            print(summary, file=sys.stderr, flush=True)
        comparison.answer(monitor)


def _summary(comparison: "Comparison", job: "UserJob") -> str:
    nll = {way.name: comparison.nll_of(job, way) for way in comparison.ways if way.has_nll}
    figures = " → ".join(f"{value:.3f}" for value in nll.values() if value is not None)
    return f"NLL {figures} ({' → '.join(nll)})" if nll else "scored"


def _name_of(job: "UserJob", limit: int) -> str:
    return shorten(job.history.user_id or "the user", limit)


def _leaks(users: "list[UserHistory]", task_adapter: str | None) -> list[str]:
    """Return a note where the task adapter was trained on what is judged by."""
    from langchain_cope.personalization.task_adapter import count_known

    if task_adapter is None:
        return []
    queries = [query for user in users for query in user.queries]
    num_known = count_known(Path(task_adapter).expanduser(), queries)
    if not num_known:
        return []
    return [
        f"the task adapter was trained on {num_known} of the {len(queries)} queries: figures of "
        "all ways that use it are too good"
    ]


def _facts(report: "Report", model: str, task_adapter: str | None) -> dict[str, Any]:
    """Return all figures, as `--json` prints them."""
    from dataclasses import asdict

    from cope_lc.metrics_table import nll_changes

    mean = {
        way: {measure: estimate.value for measure, estimate in figures.items()}
        for way, figures in report.means.items()
    }
    intervals = {
        way: {measure: estimate.interval for measure, estimate in figures.items()}
        for way, figures in report.means.items()
    }
    mean_changes = nll_changes(mean)
    users = []
    users_better = dict.fromkeys(mean_changes, 0)
    for user in report.users:
        changes = nll_changes(user.metrics)
        users.append({"user_id": user.name, **_plain(user), "nll_change": changes})
        for name, change in changes.items():
            users_better[name] += change < 0
    return {
        "model": model,
        "task_adapter": task_adapter,
        "ways": [way.name for way in report.ways],
        "users": users,
        "mean": mean,
        "intervals": intervals,
        "differences": {
            reference: {
                way: {name: asdict(value) for name, value in measures.items()}
                for way, measures in by_way.items()
            }
            for reference, by_way in report.differences.items()
        },
        "voice": {name: _scale(scale) for name, scale in report.voice.items()},
        "grid": [asdict(cell) for cell in report.grid],
        "matrix": asdict(report.matrix) if report.matrix else None,
        "nll_change": mean_changes,
        "users_better": users_better,
        "notes": report.notes,
    }


def _plain(user: "UserFigures") -> dict[str, Any]:
    left_out = ("name", "samples")
    return {name: value for name, value in vars(user).items() if name not in left_out}


def _scale(scale: Any) -> dict[str, Any]:
    """Return a voice scale, or why there is none, as plain data."""
    from langchain_cope.evaluation.voice import Silent

    if isinstance(scale, Silent):
        return {"silent": scale.reason}
    names = ("auc", "floor", "ceiling", "left_out")
    return {name: getattr(scale, name) for name in names}


def _show(report: "Report", facts: dict[str, Any]) -> None:
    from cope_lc.metrics_table import (
        differences_table,
        grid_table,
        matrix_line,
        metrics_table,
        user_table,
    )
    from cope_lc.progress import duration
    from langchain_cope.evaluation.ways import QUICK_WAYS

    out = console()
    num_users = len(report.users)
    seconds = sum(sum(user.timings.values()) for user in report.users)
    out.print()
    rows = [(shorten(user.name, 30), user.metrics) for user in report.users]
    few = [way for way in report.ways if way.name in QUICK_WAYS] or report.ways[:_SHOWN_WAYS]
    out.print(user_table(rows, few))  # more columns fit no terminal; the report has all
    out.print()
    out.print(metrics_table(facts["mean"], f"mean of {plural(num_users, 'user')}"))
    out.print()
    for name, change in facts["nll_change"].items():
        better = f"lower for {facts['users_better'][name]} of {num_users}"
        say(out, f"{name}: NLL {change:+.2%} against the base; {better}")
    for reference, by_way in report.differences.items():
        out.print()
        out.print(differences_table(by_way, f"against {reference}"))
    out.print()
    for name, scale in facts["voice"].items():
        if "silent" in scale:
            say(out, f"note: no {name} score: {scale['silent']}", "dim")
        else:
            say(out, f"{name}: 0 is strangers, 1 the user; told apart with AUC {scale['auc']:.2f}")
    if report.grid:
        out.print(grid_table(report.grid))
        out.print()
    if report.matrix is not None:
        say(out, matrix_line(report.matrix))
    for line in _notes(report):
        say(out, f"note: {line}", "dim")
    say(out, f"training took {duration(seconds)}; nothing was published", "dim")


def _notes(report: "Report") -> list[str]:
    """Return the notes of all users, once where a note is the same for several."""
    users_of: dict[str, list[str]] = {}
    for user in report.users:
        for note in user.notes:
            users_of.setdefault(note, []).append(shorten(user.name, 30))
    lines = [shorten(note, 300) for note in report.notes]
    for note, names in users_of.items():
        about = names[0] if len(names) == 1 else plural(len(names), "user")
        lines.append(f"{about}: {shorten(note, 300)}")
    return lines
