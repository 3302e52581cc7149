"""`cope-lc keys`: make, list and revoke the keys of a server."""

import sys
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cope_lc.options import Json
from cope_lc.output import Output
from cope_lc.text import clean

if TYPE_CHECKING:
    from langchain_cope.serving.keys import Key
    from langchain_cope.serving.principals import Scope, Users

KeyFile = Annotated[
    Path,
    typer.Option(
        "--keys",
        metavar="FILE",
        envvar="COPE_SERVE_KEYS",
        show_envvar=False,
        help="The key file, which the server is given, too.",
    ),
]


class ScopeName(StrEnum):
    """What a key may do."""

    chat = "chat"
    logprobs = "logprobs"
    adapters = "adapters"
    history = "history"
    personalize = "personalize"
    erase = "erase"
    metrics = "metrics"


def new(
    keys: KeyFile,
    name: Annotated[
        str, typer.Option("--name", metavar="TEXT", help="What it is for; shown in lists.")
    ] = "",
    user: Annotated[
        list[str] | None,
        typer.Option(
            "--user",
            metavar="ID",
            help="A user whom it may ask for; may be given again. One alone is that user's own "
            "key, and needs not be named in requests.",
        ),
    ] = None,
    user_prefix: Annotated[
        str | None,
        typer.Option(
            "--user-prefix", metavar="TEXT", help="An app's key, for users whose ids begin so."
        ),
    ] = None,
    any_user: Annotated[
        bool, typer.Option("--any-user", help="An app's key, for any user.")
    ] = False,
    admin: Annotated[
        bool,
        typer.Option("--admin", help="An operator's key, for any user: it may not chat."),
    ] = False,
    scope: Annotated[
        list[ScopeName] | None,
        typer.Option(
            "--scope",
            metavar="SCOPE",
            help="What it may do: chat, logprobs, adapters, history, personalize, erase, metrics; "
            "may be given again. Default: all but metrics for one user's own key; chat, adapters, "
            "history and personalize for an app's.",
        ),
    ] = None,
    trusted_header: Annotated[
        bool,
        typer.Option(
            "--trusted-header", help="For a proxy whose --user-header says who is signed in."
        ),
    ] = False,
    days: Annotated[
        int | None, typer.Option("--days", metavar="N", min=1, help="It expires after so many.")
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option("--requests-per-minute", metavar="N", min=1, help="A bound of it.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None,
        typer.Option(
            "--tokens-per-minute", metavar="N", min=1, help="Of prompts and answers together."
        ),
    ] = None,
    concurrent: Annotated[
        int | None, typer.Option("--concurrent", metavar="N", min=1, help="Requests at a time.")
    ] = None,
) -> None:
    """Make a key and print it: the only time that it is shown.

    A running server knows it within a second.
    """
    from langchain_cope.serving.keys import add_key, new_key
    from langchain_cope.serving.principals import Limits

    users = _users(user or [], user_prefix, any_user=any_user or admin)
    text, key = new_key(
        name,
        _scopes(users, [each.value for each in scope or []], admin=admin),
        users,
        expires=None if days is None else datetime.now(UTC) + timedelta(days=days),
        trusted_header=trusted_header,
        limits=Limits(requests_per_minute, tokens_per_minute, concurrent),
    )
    add_key(keys, key)
    print(f"made {_line(key, None)}", file=sys.stderr)
    print(text)


def list_keys(keys: KeyFile, as_json: Json = False) -> None:
    """List the keys of a file: whose they are, what they may do, and when they were last used."""
    from langchain_cope.serving.keys import last_uses, read_keys

    used = last_uses(keys)
    found = read_keys(keys)
    facts = {"keys": [_facts(key, used.get(key.id)) for key in found]}
    Output(as_json).show(facts, "\n".join(_line(key, used.get(key.id)) for key in found))


def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `keys list` shows it.")],
    keys: KeyFile,
) -> None:
    """Revoke a key: a running server refuses it within a second. Streams under way go on."""
    from langchain_cope.serving.keys import revoke_key

    print(f"revoked {_line(revoke_key(keys, key_id), None)}", file=sys.stderr)


def _users(listed: list[str], prefix: str | None, *, any_user: bool) -> "Users":
    from langchain_cope.serving.principals import ANYBODY, Users

    if (bool(listed) + (prefix is not None) + any_user) > 1:
        raise typer.BadParameter("give one of --user, --user-prefix, --any-user and --admin")
    if "" in listed or prefix == "":
        raise typer.BadParameter("a user's id is not empty; --any-user is for all of them")
    if any_user:
        return ANYBODY
    return Users(tuple(dict.fromkeys(listed)), prefix)


def _scopes(users: "Users", named: list["Scope"], *, admin: bool) -> "frozenset[Scope]":
    from langchain_cope.serving.principals import ADMIN_SCOPES, APP_SCOPES, NOBODY, USER_SCOPES

    if admin:
        if "chat" in named or "logprobs" in named:
            raise typer.BadParameter(
                "an operator's key may not chat: to administer is not to impersonate; make another"
            )
        return frozenset(named) or ADMIN_SCOPES
    if named:
        return frozenset(named)
    if users == NOBODY:
        return frozenset({"chat"})
    return USER_SCOPES if users.only is not None else APP_SCOPES


def _facts(key: "Key", last_used: str | None) -> dict[str, object]:
    prefix = key.users.prefix
    return {
        "id": key.id,
        "name": key.name,
        "users": list(key.users.listed) if prefix is None else {"prefix": prefix},
        "scopes": list(key.scopes),
        "created": key.created,
        "expires": key.expires,
        "revoked": key.revoked,
        "last_used": last_used,
        "trusted_header": key.trusted_header,
        "limits": vars(key.limits),
    }


def _line(key: "Key", last_used: str | None) -> str:
    if key.users.prefix is not None:
        users = f"users {key.users.prefix}…" if key.users.prefix else "any user"
    else:
        users = ", ".join(key.users.listed) or "no user"
    parts = [key.id, clean(key.name), clean(users), " ".join(key.scopes)]
    dates = (("expires", key.expires), ("revoked", key.revoked), ("last used", last_used))
    parts += [f"{what} {date}" for what, date in dates if date]
    return "  ".join(part for part in parts if part)
