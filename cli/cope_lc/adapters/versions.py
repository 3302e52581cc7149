"""Which users a store has, and which version of a user's adapter is served.

The commands `list`, `show`, `activate`, `rollback`, `delete` and `erase` of `cope-lc adapters`.
"""

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from cope_lc.adapters.stored import (
    existing_store_at,
    history_facts,
    local_time,
    location_of,
    store_at,
    user_facts,
    version_facts,
)
from cope_lc.adapters.view import chart_of, history_table, version_table
from cope_lc.options import Json, Limit, Reason, Store, UserId, VersionId, Yes
from cope_lc.output import Output
from cope_lc.screen import cell, confirm, console, say, say_skipped, table
from cope_lc.text import name_of, plural

if TYPE_CHECKING:
    from adapter_store import AdapterStore, AdapterVersion, HistoryEntry, UserHead


def list_users(
    limit: Limit = 1000,
    cursor: Annotated[
        str | None,
        typer.Option("--cursor", metavar="C", help="Go on after the page that printed it."),
    ] = None,
    store_url: Store = None,
    as_json: Json = False,
) -> None:
    """List the users of a store, page by page.

    Exit code 1 if some cannot be read; all others are listed.
    """
    store = store_at(store_url)
    problems: list[str] = []
    users, next_cursor = store.list_users(
        cursor, limit=limit, on_problem=lambda error: problems.append(str(error))
    )
    users = sorted(users, key=lambda user: user.user_id)
    facts = {"store": store.url, "users": [*map(user_facts, users)], "problems": problems}
    if next_cursor is not None:
        facts["next"] = next_cursor

    def show_page() -> None:
        say_skipped(problems)
        is_whole = cursor is None and next_cursor is None
        if is_whole and not users and not problems:
            hint = "add one with: cope-lc personalize FILE --user ID"
            say(console(), f"no users in {location_of(store)}; {hint}", whole=True)
        else:
            _show_users(users, location_of(store), is_whole)
        if next_cursor is not None:
            say(console(), f"more: the same command with --cursor {next_cursor}", whole=True)

    Output(as_json).show(facts, show_page)
    if problems:
        raise typer.Exit(1)


def _show_users(users: list["UserHead"], location: str, is_whole: bool) -> None:
    columns = ("user", "active version", "versions", "updated")
    rows = table(*columns, right=("versions",), whole=("active version", "updated"))
    for user in users:
        num_versions = str(len(user.versions))
        updated = local_time(user.updated_at)
        rows.add_row(cell(name_of(user.user_id)), user.active or "none", num_versions, updated)
    out = console()
    out.print(rows)
    where = f"in {location}" if is_whole else f"of those in {location}"
    say(out, f"\n{plural(len(users), 'user')} {where}", "dim", whole=True)


def show(
    user: UserId,
    limit: Annotated[
        int,
        typer.Option("--limit", metavar="N", min=1, help="At most this many changes of history."),
    ] = 20,
    store_url: Store = None,
    as_json: Json = False,
) -> None:
    """Show a user's versions, how good they are, and the history.

    ● marks the active version. The history says which version was active since when, and why.
    """
    store = store_at(store_url)
    versions, active = store.versions(user), store.active(user)
    history = store.history(user, limit=limit)
    if not history:
        store.resolve(user)  # raises the error that says what is missing
    facts = {
        "store": store.url,
        "user_id": user,
        "active": active,
        "versions": [
            {**version_facts(version), "active": version.version == active} for version in versions
        ],
        "history": [history_facts(change) for change in history],
    }

    def show_user() -> None:
        say(console(), f"{name_of(user)} in {location_of(store)}\n", whole=True)
        _show_versions(versions, active, history)
        if not versions:
            say(console(), "\nno version is left")
        elif active is None:
            command = f"cope-lc adapters activate {name_of(user)} VERSION"
            say(console(), f"\nnone is active: {command}", whole=True)

    Output(as_json).show(facts, show_user)


def _show_versions(
    versions: list["AdapterVersion"], active: str | None, history: list["HistoryEntry"]
) -> None:
    out = console()
    if versions:
        out.print(version_table(versions, active))
    chart = chart_of(versions, active)
    if chart is not None:
        say(out, "held-out NLL against the base's, by version", "dim")
        out.print(chart)
    say(out, "\nhistory", "dim")
    out.print(history_table(history))


def activate(
    user: UserId,
    version: VersionId,
    reason: Reason = "",
    store_url: Store = None,
    as_json: Json = False,
) -> None:
    """Serve another version of a user's adapter."""
    store = store_at(store_url)
    before = store.active(user)
    after = store.activate(user, version, reason=reason)
    _show_active(user, before, after.version, Output(as_json))


def rollback(
    user: UserId, reason: Reason = "", store_url: Store = None, as_json: Json = False
) -> None:
    """Serve the previously active version again.

    Each further rollback goes back one more.
    """
    store = store_at(store_url)
    before = store.active(user)
    after = store.rollback(user, reason=reason)
    _show_active(user, before, after.version, Output(as_json))


def _show_active(user: str, before: str | None, after: str, output: Output) -> None:
    change = f"is active (before: {before or 'none'})"
    if before == after:
        change = "was active already"
    facts = {"user_id": user, "active": after, "before": before}
    output.show(facts, f"{name_of(user)}: {after} {change}")


def delete(
    user: UserId,
    version: Annotated[
        str | None,
        typer.Argument(metavar="VERSION", help="Version id; left out: every version of the user."),
    ] = None,
    yes: Yes = False,
    reason: Reason = "",
    store_url: Store = None,
    as_json: Json = False,
) -> None:
    """Delete a version, or all versions of a user.

    Deleting the active version leaves the user with none active.
    """
    store = store_at(store_url)
    versions = _versions(store, user) if version is None else [store.resolve(user, version).version]
    what = plural(len(versions), "version") if version is None else f"version {version}"
    if version is not None and version == store.active(user):
        what += ", the active one,"
    if not yes:
        confirm(f"delete {what} of {name_of(user)} from {location_of(store)}?", "deleting")
    for doomed in versions:
        store.delete_version(user, doomed, reason=reason)
    active = store.active(user)
    consequence = "" if active else "; none is active now"
    facts = {"user_id": user, "deleted": versions, "active": active}
    Output(as_json).show(facts, f"deleted {what} of {name_of(user)}{consequence}")


def _versions(store: "AdapterStore", user: str) -> list[str]:
    """Return the ids of a user's versions; raises AdapterNotFoundError where none is left."""
    versions = [version.version for version in store.versions(user)]
    if not versions:
        store.resolve(user)  # raises the error that says what is missing
    return versions


def erase(user: UserId, yes: Yes = False, store_url: Store = None, as_json: Json = False) -> None:
    """Erase a user for good.

    All versions, the history and the keys are removed, also damaged ones. A training that is under
    way is refused when it publishes.
    """
    from adapter_store.errors import FormatVersionError, IntegrityError

    store = existing_store_at(store_url)
    count: int | None = None
    versions = "what is there cannot be read"
    with contextlib.suppress(IntegrityError, FormatVersionError):  # damaged users are erased too
        count = len(store.versions(user))
        versions = plural(count, "version")
    if not yes:
        question = f"erase {name_of(user)} ({versions}) from {location_of(store)} for good?"
        confirm(question, "erasing")
    store.erase_user(user)
    note = "; no adapter was there under this id" if count == 0 else ""
    facts = {"user_id": user, "erased": True, "versions": count}
    Output(as_json).show(facts, f"erased {name_of(user)}{note}")
