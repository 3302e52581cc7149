"""Who asks, and as whom they may speak.

The key decides whose voices it may ask for; a request only chooses among those. A name in the
request is an offer (`user`, the end of `model`, one header of trusted proxies), never a proof.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from langchain_cope.serving.errors import ApiError

Scope = Literal["chat", "logprobs", "adapters", "history", "personalize", "erase", "metrics"]
SCOPES: tuple[Scope, ...] = (
    "chat", "logprobs", "adapters", "history", "personalize", "erase", "metrics",
)  # fmt: skip
USER_SCOPES: frozenset[Scope] = frozenset(SCOPES) - {"metrics"}
"""What a person's own key may do."""
APP_SCOPES: frozenset[Scope] = frozenset({"chat", "adapters", "history", "personalize"})
"""What an app's key may do: no `logprobs`, which would tell what is in its users' histories."""
ADMIN_SCOPES: frozenset[Scope] = frozenset({"adapters", "personalize", "erase", "metrics"})
"""What an operator's key may do: no `chat`, since to administer is not to impersonate."""
MAX_USER_BYTES = 512


@dataclass(frozen=True)
class Users:
    """The users whom a key may name."""

    listed: tuple[str, ...] = ()
    prefix: str | None = None
    """Every user whose id begins so; the empty prefix is any user."""

    def __contains__(self, user_id: object) -> bool:
        if not isinstance(user_id, str):
            return False
        if user_id in self.listed:
            return True
        return self.prefix is not None and user_id.startswith(self.prefix)

    @property
    def only(self) -> str | None:
        """The user where there is just one."""
        return self.listed[0] if self.prefix is None and len(self.listed) == 1 else None


NOBODY, ANYBODY = Users(), Users(prefix="")


@dataclass(frozen=True)
class Limits:
    """Bounds of one key; None: none of its own."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Of prompts and answers."""
    concurrent: int | None = None
    """Requests at a time; n answers to one prompt count n times."""


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Principal:
    """Who asks: what a valid key stands for."""

    id: str
    """The key's public part; in logs, never in metrics."""
    scopes: frozenset[Scope]
    users: Users = NOBODY
    trusted_header: bool = False
    """Whether the server's user header counts: for proxies that know who is signed in."""
    limits: Limits = NO_LIMITS

    def require(self, scope: Scope) -> None:
        """Raise ApiError (403) where the key has not this scope."""
        if scope not in self.scopes:
            raise ApiError(
                403, "scope_missing", f"this key may not do that: it lacks the scope {scope!r}"
            )


def resolve_user(
    principal: Principal, offers: Mapping[str, object], *, required: bool = False
) -> str | None:
    """Return the user whom the request is about; None is the base alone.

    Nothing is looked up: known and unknown users are refused alike.

    Args:
        principal: who asks.
        offers: what names a user in the request, by the name of its place. What is absent is left
            out; None is a wrong name.
        required: whether there has to be one.

    Raises:
        ApiError: 400 for a name that is none, for two that differ, or where one is missing;
            403 for a user whom the key may not name.
    """
    names = {place: _checked(place, name) for place, name in offers.items()}
    if len(set(names.values())) > 1:
        places = " and ".join(names)
        raise ApiError(400, "conflicting_user", f"{places} name different users: name one")
    for place, name in names.items():
        if name not in principal.users:
            raise ApiError(
                403, "user_not_allowed", "this key may not ask for that user", param=place
            )
        return name
    if principal.users.only is None and required:
        raise ApiError(400, "user_required", "no user was named: give `user`", param="user")
    return principal.users.only


def _checked(place: str, name: object) -> str:
    if isinstance(name, str) and name and "\0" not in name:  # as the store has it
        try:
            if len(name.encode()) <= MAX_USER_BYTES:
                return name
        except UnicodeEncodeError:  # half of a surrogate pair
            pass
    raise ApiError(
        400,
        "invalid_user",
        f"a user is a string of 1 to {MAX_USER_BYTES} bytes without NUL; leave it out to name none",
        param=place,
    )
