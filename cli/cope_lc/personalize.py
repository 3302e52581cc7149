"""``cope-lc personalize``: read a history, show what it holds, train, and show what came of it."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cope_lc.options import Device, Dtype, Json, Model, Store, Target

if TYPE_CHECKING:
    from rich.console import Console

    from adapter_store import AdapterStore
    from langchain_cope.history import Item, UserHistory
    from langchain_cope.personalize import PersonalizeResult
    from langchain_cope.training.recipe import Recipe

EXAMPLE = "Example: cope-lc personalize user.jsonl --user alice"
SHOWN_ITEMS, SHOWN_ANSWERS = 3, 3
_TEXT_LIMIT = 240  # characters of a text in a comparison


def personalize(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="History, its format told by its shape: JSONL or JSON of prompt/completion, chosen/rejected, messages (OpenAI, "
            "ShareGPT, LangChain), Alpaca, ChatGPT's conversations.json, feedback, LaMP or user_id/history rows; or .txt.",
        ),
    ],
    user: Annotated[
        str | None,
        typer.Option(
            "--user", metavar="ID", help="Whose history it is. Default: whom the file names."
        ),
    ] = None,
    model: Model = "starter",
    store: Store = None,
    target: Target = None,
    instruction: Annotated[
        str | None,
        typer.Option("--instruction", metavar="TEXT", help="Prompt of the items that have none."),
    ] = None,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper", help="Use the paper's settings, chosen for 7B models, as they are."
        ),
    ] = False,
    always: Annotated[
        bool,
        typer.Option(
            "--always", help="Publish even where the result is no better than what is active."
        ),
    ] = False,
    seed: Annotated[
        int,
        typer.Option("--seed", metavar="N", min=0, max=2**32 - 1, help="Same seed, same result."),
    ] = 0,
    device: Device = None,
    dtype: Dtype = None,
    job_dir: Annotated[
        Path | None,
        typer.Option(
            "--job-dir",
            metavar="FOLDER",
            help="Keep finished stages there until the end: stopped or killed, the same command goes on after the last.",
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
    """Learn from what a user wrote, and publish the adapter where it is better than what is active."""
    from cope_lc.quiet_libraries import prints_to_stderr
    from langchain_cope.history import read_history

    with prints_to_stderr():
        history = read_history(
            file, target=target.value if target else None, user_id=user, instruction=instruction
        )
        facts = _facts(history)
    if not as_json:
        _show_history(history, facts)
    if dry_run:
        _end_dry_run(history, facts, as_json)
        return
    settings = {"model": model, "device": device, "dtype": dtype}
    with prints_to_stderr():
        result = _train(history, settings, store, job_dir, paper=paper, seed=seed, always=always)
    if as_json:
        _print_result_json(result, store)
    else:
        _show_result(result, history, store)


def _facts(history: "UserHistory") -> dict[str, Any]:
    """How the history is divided. Raises HistoryError where it is too short for that."""
    from langchain_cope.personalization.held_out import split

    trained, judged = split(history.items)
    return {
        "formats": history.formats,
        "target": history.target,
        "num_items": len(history.items),
        "num_trained": len(trained),
        "num_held_out": len(judged),
        "num_pairs": history.num_pairs,
    }


def _show_history(history: "UserHistory", facts: dict[str, Any]) -> None:
    from cope_lc.screen import console, pairs, say
    from cope_lc.text import name_of, shorten

    out = console()
    say(
        out,
        f"{name_of(history.user_id or '')}: {facts['num_items']} items, {facts['num_trained']} to train on, "
        f"the newest {facts['num_held_out']} held out to judge by",
    )
    say(out, _found(history))
    for note in history.notes:
        say(out, f"note: {shorten(note, 400)}", "yellow")
    out.print()
    for item in history.items[:SHOWN_ITEMS]:
        rejected = [
            ("rejected", shorten(answer, 160), "dim") for answer in item.rejected[:SHOWN_ANSWERS]
        ]
        pairs(
            out,
            [
                ("prompt", _ending(item, 160), "dim"),
                ("the user wrote", shorten(item.completion, 160), ""),
                *rejected,
            ],
        )
    if len(history.items) > SHOWN_ITEMS:
        say(out, f"… and {len(history.items) - SHOWN_ITEMS} more\n", "dim")
    sys.stdout.flush()


def _found(history: "UserHistory") -> str:
    """The formats that were recognised, and what of them is learnt."""
    rows = ", ".join(
        f"{name} ({number} row{'' if number == 1 else 's'})"
        for name, number in history.formats.items()
    )
    learnt = f"; learnt are the {history.target}'s turns" if history.target else ""
    given = f"; {history.num_pairs} preference pairs for DPO" if history.num_pairs else ""
    return f"found: {rows}{learnt}{given}"


def _ending(item: "Item", limit: int) -> str:
    """The end of what an item answers: instructions, all alike, stand at the beginning."""
    from cope_lc.text import one_line

    line = one_line(item.messages[-1]["content"])
    return line if len(line) <= limit else f"…{line[1 - limit :].lstrip()}"


def _end_dry_run(history: "UserHistory", facts: dict[str, Any], as_json: bool) -> None:
    from cope_lc.text import print_json

    if as_json:
        samples = [item.model_dump(mode="json") for item in history.items[:SHOWN_ITEMS]]
        print_json(
            {"dry_run": True, "user_id": history.user_id, **facts, "notes": history.notes}
            | {"instruction": history.instruction, "samples": samples}
        )
    else:
        print("nothing was trained or published; leave out --preview to do so")


def _train(
    history: "UserHistory",
    settings: dict[str, Any],
    store: str | None,
    job_dir: Path | None,
    *,
    paper: bool,
    seed: int,
    always: bool,
) -> "PersonalizeResult":
    from cope_lc.progress import display, listener
    from langchain_cope import PersonalizeUser
    from langchain_cope.errors import Cancelled
    from langchain_cope.stores import open_store

    user, opened = history.user_id or "", open_store(store)
    before = opened.active(user)
    try:
        with display() as shown:
            recipe = _recipe(history, settings, paper=paper, seed=seed)
            gate = "always" if always else "improve"
            chain = PersonalizeUser(
                store=opened, recipe=recipe, gate=gate, job_dir=job_dir, **settings
            )
            request = {
                "user_id": user,
                "history": history.items,
                "instruction": history.instruction,
            }
            return chain.invoke(request, {"callbacks": [listener(shown)]})
    except KeyboardInterrupt:
        raise Cancelled(_stopped(opened, user, before)) from None


def _recipe(
    history: "UserHistory", settings: dict[str, Any], *, paper: bool, seed: int
) -> "Recipe | None":
    """The recipe asked for; None is PersonalizeUser's own choice."""
    from dataclasses import replace

    from langchain_cope import Recipe

    if paper:
        return replace(Recipe.paper(), seed=seed)
    if not seed:
        return None
    from langchain_cope.engine import load_base
    from langchain_cope.personalization.held_out import split

    return Recipe.for_model(load_base(**settings), split(history.items)[0], seed=seed)


