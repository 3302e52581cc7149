"""`cope-lc personalize-fleet` and `cope-lc fleet migrate`: many users as one run."""

import hashlib
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cope_lc.options import DEFAULT_MODEL, Device, Dtype, Json, Model, Store, Target, TaskAdapter
from cope_lc.output import Output
from cope_lc.page import check_page_file, write_page
from cope_lc.quiet_libraries import prints_to_stderr
from cope_lc.recipe_choice import TrainingSeed, recipe_choice
from cope_lc.screen import console, number, say, table
from cope_lc.text import finite, name_of, plural, shorten

if TYPE_CHECKING:
    from langchain_cope.fleet.fleet import FleetProgress
    from langchain_cope.fleet.report import FleetReport
    from langchain_cope.fleet.runner import Runner
    from langchain_cope.fleet.sources import Source
    from langchain_cope.fleet.tasks import Plan

JOBS = "jobs"  # in the fleet's folder: unfinished trainings
SHOWN_USERS = 20
LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal
_FAILED = 1  # the exit code where somebody failed

Histories = Annotated[
    str,
    typer.Argument(
        metavar="HISTORIES",
        help="A folder of histories (each file of one user, named as the file where it names "
        "nobody, or of several), a JSONL of users, a folder that Chroma made, or the http URL of "
        "a Chroma server.",
    ),
]
Workers = Annotated[
    int,
    typer.Option(
        "--workers",
        metavar="N",
        min=1,
        help="Processes that train, each with a base of its own; on a CPU they share the cores.",
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Train on a Ray cluster: auto, HOST:PORT or ray://HOST:PORT; local starts one here.",
    ),
]
Work = Annotated[
    Path | None,
    typer.Option(
        "--work",
        metavar="FOLDER",
        help="Private folder of what is done and of unfinished trainings: the same command goes on "
        "after it. Default: one of this source, store and base in the user data folder.",
    ),
]
ReportFile = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE.html", help="Write a page of what came of it."),
]


def personalize_fleet(
    histories: Histories,
    model: Model = DEFAULT_MODEL,
    task_adapter: TaskAdapter = None,
    store: Store = None,
    target: Target = None,
    workers: Workers = 1,
    ray: RayAddress = None,
    work: Work = None,
    seed: TrainingSeed = 0,
    device: Device = None,
    dtype: Dtype = None,
    report: ReportFile = None,
    as_json: Json = False,
) -> None:
    """Learn from what many users wrote, and publish those that are sure to be better.

    Versions are published at the end, when all users are trained: so many tests err more often
    than one, and the false discovery rate is held at 5 %. Stopped or killed, the same command goes
    on. Exit code 1 if a user failed.
    """
    from langchain_cope.fleet.sources import open_source

    check_page_file(report)
    with prints_to_stderr():
        source = open_source(histories, target=target.value if target else None)
        plan = _plan(source, work, model, task_adapter, store, seed, device, dtype)
        result = _run(source, plan, _runner(workers, ray))
    _end(result, report, as_json)


def migrate(
    histories: Histories,
    base: Annotated[
        str, typer.Option("--base", metavar="M", help="The new base model, as for --model.")
    ],
    task_adapter: TaskAdapter = None,
    store: Store = None,
    target: Target = None,
    workers: Workers = 1,
    ray: RayAddress = None,
    work: Work = None,
    seed: TrainingSeed = 0,
    device: Device = None,
    dtype: Dtype = None,
    report: ReportFile = None,
    as_json: Json = False,
) -> None:
    """Train all users of a store anew from their histories, for another base model.

    A user's new version becomes active where it is sure to be better than the new base alone; else
    the old one stays. Old versions are kept, and `cope-lc adapters rollback` goes back to them.
    """
    from langchain_cope.fleet.sources import of_store, open_source
    from langchain_cope.stores import open_store

    check_page_file(report)
    with prints_to_stderr():
        everybody = open_source(histories, target=target.value if target else None)
        source = of_store(open_store(store), everybody)
        plan = _plan(source, work, base, task_adapter, store, seed, device, dtype)
        result = _run(source, plan, _runner(workers, ray))
    _end(result, report, as_json)


def _plan(
    source: "Source",
    work: Path | None,
    model: str,
    task_adapter: str | None,
    store: str | None,
    seed: int,
    device: str | None,
    dtype: str | None,
) -> "Plan":
    from langchain_cope.fleet import Plan
    from langchain_cope.stores import location_of

    if work is not None and work.absolute() == Path(source.name):
        raise typer.BadParameter(
            "that folder holds the histories: name one of the fleet's own", param_hint="--work"
        )
    location = location_of(store)
    folder = work or _default_folder(source.name, model, task_adapter, location)
    return Plan(
        model=model,
        store=location,
        job_dir=str(folder.absolute() / JOBS),
        recipe=recipe_choice(paper=False, seed=seed),
        task_adapter=task_adapter,
        device=device,
        dtype=dtype,
    )


