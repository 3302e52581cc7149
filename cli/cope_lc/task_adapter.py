"""`cope-lc task-adapter`: one LoRA on many users' items, to be merged into the base."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cope_lc.options import DEFAULT_MODEL, Device, Dtype, Json, Model, Target
from cope_lc.output import Output
from cope_lc.quiet_libraries import prints_to_stderr
from cope_lc.recipe_choice import TrainingSeed
from cope_lc.screen import console, say
from cope_lc.text import plural, shorten

if TYPE_CHECKING:
    from langchain_cope.personalization.task_adapter import TaskAdapterResult

_NOT_BETTER = 1  # the exit code where nothing was written


def task_adapter(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help='One user a line: user_id, history, "shareable": true.'
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="A new folder for the adapter.")
    ],
    model: Model = DEFAULT_MODEL,
    all_shareable: Annotated[
        bool,
        typer.Option("--all-shareable", help="Use every user of the file: all of them agreed."),
    ] = False,
    always: Annotated[
        bool, typer.Option("--always", help="Write it even where it is no better than the base.")
    ] = False,
    target: Target = None,
    seed: TrainingSeed = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Train one adapter on many users' items, which teaches the base the task.

    Only users who agreed are used. Give the folder as --task-adapter to personalize, evaluate, chat
    and generate.
    """
    from dataclasses import asdict
    from functools import partial

    from langchain_cope.history import read_users

    with prints_to_stderr():
        users = read_users(file, target=target.value if target else None)
        from cope_lc.progress import DisplayMonitor, progress_display
        from langchain_cope import Recipe
        from langchain_cope.engine import Engine, load_base
        from langchain_cope.errors import Cancelled
        from langchain_cope.personalization.task_adapter import train_task_adapter

        engine = Engine.of(load_base(model, device=device, dtype=dtype))
        try:
            with progress_display() as display:
                result = train_task_adapter(
                    engine,
                    users,
                    out,
                    all_shareable=all_shareable,
                    always=always,
                    recipe=partial(Recipe.for_task, seed=seed),
                    monitor=DisplayMonitor(display),
                )
        except KeyboardInterrupt:
            raise Cancelled("stopped; nothing was written") from None
    Output(as_json).show(asdict(result), lambda: _show(result))
    if result.folder is None:
        raise typer.Exit(_NOT_BETTER)


def _show(result: "TaskAdapterResult") -> None:
    from cope_lc.progress import duration

    out = console()
    if result.folder is not None:
        say(out, f"written: {result.folder}", "bold green", whole=True)
    else:
        say(out, "not written", "bold yellow")
    say(out, result.reason)
    say(
        out,
        f"trained on {plural(result.num_trained, 'item')} of {plural(result.num_users, 'user')}; "
        f"held-out items became likelier for {result.users_better} of {result.num_judged}",
    )
    for note in result.notes:
        say(out, f"note: {shorten(note, 400)}", "yellow")
    say(out, f"time: {duration(sum(result.timings.values()))}", "dim")
