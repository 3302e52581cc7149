"""`/v1/users`: whom a key may speak as and who has a voice already."""

import asyncio
from typing import Any

from langchain_cope.serving.route import Route
from langchain_cope.serving.state import Caller, State

_MOST = 1000


async def users(caller: Caller, state: State) -> dict[str, Any]:
    """Return up to a thousand users of the store whom the key may name, in the order of ids."""
    heads, _ = await asyncio.to_thread(
        state.store.list_users, None, _MOST, on_problem=lambda _: None
    )
    names = {head.user_id: head.active is not None for head in heads}
    names |= {name: names.get(name, False) for name in caller.users.listed}
    return {
        "object": "list",
        "data": [
            {"id": name, "has_adapter": names[name]}
            for name in sorted(names)
            if name in caller.users
        ],
    }


ROUTES = (Route("GET", "/v1/users", "adapters", users),)