def _default_folder(*named: str | None) -> Path:
    """Return a folder of the user's for a fleet of that source, base, task adapter and store."""
    from platformdirs import user_data_path

    digest = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]
    return user_data_path("langchain-cope", appauthor=False) / "fleets" / digest


def _runner(workers: int, ray: str | None) -> "Runner":
    from langchain_cope.fleet import ProcessRunner

    if ray is None:
        return ProcessRunner(workers)
    from langchain_cope.fleet.on_ray import RayRunner

    return RayRunner(workers, ray)


def _run(source: "Source", plan: "Plan", runner: "Runner") -> "FleetReport":
    from langchain_cope.fleet import run_fleet

    folder = Path(plan.job_dir).parent
    with _stop_on_signals() as stop, _progress() as show:
        return run_fleet(source, plan, folder, runner, stop=stop, on_progress=show)


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C or SIGTERM sets; the second one ends the block."""
    stop = threading.Event()

    def hear(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        say(console(stderr=True), "stopping in order; once more ends it at once")

    before = {one: signal.signal(one, hear) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextmanager
def _progress() -> "Iterator[Callable[[FleetProgress], None]]":
    """Yield a function that shows progress: one line that changes, or a line now and then."""
    out = console(stderr=True)
    if out.is_terminal:
        with out.status("") as status:
            yield lambda progress: status.update(_progress_line(progress))
        return
    said = -LINE_SECONDS

    def show(progress: "FleetProgress") -> None:
        nonlocal said
        if time.monotonic() - said > LINE_SECONDS or progress.done == progress.total:
            said = time.monotonic()
            say(out, _progress_line(progress), whole=True)

    yield show


def _progress_line(progress: "FleetProgress") -> str:
    from cope_lc.progress import duration

    line = f"{progress.done} of {plural(progress.total, 'user')}"
    if progress.seconds_a_user and progress.seconds_left is not None:
        line += f", {3600 / progress.seconds_a_user:.0f} an hour"
        if progress.seconds_left:
            line += f", about {duration(progress.seconds_left)} left"
    return line + _failures(progress.failures)


def _failures(failures: Counter[str]) -> str:
    if not failures:
        return ""
    reasons = ", ".join(
        f"{times} × {shorten(reason, 80)}" for reason, times in failures.most_common(3)
    )
    return f"; failures: {reasons}"


def _end(result: "FleetReport", report: Path | None, as_json: bool) -> None:
    Output(as_json).show(finite(result.as_dict()), lambda: _show(result))
    if report is not None:  # last: nothing is lost to a full disk
        from cope_lc.fleet_report import fleet_page

        write_page(report, fleet_page(result))
    if not result.is_complete:
        raise typer.Exit(_FAILED)


def _show(result: "FleetReport") -> None:
    from cope_lc.progress import duration

    out = console()
    rows = table("user", "", "gain", "p", "voice", "why", right=("gain", "p", "voice"))
    for user, outcome in list(result.users.items())[:SHOWN_USERS]:
        verdict = outcome.verdict or {}
        rows.add_row(
            shorten(name_of(user), 30),
            outcome.state.value,
            number(verdict.get("mean_gain")),
            number(verdict.get("p_value"), 4),
            number(outcome.voice, 2),
            shorten(outcome.reason, 100),
        )
    out.print(rows)
    if len(result.users) > SHOWN_USERS:
        say(out, f"… and {len(result.users) - SHOWN_USERS} more: --json and --report have all")
    out.print()
    for line in summary(result):
        say(out, line)
    for place, problem in result.unreadable.items():
        say(out, f"not read: {shorten(place)}: {shorten(problem, 300)}", "yellow")
    workers = plural(result.num_workers, "worker")
    say(out, f"it took {duration(result.seconds)} with {workers}", "dim")


def summary(result: "FleetReport") -> list[str]:
    """Return what came of a fleet in a few lines."""
    from langchain_cope.fleet.report import Distribution

    counts = ", ".join(f"{times} {state.value}" for state, times in result.counts.most_common())
    lines = [f"{plural(len(result.users), 'user')}: {counts}" if result.users else "no users"]
    for name, unit, values in (
        ("gain of those judged", " nats a token", result.gains),
        ("voice: answers nearer to the user than the base's, as chrF", "", result.voices),
    ):
        spread = Distribution.of(values)
        if spread is not None:
            lines.append(
                f"{name}: median {spread.median:.3g}{unit}, half of them from "
                f"{spread.quarter:.3g} to {spread.three_quarters:.3g}, all from {spread.least:.3g} "
                f"to {spread.most:.3g}"
            )
    lines += [
        f"failed: {plural(times, 'user')}: {shorten(reason, 300)}"
        for reason, times in result.failures.most_common()
    ]
    return lines
