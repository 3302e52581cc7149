"""`/v1/users`: whom a request may speak as and who has a voice already."""

from functools import partial
from typing import Any

from fastapi import Request

from adapter_store import AdapterStore
from langchain_cope.serving.principals import Users
from langchain_cope.serving.route import Route
from langchain_cope.serving.state import Caller, State, user_of

_MOST = 1000


async def users(request: Request, caller: Caller, state: State) -> dict[str, Any]:
    """Return up to a thousand users whom the request may name, by their ids.

    That is the one of a trusted proxy's header where there is one; else those that the key lists,
    and of the store those who match its prefix.
    """
    only = user_of(request, {})
    named = caller.users if only is None else Users((only,))
    has_adapter = await state.storing.run(caller.id, partial(_known, state.store, named))
    return {
        "object": "list",
        "data": [{"id": name, "has_adapter": has_adapter[name]} for name in sorted(has_adapter)],
    }


def _known(store: AdapterStore, named: Users) -> dict[str, bool]:
    """Return whether they have an adapter in use, of the users listed and of the store's."""
    found = {name: store.active(name) is not None for name in named.listed[:_MOST]}
    cursor, is_last = None, named.prefix is None
    while not is_last and len(found) < _MOST:
        heads, cursor = store.list_users(cursor, _MOST, on_problem=lambda _: None)
        mine = [head for head in heads if head.user_id in named]
        found |= {head.user_id: head.active is not None for head in mine[: _MOST - len(found)]}
        is_last = cursor is None
    return found


ROUTES = (Route("GET", "/v1/users", "adapters", users),)