def _stopped(store: "AdapterStore", user: str, before: str | None) -> str:
    """What Ctrl-C found: it may come in the moment between publishing and telling."""
    active = store.active(user)
    return (
        "stopped; nothing was published"
        if active == before
        else f"stopped; {active} had been published already"
    )


def _print_result_json(result: "PersonalizeResult", store: str | None) -> None:
    from cope_lc.text import print_json
    from langchain_cope.stores import open_store

    print_json({"store": open_store(store).url, **result.model_dump(mode="json")})


def _show_result(result: "PersonalizeResult", history: "UserHistory", store: str | None) -> None:
    from cope_lc.metrics_table import metrics_table
    from cope_lc.progress import STAGES, duration
    from cope_lc.screen import console, say
    from cope_lc.text import name_of, shorten

    out = console()
    user = name_of(result.user_id)
    if result.published:
        say(out, f"\npublished {result.version} for {user}", "bold green")
    else:
        say(out, f"\nnot published: {user} keeps what is active", "bold yellow")
    say(out, f"{result.reason}\n")
    for note in result.notes:
        if note not in history.notes:
            say(out, f"note: {shorten(note, 400)}", "yellow")
    out.print(metrics_table(result.metrics, f"{result.num_held_out} held-out items"))
    stages = [
        f"{STAGES.get(stage, stage)} {duration(seconds)}"
        for stage, seconds in result.timings.items()
    ]
    say(
        out,
        f"\ntime: {', '.join(stages)}; {duration(sum(result.timings.values()))} in all\n",
        "dim",
    )
    _show_answers(out, result)
    say(out, f"next: {_next(result, store)}", whole=True)


def _show_answers(out: "Console", result: "PersonalizeResult") -> None:
    """What the user wrote beside the base's answer and the personalized one, for the newest held-out items."""
    from cope_lc.screen import pairs
    from cope_lc.text import shorten
    from langchain_cope.history import Item

    for sample in result.samples[-SHOWN_ANSWERS:]:
        item = Item(prompt=sample.prompt, completion=sample.reference)
        rows = [
            ("prompt", _ending(item, _TEXT_LIMIT), "dim"),
            ("the user wrote", shorten(sample.reference, _TEXT_LIMIT), ""),
            ("base", shorten(sample.base, _TEXT_LIMIT), ""),
            ("personalized", shorten(sample.cope, _TEXT_LIMIT), "bold"),
        ]
        pairs(out, rows)


def _next(result: "PersonalizeResult", store: str | None) -> str:
    """What to do now, as a command to copy."""
    if not result.published:
        return "add items to the history, or publish it all the same with --always"
    where = f" --store {shlex.quote(store)}" if store else ""
    return f"cope-lc chat --user {shlex.quote(result.user_id)}{where}"
