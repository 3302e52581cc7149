"""`cope-lc personalize`: read a history, show what it holds, train, and show what came of it."""

import shlex
import sys
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cope_lc.options import DEFAULT_MODEL, Device, Dtype, Json, Model, Store, Target, TaskAdapter
from cope_lc.output import Output
from cope_lc.quiet_libraries import prints_to_stderr
from cope_lc.recipe_choice import Paper, TrainingSeed, recipe_choice
from cope_lc.screen import console, pairs, say
from cope_lc.text import name_of, one_line, plural, shorten

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from langchain_cope.history import UserHistory
    from langchain_cope.personalize import (
        PersonalizeResult,
        PersonalizeUser,
        Recommendation,
        Sample,
    )

SHOWN_ITEMS, SHOWN_ANSWERS = 3, 4
_TEXT_LIMIT = 240  # characters of a text in a comparison


def personalize(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="History, its format told by its shape: JSONL or JSON of prompt/completion, "
            "chosen/rejected, messages (OpenAI, ShareGPT, LangChain), Alpaca, ChatGPT's "
            "conversations.json, feedback, LaMP or user_id/history rows; or .txt with one text a "
            "line. Several are one history; - is standard input.",
        ),
    ],
    user: Annotated[
        str | None,
        typer.Option(
            "--user",
            metavar="ID",
            help="User of the history. Default: the one that the files name.",
        ),
    ] = None,
    model: Model = DEFAULT_MODEL,
    task_adapter: TaskAdapter = None,
    store: Store = None,
    target: Target = None,
    instruction: Annotated[
        str | None,
        typer.Option("--instruction", metavar="TEXT", help="Prompt of the items that have none."),
    ] = None,
    paper: Paper = False,
    always: Annotated[
        bool,
        typer.Option(
            "--always", help="Publish even where it is not sure that the result is better."
        ),
    ] = False,
    seed: TrainingSeed = 0,
    device: Device = None,
    dtype: Dtype = None,
    job_dir: Annotated[
        Path | None,
        typer.Option(
            "--job-dir",
            metavar="FOLDER",
            help="Keep finished stages there until the end: stopped or killed, the same command "
            "goes on after the last.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--preview",
            "--dry-run",
            help="Show the format found and what would be learnt; train and publish nothing.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Learn from what a user wrote, and publish the adapter if it is sure enough to be better."""
    from langchain_cope.history import read_history

    with prints_to_stderr():
        history = read_history(
            *files, target=target.value if target else None, user_id=user, instruction=instruction
        )
        facts = _facts(history)
    if not as_json:
        _show_history(history, facts)
    if dry_run:
        _end_dry_run(history, facts, as_json)
        return
    with prints_to_stderr():
        from langchain_cope import PersonalizeUser
        from langchain_cope.stores import open_store

        chain = PersonalizeUser(
            model=model,
            task_adapter=task_adapter,
            device=device,
            dtype=dtype,
            store=open_store(store),
            recipe=recipe_choice(paper=paper, seed=seed),
            gate="always" if always else "improve",
            job_dir=job_dir,
        )
        result = _train(chain, history)
    outcome = {"store": chain.store.url, **result.model_dump(mode="json")}
    Output(as_json).show(outcome, lambda: _show_result(result, history, chain, store))


def _facts(history: "UserHistory") -> dict[str, Any]:
    """Return how the history is divided; raises `HistoryError` where it is too short for that."""
    from langchain_cope.personalization.held_out import split

    trained, held_out = split(history.items)
    return {
        "formats": history.formats,
        "target": history.target,
        "num_items": len(history.items),
        "num_trained": len(trained),
        "num_held_out": len(held_out),
        "num_pairs": history.num_pairs,
    }


def _show_history(history: "UserHistory", facts: dict[str, Any]) -> None:
    out = console()
    say(
        out,
        f"{name_of(history.user_id or '')}: {facts['num_items']} items, {facts['num_trained']} to "
        f"train on, the newest {facts['num_held_out']} held out to judge by",
    )
    say(out, _what_was_read(history))
    for note in history.notes:
        say(out, f"note: {shorten(note, 400)}", "yellow")
    out.print()
    for item in history.items[:SHOWN_ITEMS]:
        rows = [
            ("prompt", _ending(item.messages[-1]["content"], 160), "dim"),
            ("the user wrote", shorten(item.completion, 160), ""),
        ]
        for answer in item.rejected[:SHOWN_ANSWERS]:
            rows.append(("rejected", shorten(answer, 160), "dim"))
        pairs(out, rows)
    if len(history.items) > SHOWN_ITEMS:
        say(out, f"… and {len(history.items) - SHOWN_ITEMS} more\n", "dim")
    sys.stdout.flush()


def _what_was_read(history: "UserHistory") -> str:
    """Return the formats that were recognised, and what of them is learnt."""
    formats = [f"{name} ({plural(number, 'row')})" for name, number in history.formats.items()]
    line = f"found: {', '.join(formats)}"
    if history.target:
        line += f"; learnt are the {history.target}'s turns"
    if history.num_pairs:
        line += f"; {history.num_pairs} preference pairs for DPO"
    return line


def _ending(prompt: str, limit: int) -> str:
    """Return the end of a prompt: instructions, all alike, stand at the beginning."""
    line = one_line(prompt)
    return line if len(line) <= limit else f"…{line[1 - limit :].lstrip()}"


def _end_dry_run(history: "UserHistory", facts: dict[str, Any], as_json: bool) -> None:
    preview = {
        "dry_run": True,
        "user_id": history.user_id,
        **facts,
        "notes": history.notes,
        "instruction": history.instruction,
        "samples": [item.model_dump(mode="json") for item in history.items[:SHOWN_ITEMS]],
    }
    line = "nothing was trained or published; leave out --preview to do so"
    Output(as_json).show(preview, line)


def _train(chain: "PersonalizeUser", history: "UserHistory") -> "PersonalizeResult":
    from cope_lc.progress import listener, progress_display
    from langchain_cope.errors import Cancelled

    user = history.user_id or ""
    request = {"user_id": user, "history": history.items, "instruction": history.instruction}
    before = chain.store.active(user)
    try:
        with progress_display() as display:
            return chain.invoke(request, {"callbacks": [listener(display)]})
    except KeyboardInterrupt:
        raise Cancelled(_stopped(chain, user, before)) from None


def _stopped(chain: "PersonalizeUser", user: str, before: str | None) -> str:
    """Return what Ctrl-C found: it may come in the moment between publishing and telling."""
    active = chain.store.active(user)
    if active != before:
        return f"stopped; {active} had been published already"
    if chain.job_dir is None:
        return "stopped; nothing was published"
    kept = f"what was finished is kept in {chain.job_dir}: the same command goes on after it"
    return f"stopped; nothing was published; {kept}"


def _show_result(
    result: "PersonalizeResult",
    history: "UserHistory",
    chain: "PersonalizeUser",
    store: str | None,
) -> None:
    from cope_lc.metrics_table import metrics_table
    from cope_lc.progress import duration
    from langchain_cope.training.progress import Stage

    out = console()
    user = name_of(result.user_id)
    if result.published:
        say(out, f"\npublished {result.version} for {user}", "bold green")
    else:
        say(out, f"\nnot published: {user} keeps what is active", "bold yellow")
    say(out, f"{result.reason}\n")
    if result.verdict and result.verdict.advice:
        say(out, f"what would help: {result.verdict.advice}\n")
    if result.recommended:
        say(out, f"recommended: {_strength(result.recommended)}\n")
    for note in result.notes:
        if note not in history.notes:
            say(out, f"note: {shorten(note, 400)}", "yellow")
    out.print(metrics_table(result.metrics, f"{result.num_held_out} held-out items"))
    stages = [
        f"{Stage(name).label} {duration(seconds)}" for name, seconds in result.timings.items()
    ]
    in_all = duration(sum(result.timings.values()))
    say(out, f"\ntime: {', '.join(stages)}; {in_all} in all\n", "dim")
    _show_answers(out, result)
    say(out, f"next: {_next(result, chain, store)}", whole=True)


def _strength(recommended: "Recommendation") -> str:
    """Return how strongly the adapter is to act, and why."""
    from langchain_cope.strength import Strength

    strength = Strength(recommended.alpha, recommended.tau, recommended.adapter_scale)
    return f"{strength} ({recommended.why})"


def _show_answers(out: "Console", result: "PersonalizeResult") -> None:
    """Print what the user wrote, the base's answer and the personalized one, one after another.

    They are those of the newest held-out items, so that nobody has chosen them.
    """
    from cope_lc.changes import PLAIN_MARKS, marked

    samples = result.samples[-SHOWN_ANSWERS:]
    if not samples:
        return
    colour = out.is_terminal and not out.no_color
    marks = "in colour" if colour else "…".join(PLAIN_MARKS)
    say(
        out,
        f"the newest {len(samples)} held-out items; {marks}: words that the base did not write\n",
        "dim",
    )
    for sample, prompt in zip(samples, _without_shared_start(samples), strict=True):
        base, cope = shorten(sample.base, _TEXT_LIMIT), shorten(sample.cope, _TEXT_LIMIT)
        rows: list[tuple[str, str | Text, str]] = [
            ("prompt", _ending(prompt, _TEXT_LIMIT), "dim"),
            ("the user wrote", shorten(sample.reference, _TEXT_LIMIT), ""),
            ("base", base, ""),
            ("personalized", marked(cope, base, colour=colour), ""),
        ]
        pairs(out, rows)


def _without_shared_start(samples: "list[Sample]") -> list[str]:
    """Return the ends of the prompts, without the words that all of them begin with."""
    prompts = [sample.prompt[-1]["content"].split() for sample in samples]
    columns = zip(*prompts, strict=False)
    shared = len(list(takewhile(lambda words: len(set(words)) == 1, columns)))
    return [
        " ".join(["…", *words[shared:]] if 0 < shared < len(words) else words) for words in prompts
    ]


def _next(result: "PersonalizeResult", chain: "PersonalizeUser", store: str | None) -> str:
    """Return what to do now, as a command to copy."""
    from langchain_cope.engine import default_model

    if not result.published:
        return "add items to the history, or publish it all the same with --always"
    options = {
        "--model": None if chain.model == default_model() else chain.model,
        "--task-adapter": chain.task_adapter,
        "--store": store,
    }
    given = [f" {option} {shlex.quote(value)}" for option, value in options.items() if value]
    return f"cope-lc chat --user {shlex.quote(result.user_id)}{''.join(given)}"
