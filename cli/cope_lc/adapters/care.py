"""What keeps a store sound: it is checked, leftovers are removed, master keys are renewed.

The commands `verify`, `gc`, `new-key` and `rotate-keys` of `cope-lc adapters`.
"""

import itertools
import re
from collections.abc import Iterable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cope_lc.adapters.counting import counted
from cope_lc.adapters.stored import existing_store_at, location_of
from cope_lc.options import Json, Store
from cope_lc.output import Output
from cope_lc.screen import console, say, say_skipped
from cope_lc.text import clean, name_of, plural

if TYPE_CHECKING:
    from adapter_store import Collected, Verified


def verify(
    user: Annotated[
        str | None, typer.Argument(metavar="USER", help="User id; left out: all users.")
    ] = None,
    store_url: Store = None,
    as_json: Json = False,
) -> None:
    """Read everything and check that it is what was published.

    Exit code 1 if something is damaged.
    """
    store = existing_store_at(store_url)
    numbers = itertools.count(1)
    with counted("users checked") as count:
        verified = store.verify(user, on_user=lambda _: count(next(numbers)))
    if user is not None and not verified.entries:
        store.resolve(user)  # raises the error that says what is missing
    figures = asdict(verified)
    del figures["damaged"]
    damaged = [
        {
            "user_id": report.user_id,
            "user_key": report.user_key,
            "problems": list(report.problems),
        }
        for report in verified.damaged
    ]
    facts = {"store": store.url, "ok": verified.ok, **figures, "damaged": damaged}
    Output(as_json).show(facts, lambda: _show_verified(verified, location_of(store)))
    if not verified.ok:
        raise typer.Exit(1)


def _show_verified(verified: "Verified", location: str) -> None:
    out = console()
    for report in verified.damaged:
        name = name_of(report.user_id) if report.user_id else report.user_key
        for problem in report.problems:
            say(out, f"{name}: {problem}", "red", whole=True)
    users = plural(verified.users, "user")
    size = f"{verified.bytes / 1e6:.1f} MB"
    say(out, f"{users}, {verified.versions} versions, {size} in {location}", whole=True)
    result = "all is what was published"
    if not verified.ok:
        result = f"{len(verified.damaged)} of them with damage"
    if verified.orphans:
        result += f"; {verified.orphans} unlisted versions are left for gc"
    say(out, result)


def gc(
    grace_hours: Annotated[
        float,
        typer.Option(
            "--grace-hours", metavar="H", min=0, help="Keep what is younger: it may be published."
        ),
    ] = 24,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be removed.")
    ] = False,
    store_url: Store = None,
    as_json: Json = False,
) -> None:
    """Remove what is no longer needed; safe while others write.

    This is: what killed publishers and interrupted erasures left, candidates that a fleet left a
    week ago, log entries older than a month beyond a user's newest hundred, and copies of deleted
    versions in the cache. Listed versions stay. Exit code 1 if some users cannot be read.
    """
    store = existing_store_at(store_url)
    with counted("users looked at") as count:
        collected = store.gc(grace=timedelta(hours=grace_hours), dry_run=dry_run, on_user=count)
    facts = {"store": store.url, "dry_run": dry_run, **asdict(collected)}
    Output(as_json).show(facts, lambda: _show_collected(collected, dry_run))
    if collected.problems:
        raise typer.Exit(1)


def _show_collected(collected: "Collected", dry_run: bool) -> None:
    say_skipped(collected.problems)
    parts = (
        f"{collected.versions} unlisted versions ({collected.version_bytes / 1e6:.1f} MB)",
        f"{collected.candidates} candidates that no run came back for",
        f"{collected.entries} log entries",
        f"{collected.keys} keys",
        f"{collected.unfinished_files} unfinished files",
        f"{collected.cached_versions} copies in the cache",
    )
    verb = "would remove" if dry_run else "removed"
    print(f"{verb} {', '.join(parts)}; {plural(collected.users, 'user')}")


def _check_name(value: str | None) -> str | None:
    from adapter_store.keys import is_key_name

    if value is not None and not is_key_name(value):
        raise typer.BadParameter(
            f"{value!r} is not a key name: give 1 to 64 letters, digits, dots, dashes and "
            "underscores"
        )
    return value


def new_key(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="Key file; created if it does not exist, for you alone to read."
        ),
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

    It becomes the first key of the file and wraps what is new; older keys stay. A store that is
    created while COPE_STORE_KEY_FILE names the file is encrypted.
    """
    from adapter_store import FileKeys

    path = file.expanduser()
    try:
        if path.exists():
            keys = FileKeys(path)
            keys.add(name or _next_name(keys.names))
        else:
            keys = FileKeys.create(path, name or "key-1")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--name") from None
    lines = [
        f"{keys.key_id} wraps what is new; keep {clean(str(path))} safe: "
        "without it an encrypted store is lost"
    ]
    if len(keys.names) > 1:
        lines.append("then, for each store encrypted with it: cope-lc adapters rotate-keys")
    facts = {"file": str(path), "key": keys.key_id, "keys": keys.names}
    Output(as_json).show(facts, "\n".join(lines))


def _next_name(names: Iterable[str]) -> str:
    """Return the name after the highest: older keys may be destroyed, or have other names."""
    highest = 0
    for name in names:
        match = re.fullmatch(r"key-([0-9]{1,9})", name)
        if match:
            highest = max(highest, int(match[1]))
    return f"key-{highest + 1}"


def rotate_keys(store_url: Store = None, as_json: Json = False) -> None:
    """Wrap all keys with the newest master key.

    The newest is the one that new-key made last. Afterwards the older master keys can be destroyed:
    remove their lines from the key file.
    """
    store = existing_store_at(store_url)
    with counted("users") as count:
        num_rewrapped = store.rotate_keys(on_user=count)
    facts = {"store": store.url, "rewrapped": num_rewrapped}
    Output(as_json).show(
        facts, f"{num_rewrapped} keys wrapped anew; none needs an older master key now"
    )
