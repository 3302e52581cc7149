"""``cope-lc adapters``: what is in a store, and which version of a user's adapter is served."""

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cope_lc.adapters import care as adapters_care
from cope_lc.adapters import transfer as adapters_transfer
from cope_lc.adapters.stored import (
    history_facts,
    local_time,
    open_existing,
    place_of,
    version_facts,
)
from cope_lc.options import Json, Limit, Reason, Store, User, Version, Yes

if TYPE_CHECKING:
    from adapter_store import AdapterStore, AdapterVersion, UserHead

app = typer.Typer(
    help="List, show, activate, export, import, delete, erase and check adapters in a store.",
    epilog="Example: cope-lc adapters show alice",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command(name="list", epilog="Example: cope-lc adapters list --store ~/adapters")
def list_users(
    limit: Limit = 1000,
    cursor: Annotated[
        str | None,
        typer.Option("--cursor", metavar="C", help="Where the page before ended, as it says."),
    ] = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """List the users of a store, page by page.

    Exit code 1 where some cannot be read; all others are listed.
    """
    from cope_lc.text import print_json
    from langchain_cope.stores import open_store

    opened = open_store(store)
    problems: list[str] = []
    heads, following = opened.list_users(
        cursor, limit=limit, on_problem=lambda error: problems.append(str(error))
    )
    heads = sorted(heads, key=lambda head: head.user_id)
    if as_json:
        page = {"next": following} if following else {}
        users = [_head_facts(head) for head in heads]
        print_json({"store": opened.url, "users": users, "problems": problems, **page})
    else:
        _show_page(
            opened, heads, following, problems, is_whole=cursor is None and following is None
        )
    if problems:
        raise typer.Exit(1)


def _show_page(
    store: "AdapterStore",
    heads: list["UserHead"],
    following: str | None,
    problems: list[str],
    is_whole: bool,
) -> None:
    from cope_lc.screen import cell, console, say, say_passed_over, table
    from cope_lc.text import name_of

    out = console()
    say_passed_over(problems)
    if not heads and is_whole and not problems:
        say(
            out,
            f"no users in {place_of(store)}; add one with: cope-lc personalize FILE --user ID",
            whole=True,
        )
        return
    rows = table(
        "user",
        "active version",
        "versions",
        "updated",
        right=("versions",),
        whole=("active version", "updated"),
    )
    for head in heads:
        count = str(len(head.versions))
        rows.add_row(
            cell(name_of(head.user_id)), head.active or "none", count, local_time(head.updated_at)
        )
    out.print(rows)
    count = f"{len(heads)} user{'s' if len(heads) != 1 else ''}"
    where = f"{'' if is_whole else 'of those '}in {place_of(store)}"
    say(out, f"\n{count} {where}", "dim", whole=True)
    if following is not None:
        say(out, f"more: the same command with --cursor {following}", whole=True)


@app.command(epilog="Example: cope-lc adapters show alice")
def show(
    user: User,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=1, help="Changes of the history, at most.")
    ] = 20,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Show a user's versions, how good they are, and the history.

    ● marks the active version; the history says which one was active since when, and why.
    """
    from cope_lc.adapters.view import chart_of, history_table, version_table
    from cope_lc.screen import console, say
    from cope_lc.text import name_of, print_json
    from langchain_cope.stores import open_store

    opened = open_store(store)
    versions, active, history = (
        opened.versions(user),
        opened.active(user),
        opened.history(user, limit=limit),
    )
    if not history:
        opened.resolve(user)  # it says best what is not there
    if as_json:
        facts = [
            version_facts(version) | {"active": version.version == active} for version in versions
        ]
        changes = [history_facts(change) for change in history]
        print_json(
            {
                "store": opened.url,
                "user_id": user,
                "active": active,
                "versions": facts,
                "history": changes,
            }
        )
        return
    out = console()
    say(out, f"{name_of(user)} in {place_of(opened)}\n", whole=True)
    if versions:
        out.print(version_table(versions, active))
    if (chart := chart_of(versions, active)) is not None:
        say(out, "held-out NLL against the base's, by version", "dim")
        out.print(chart)
    say(out, "\nhistory", "dim")
    out.print(history_table(history))
    if not versions:
        say(out, "\nno version is left")
    elif active is None:
        say(out, f"\nnone is active: cope-lc adapters activate {name_of(user)} VERSION", whole=True)


@app.command(epilog="Example: cope-lc adapters activate alice 20260131T235959Z-0123456789ab")
def activate(
    user: User, version: Version, reason: Reason = "", store: Store = None, as_json: Json = False
) -> None:
    """Serve another version of a user's adapter."""
    from langchain_cope.stores import open_store

    opened = open_store(store)
    before = opened.active(user)
    _say_active(user, opened.activate(user, version, reason=reason), before, as_json)


@app.command(epilog='Example: cope-lc adapters rollback alice --reason "worse answers"')
def rollback(user: User, reason: Reason = "", store: Store = None, as_json: Json = False) -> None:
    """Serve the version before the present one again.

    Once more, the one before that.
    """
    from langchain_cope.stores import open_store

    opened = open_store(store)
    before = opened.active(user)
    _say_active(user, opened.rollback(user, reason=reason), before, as_json)


@app.command(epilog="Example: cope-lc adapters delete alice 20260131T235959Z-0123456789ab")
def delete(
    user: User,
    version: Annotated[
        str | None,
        typer.Argument(metavar="VERSION", help="Version id; left out: every version of the user."),
    ] = None,
    yes: Yes = False,
    reason: Reason = "",
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Delete a version, or all versions of a user.

    Deleting the active one leaves the user with none active.
    """
    from cope_lc.text import name_of, print_json
    from langchain_cope.stores import open_store

    opened = open_store(store)
    doomed = [opened.resolve(user, version)] if version is not None else _versions(opened, user)
    active = opened.active(user)
    what = (
        f"version {version}"
        if version is not None
        else f"{len(doomed)} version{'s' if len(doomed) > 1 else ''}"
    )
    if version is not None and version == active:
        what += ", the active one,"
    if not yes:
        _confirm(f"delete {what} of {name_of(user)} from {place_of(opened)}?", "deleting")
    for found in doomed:
        opened.delete_version(user, found.version, reason=reason)
    if as_json:
        left = opened.active(user)
        print_json(
            {"user_id": user, "deleted": [found.version for found in doomed], "active": left}
        )
    else:
        served = "" if opened.active(user) else "; none is active now"
        print(f"deleted {what} of {name_of(user)}{served}")


@app.command(epilog="Example: cope-lc adapters erase alice --yes")
def erase(user: User, yes: Yes = False, store: Store = None, as_json: Json = False) -> None:
    """Erase a user for good.

    Every version, the history and the keys go, damaged ones too; trainings under way are refused when they publish.
    """
    from adapter_store.errors import FormatVersionError, IntegrityError
    from cope_lc.text import name_of, print_json

    opened = open_existing(store)
    count: int | None = None
    versions = "what is there cannot be read"
    with contextlib.suppress(IntegrityError, FormatVersionError):  # damage is no reason to keep it
        count = len(opened.versions(user))
        versions = f"{count} version{'s' if count != 1 else ''}"
    if not yes:
        _confirm(f"erase {name_of(user)} ({versions}) from {place_of(opened)} for good?", "erasing")
    opened.erase_user(user)
    if as_json:
        print_json({"user_id": user, "erased": True, "versions": count})
    else:
        print(
            f"erased {name_of(user)}"
            + ("" if count != 0 else "; no adapter was there under this id")
        )


app.command(epilog=adapters_transfer.EXPORT_EXAMPLE)(adapters_transfer.export)
app.command(name="export-all", epilog=adapters_transfer.EXPORT_ALL_EXAMPLE)(
    adapters_transfer.export_all
)
app.command(name="import", epilog=adapters_transfer.IMPORT_EXAMPLE)(adapters_transfer.import_one)
app.command(name="import-all", epilog=adapters_transfer.IMPORT_ALL_EXAMPLE)(
    adapters_transfer.import_all
)
app.command(epilog=adapters_care.VERIFY_EXAMPLE)(adapters_care.verify)
app.command(epilog=adapters_care.GC_EXAMPLE)(adapters_care.gc)
app.command(name="new-key", epilog=adapters_care.NEW_KEY_EXAMPLE)(adapters_care.new_key)
app.command(name="rotate-keys", epilog=adapters_care.ROTATE_EXAMPLE)(adapters_care.rotate_keys)


def _head_facts(head: "UserHead") -> dict[str, Any]:
    return {
        "user_id": head.user_id,
        "active": head.active,
        "versions": [version.version for version in head.versions],
        "updated_at": head.updated_at.isoformat(),
    }


def _versions(store: "AdapterStore", user: str) -> list["AdapterVersion"]:
    versions = store.versions(user)
    if not versions:
        store.resolve(user)  # it says best what is not there
    return versions


def _say_active(user: str, active: "AdapterVersion", before: str | None, as_json: bool) -> None:
    from cope_lc.text import name_of, print_json

    if as_json:
        print_json({"user_id": user, "active": active.version, "before": before})
    else:
        said = (
            "was active already"
            if active.version == before
            else f"is active (before: {before or 'none'})"
        )
        print(f"{name_of(user)}: {active.version} {said}")


def _confirm(question: str, doing: str) -> None:
    """Ask on a terminal; without one there is nobody to ask."""
    from cope_lc.text import clean

    if not sys.stdin.isatty():
        raise typer.BadParameter(
            f"{doing} asks first, and there is no terminal to ask on: add --yes", param_hint="--yes"
        )
    print(f"{clean(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise typer.Abort
