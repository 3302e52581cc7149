"""`/v1/models`: the base, and the users whom a key names one by one."""

from typing import Any

from langchain_cope.serving.errors import ApiError
from langchain_cope.serving.principals import Principal
from langchain_cope.serving.route import Route
from langchain_cope.serving.state import Caller, State


async def models(caller: Caller, state: State) -> dict[str, Any]:
    """Return the models that this key may ask for.

    Users that it may name by a prefix alone are not listed: nobody learns from it who is there.
    """
    return {"object": "list", "data": [_model(name) for name in _names(caller, state)]}


async def model(name: str, caller: Caller, state: State) -> dict[str, Any]:
    """Return one of them."""
    if name not in _names(caller, state):
        raise ApiError(404, "model_not_found", "this key has no such model", param="model")
    return _model(name)


def _names(caller: Principal, state: State) -> list[str]:
    base = state.settings.name
    return [base, *(f"{base}:{user}" for user in caller.users.listed)]


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "langchain-cope"}


ROUTES = (
    Route("GET", "/v1/models", "key", models),
    Route("GET", "/v1/models/{name:path}", "key", model),
)
