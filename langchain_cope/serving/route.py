"""What a route is: method, path, what a key needs for it, and the function that answers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from langchain_cope.serving.access import Needs


@dataclass(frozen=True)
class Route:
    """One route. Ids of users are never part of its path: paths end up in logs."""

    method: str
    path: str
    needs: Needs
    endpoint: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `FastAPI.add_api_route`: what the OpenAPI document says of it."""
