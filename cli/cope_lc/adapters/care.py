"""``cope-lc adapters verify``, ``gc`` and the keys: what keeps a store sound."""

import itertools
import re
from collections.abc import Iterable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from cope_lc.options import Json, Store

VERIFY_EXAMPLE = "Example: cope-lc adapters verify"
GC_EXAMPLE = "Example: cope-lc adapters gc --dry-run"
NEW_KEY_EXAMPLE = (
    "Example: cope-lc adapters new-key ~/.cope-keys; export COPE_STORE_KEY_FILE=~/.cope-keys"
)
ROTATE_EXAMPLE = (
    "Example: cope-lc adapters new-key ~/.cope-keys --name 2027; cope-lc adapters rotate-keys"
)


def verify(
    user: Annotated[
        str | None, typer.Argument(metavar="USER", help="User id; left out: all users.")
    ] = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Read everything and check that it is what was published.

    Exit code 1 where something is damaged.
    """
    from cope_lc.adapters.stored import open_existing, place_of
    from cope_lc.progress import counted
    from cope_lc.screen import console, say
    from cope_lc.text import name_of, print_json

    opened = open_existing(store)
    with counted("users checked") as count:
        numbers = itertools.count(1)
        found = opened.verify(user, on_user=lambda _: count(next(numbers)))
    if user is not None and not found.entries:
        opened.resolve(user)  # it says best what is not there
    if as_json:
        figures = {name: value for name, value in asdict(found).items() if name != "damaged"}
        damaged = [
            {"user_id": r.user_id, "user_key": r.user_key, "problems": list(r.problems)}
            for r in found.damaged
        ]
        print_json({"store": opened.url, "ok": found.ok, **figures, "damaged": damaged})
    else:
        out = console()
        for report in found.damaged:
            for problem in report.problems:
                say(
                    out,
                    f"{name_of(report.user_id) if report.user_id else report.user_key}: {problem}",
                    "red",
                    whole=True,
                )
        users = f"{found.users} user{'s' if found.users != 1 else ''}"
        say(
            out,
            f"{users}, {found.versions} versions, {found.bytes / 1e6:.1f} MB in {place_of(opened)}",
            whole=True,
        )
        said = (
            "all is what was published" if found.ok else f"{len(found.damaged)} of them with damage"
        )
        say(
            out,
            said
            + (f"; {found.orphans} unlisted versions are left for gc" if found.orphans else ""),
        )
    if not found.ok:
        raise typer.Exit(1)


def gc(
    grace_hours: Annotated[
        float,
        typer.Option(
            "--grace-hours", metavar="H", min=0, help="What is younger may still be published."
        ),
    ] = 24,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Remove what nobody needs; safe beside writers.

    That is what killed publishers and interrupted erasures left, log entries older than a month beyond a user's newest
    hundred, and copies of deleted versions in the cache. Nothing that is listed is touched.
    """
    from cope_lc.adapters.stored import open_existing
    from cope_lc.progress import counted
    from cope_lc.screen import say_passed_over
    from cope_lc.text import print_json

    opened = open_existing(store)
    with counted("users looked at") as count:
        done = opened.gc(grace=timedelta(hours=grace_hours), dry_run=dry_run, on_user=count)
    if as_json:
        print_json({"store": opened.url, "dry_run": dry_run, **asdict(done)})
    else:
        say_passed_over(done.problems)
        print(
            f"{'would remove' if dry_run else 'removed'} {done.versions} unlisted versions "
            f"({done.version_bytes / 1e6:.1f} MB), {done.entries} log entries, {done.keys} keys, "
            f"{done.unfinished_files} unfinished files, {done.cached_versions} copies in the cache; {done.users} users"
        )
    if done.problems:
        raise typer.Exit(1)


def _check_name(value: str | None) -> str | None:
    from adapter_store.keys import is_key_name

    if value is not None and not is_key_name(value):
        raise typer.BadParameter(
            f"{value!r} is no name: give 1 to 64 letters, digits, dots, dashes and underscores"
        )
    return value


def new_key(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Made where it is not there; for you only.")
    ],
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="NAME",
            callback=_check_name,
            help="Letters and digits. Default: key-1, key-2 and so on.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a master key for an encrypted store.

    It stands in front of those that the file holds. A store that is made while COPE_STORE_KEY_FILE names the file is
    encrypted.
    """
    from adapter_store import FileKeys
    from cope_lc.text import clean, print_json

    path = file.expanduser()
    try:
        if path.exists():
            keys = FileKeys(path)
            keys.add(name or _next_name(keys.names))
        else:
            keys = FileKeys.create(path, name or "key-1")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--name") from None
    if as_json:
        print_json({"file": str(path), "key": keys.key_id, "keys": keys.names})
    else:
        print(
            f"{keys.key_id} wraps what is new; keep {clean(str(path))} safe: without it an encrypted store is lost"
        )
        if len(keys.names) > 1:
            print("then, for each store that is encrypted with it: cope-lc adapters rotate-keys")


def _next_name(names: Iterable[str]) -> str:
    """The name after the highest: older keys may have been destroyed, or have other names."""
    numbers = (
        int(found[1]) for name in names if (found := re.fullmatch(r"key-([0-9]{1,9})", name))
    )
    return f"key-{max(numbers, default=0) + 1}"


def rotate_keys(store: Store = None, as_json: Json = False) -> None:
    """Wrap all keys with the newest master key.

    Afterwards the older master keys can be destroyed: take their lines out of the key file.
    """
    from cope_lc.adapters.stored import open_existing
    from cope_lc.progress import counted
    from cope_lc.text import print_json

    opened = open_existing(store)
    with counted("users") as count:
        rewrapped = opened.rotate_keys(on_user=count)
    if as_json:
        print_json({"store": opened.url, "rewrapped": rewrapped})
    else:
        print(f"{rewrapped} keys wrapped anew; none needs an older master key now")
