"""`cope-lc forget`: everything of a person removed, with a receipt."""

from pathlib import Path
from typing import Annotated

import typer

from cope_lc.adapters.stored import existing_store_at, location_of, store_at
from cope_lc.options import Json, Store, UserId, Yes
from cope_lc.output import Output
from cope_lc.screen import confirm, console, say
from cope_lc.text import name_of


def forget(
    user: UserId,
    store_url: Store = None,
    history: Annotated[
        str | None,
        typer.Option(
            "--history",
            metavar="CHROMA",
            help="Folder or http:// URL of the Chroma that holds the user's history.",
        ),
    ] = None,
    collection: Annotated[
        str, typer.Option("--collection", metavar="NAME", help="Its collection.")
    ] = "cope-history",
    job_dir: Annotated[
        Path | None,
        typer.Option("--job-dir", metavar="FOLDER", help="Folder of unfinished trainings."),
    ] = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Forget a person: adapters, keys, history, unfinished trainings, caches.

    What was removed, what failed and what could not be reached is printed; exit code 1 if a part
    failed. A training that is under way is refused when it publishes.
    """
    from langchain_cope import ChromaHistory
    from langchain_cope import forget as forget_user

    store = store_at(None) if store_url is None else existing_store_at(store_url)
    if history is not None and "://" not in history:
        _check_exists(history, "--history")
    if job_dir is not None:
        _check_exists(job_dir, "--job-dir")
    places = [location_of(store), history, job_dir]
    if not yes:
        where = ", ".join(str(place) for place in places if place is not None)
        confirm(f"forget {name_of(user)} in {where} for good?", "forgetting")
    receipt = forget_user(
        user,
        store=store,
        history=None if history is None else ChromaHistory(history, collection),
        jobs=job_dir,
    )
    facts = {"complete": receipt.is_complete, **receipt.model_dump(mode="json")}
    Output(as_json).show(facts, lambda: say(console(), str(receipt), whole=True))
    if not receipt.is_complete:
        raise typer.Exit(1)


def _check_exists(folder: str | Path, option: str) -> None:
    """Refuse a mistyped folder: there all would seem to be well."""
    if not Path(folder).expanduser().is_dir():
        raise typer.BadParameter(
            f"{folder} is not a folder: nothing was done; name the right one", param_hint=option
        )
