"""Who asks: the user of a call, and of an agent's run."""

from contextvars import ContextVar

from adapter_store import AdapterVersion

user_of_run: ContextVar[tuple[str | None] | None] = ContextVar("user_of_run", default=None)
"""The user that `CoPeUserMiddleware` found in the run's context, as a tuple of one; None outside of such a run."""


class PinnedUser:
    """The user of one call and the adapter version that answers, fixed before anything else happens."""

    def __init__(
        self, user_id: str | None, version: AdapterVersion | None, shown: str | None
    ) -> None:
        self.user_id = user_id
        self.version = version
        self.shown = shown
        """The user as traces may show it."""

    @property
    def key(self) -> tuple[str | None, ...]:
        """For caches: two users, or two versions of one, never share it."""
        return (
            self.user_id,
            getattr(self.version, "version", None),
            getattr(self.version, "digest", None),
        )

    def to_dict(self) -> dict[str, str | None]:
        """What tracers write down of it."""
        return {"user_id": self.shown, "adapter_version": getattr(self.version, "version", None)}

    def __repr__(self) -> str:
        return f"PinnedUser({self.to_dict()})"
