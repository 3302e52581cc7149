"""The user of a call: who is answered, by which adapter version, on which engine.

`user_of_call` decides who is answered and `find_version` what answers. `PinnedUser` holds both for
the rest of the call, so that nothing is resolved twice. Knows no LangChain.
"""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

from adapter_store import AdapterStore, AdapterVersion
from adapter_store.errors import AdapterNotFoundError, BaseModelMismatchError
from langchain_cope.errors import InputError
from langchain_cope.history.items import key_of

if TYPE_CHECKING:
    from langchain_cope.engine import AdapterSource, Engine
    from langchain_cope.history.items import Item

PINNED = "pinned_user"
"""The keyword that carries a call's `PinnedUser` through LangChain."""
USER_OPTIONS = ("user_id", "adapter_version")
"""The keywords of a call that its `PinnedUser` replaces."""

user_of_run: ContextVar[tuple[str | None] | None] = ContextVar("user_of_run", default=None)
"""The user in the context of an agent's run, as a tuple of one; None outside of such a run.

`CoPeUserMiddleware` sets it.
"""


def user_of_call(
    options: Mapping[str, Any], configurable: Mapping[str, Any], default: str | None
) -> str | None:
    """Return the user who is answered; None is the base alone.

    Args:
        options: keywords of the call.
        configurable: the call's `config["configurable"]`.
        default: the user of the model's constructor.

    Raises:
        InputError: the user is neither None nor a string that is not empty.
    """
    user_in_run = user_of_run.get()
    if "user_id" in options:
        return checked_user(options["user_id"])
    if user_in_run is not None:
        return checked_user(user_in_run[0])
    if "user_id" in configurable:
        return checked_user(configurable["user_id"])
    return checked_user(default)


def checked_user(user_id: object) -> str | None:
    """Return `user_id`. Raises InputError unless it is None or a string that is not empty."""
    if user_id is None:
        return None
    if not isinstance(user_id, str) or not user_id:
        raise InputError(
            "user_id must be a string that is not empty, or None for the base alone, "
            f"not {user_id!r}"
        )
    return user_id


def find_version(
    store: AdapterStore,
    user_id: str,
    version: str | None,
    *,
    base: dict[str, str],
    required: bool,
) -> AdapterVersion | None:
    """Return the user's adapter version, or None for a user without one.

    Args:
        store: where it is published.
        user_id: the user.
        version: None for the active version.
        base: the fingerprint of the base that it has to fit.
        required: whether a user without an adapter is an error.

    Raises:
        AdapterNotFoundError: there is no such version, or none at all where one is `required`.
        BaseModelMismatchError: it was trained on another base.
        AdapterStoreError: the store or the version cannot be trusted.
    """
    try:
        return store.resolve(user_id, version, base=base)
    except BaseModelMismatchError as error:
        if error.trained_on != "starter":
            raise
        raise BaseModelMismatchError(
            f"{error} (`starter` was the default base before `smollm2`)",
            error.differences,
            error.trained_on,
        ) from error
    except AdapterNotFoundError:
        if required or version is not None:
            raise
        return None


class PinnedUser:
    """The user of one call with the version that answers, fixed before anything else happens.

    It travels among a call's keywords. A tracer that writes these down would take a dataclass
    apart: this is a plain class, which shows `to_dict` alone; copying it never copies the engine.
    """

    def __init__(
        self,
        engine: "Engine",
        store: AdapterStore | None,
        user_id: str | None,
        version: AdapterVersion | None,
        shown: str | None,
        items: "Sequence[Item]" = (),
    ) -> None:
        """Take what was resolved.

        Args:
            engine: the engine of the base that answers.
            store: where `version` is fetched from.
            user_id: None for the base alone.
            version: None where the base alone answers.
            shown: the user as traces may show it.
            items: what the user wrote before, where it is to be shown to the user's model.
        """
        self.engine = engine
        self.user_id = user_id
        self.version = version
        self.shown = shown
        self.items = items
        self._store = store

    @property
    def version_id(self) -> str | None:
        """The name of the version within the user's versions."""
        return None if self.version is None else self.version.version

    @property
    def digest(self) -> str | None:
        """The digest of the version's files."""
        return None if self.version is None else self.version.digest

    @property
    def key(self) -> tuple[str | None, ...]:
        """A cache key, which two users, versions of one user, or histories never share."""
        key = (self.user_id, self.version_id, self.digest)
        return (*key, key_of(self.items)) if self.items else key

    @property
    def adapter(self) -> "AdapterSource | None":
        """The version, to be fetched and verified when no slot of the engine holds it."""
        if self._store is None or self.version is None:
            return None
        from langchain_cope.engine import AdapterSource

        return AdapterSource(
            self.version.name,
            partial(self._store.fetch_dir, self.version),
            label=f"{self.version_id} of " + (f"user {self.shown!r}" if self.shown else "its user"),
        )

    def relevance(self, turns: Sequence[Mapping[str, Any]]) -> float | None:
        """Return how much a conversation's questions are like those of the history, 0 to 1.

        None where the version says nothing of its prompts. Raises ModelError where what it says
        cannot be used.
        """
        stored = None if self.version is None else self.version.metadata.get("prompts")
        if stored is None:
            return None
        from langchain_cope.engine import PromptProfile, questions_of

        everyday = self.engine.base.everyday
        profile = PromptProfile.from_stored(stored, everyday)
        return None if profile is None else profile.relevance(everyday, questions_of(turns))

    def to_dict(self) -> dict[str, str | None]:
        """Return what tracers may write down."""
        return {"user_id": self.shown, "adapter_version": self.version_id}

    def __repr__(self) -> str:
        return f"PinnedUser({self.to_dict()})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "PinnedUser":
        return self
