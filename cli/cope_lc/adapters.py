"""``cope-lc adapters``: what is in a store, and which version of a user's adapter is served."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cope_lc.options import Json, Store
from cope_lc.stored import all_users, local_time, num_bytes, place_of, version_facts

if TYPE_CHECKING:
    from adapter_store import AdapterStore, AdapterVersion, UserHead

app = typer.Typer(
    help="List, show, activate, export and delete adapters in a store.",
    epilog="Example: cope-lc adapters show alice",
    no_args_is_help=True,
    rich_markup_mode=None,
)
User = Annotated[str, typer.Argument(metavar="USER", help="User id.")]
Version = Annotated[str, typer.Argument(metavar="VERSION", help="Version id, as `adapters show` lists it.")]


@app.command(name="list", epilog="Example: cope-lc adapters list --store ~/adapters")
def list_users(store: Store = None, as_json: Json = False) -> None:
    """List the users of a store."""
    from cope_lc.screen import cell, console, say, table
    from cope_lc.text import name_of, print_json
    from langchain_cope.stores import open_store

    opened = open_store(store)
    heads = sorted(all_users(opened), key=lambda head: head.user_id)
    if as_json:
        print_json({"store": opened.url, "users": [_head_facts(head) for head in heads]})
        return
    out = console()
    if not heads:
        say(out, f"no users in {place_of(opened)}; add one with: cope-lc personalize FILE --user ID", whole=True)
        return
    rows = table(
        "user", "active version", "versions", "updated", right=("versions",), whole=("active version", "updated")
    )
    for head in heads:
        count = str(len(head.versions))
        rows.add_row(cell(name_of(head.user_id)), head.active or "none", count, local_time(head.updated_at))
    out.print(rows)
    say(out, f"\n{len(heads)} user{'s' if len(heads) != 1 else ''} in {place_of(opened)}", "dim", whole=True)


@app.command(epilog="Example: cope-lc adapters show alice")
def show(user: User, store: Store = None, as_json: Json = False) -> None:
    """Show a user's versions with their metrics; ● marks the active one."""
    from cope_lc.screen import console, say
    from cope_lc.text import name_of, print_json
    from langchain_cope.stores import open_store

    opened = open_store(store)
    versions = _versions(opened, user)
    active = opened.active(user)
    if as_json:
        facts = [version_facts(version) | {"active": version.version == active} for version in versions]
        print_json({"store": opened.url, "user_id": user, "active": active, "versions": facts})
        return
    out = console()
    say(out, f"{name_of(user)} in {place_of(opened)}\n", whole=True)
    out.print(_version_table(versions, active))
    if active is None:
        say(out, "\nnone is active: cope-lc adapters activate USER VERSION")


@app.command(epilog="Example: cope-lc adapters activate alice 20260131T235959Z-0123456789ab")
def activate(user: User, version: Version, store: Store = None, as_json: Json = False) -> None:
    """Serve another version of a user's adapter."""
    from cope_lc.text import name_of, print_json
    from langchain_cope.stores import open_store

    opened = open_store(store)
    before = opened.active(user)
    active = opened.activate(user, version)
    if as_json:
        print_json({"user_id": user, "active": active.version, "before": before})
    else:
        print(f"{name_of(user)}: {active.version} is active (before: {before or 'none'})")


@app.command(epilog="Example: cope-lc adapters export alice ./alice-adapter")
def export(
    user: User,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New or empty folder.")],
    version: Annotated[
        str | None, typer.Option("--version", metavar="VERSION", help="Default: the active one.")
    ] = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Write a version as a plain peft folder, which peft and vLLM read as it is."""
    from cope_lc.text import clean, print_json
    from langchain_cope.stores import open_store

    opened = open_store(store)
    found = opened.resolve(user, version)
    written = opened.export_peft(user, folder, found.version)
    if as_json:
        print_json({"user_id": user, "version": found.version, "folder": str(written)})
    else:
        print(f"{found.version} written to {clean(str(written))}")


@app.command(epilog="Example: cope-lc adapters delete alice 20260131T235959Z-0123456789ab")
def delete(
    user: User,
    version: Annotated[
        str | None, typer.Argument(metavar="VERSION", help="Version id; left out: every version of the user.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Delete a version, or all versions of a user. Deleting the active one leaves the user with none active."""
    from cope_lc.text import name_of, print_json
    from langchain_cope.stores import open_store

    opened = open_store(store)
    doomed = [opened.resolve(user, version)] if version is not None else _versions(opened, user)
    active = opened.active(user)
    what = f"version {version}" if version is not None else f"{len(doomed)} version{'s' if len(doomed) > 1 else ''}"
    if version is not None and version == active:
        what += ", the active one,"
    if not yes:
        _confirm(f"delete {what} of {name_of(user)} from {place_of(opened)}?")
    for found in doomed:
        opened.delete_version(user, found.version)
    if as_json:
        left = opened.active(user)
        print_json({"user_id": user, "deleted": [found.version for found in doomed], "active": left})
    else:
        print(f"deleted {what} of {name_of(user)}")


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


def _version_table(versions: list["AdapterVersion"], active: str | None) -> Any:
    from cope_lc.screen import cell, table

    columns = ("", "version", "created", "NLL\nbase → dpo", "ROUGE-L\nbase → cope")
    rows = table(*columns, whole=("", "created"), right=columns[3:])
    rows.columns[1].min_width = max(len(version.version) for version in versions)  # a model's path may fold, an id not
    for version in reversed(versions):
        metrics = version.metrics
        strengths = f"α {_plain(version.alpha)}  τ {_plain(version.tau)}"
        model = cell(f"{version.version}\n  base {version.base.get('model', '?')}, {num_bytes(version) / 1e6:.1f} MB\n")
        rows.add_row(
            cell("●" if version.version == active else "", "green"),
            model,
            cell(f"{local_time(version.created_at)}\n{strengths}"),
            _change(metrics, "nll", "dpo"),
            _change(metrics, "rougeL", "cope"),
        )
    return rows


def _change(metrics: dict[str, Any], name: str, way: str) -> str:
    from cope_lc.screen import number

    found = [row.get(name) if isinstance(row := metrics.get(key), dict) else None for key in ("base", way)]
    return " → ".join(number(value) for value in found)


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def _confirm(question: str) -> None:
    """Ask on a terminal; without one there is nobody to ask."""
    from cope_lc.text import clean

    if not sys.stdin.isatty():
        raise typer.BadParameter(
            "deleting asks first, and there is no terminal to ask on: add --yes", param_hint="--yes"
        )
    print(f"{clean(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise typer.Abort
