"""What can go wrong in a store, one class for each thing that a caller would do differently.

    AdapterStoreError
    ├── AdapterNotFoundError      no such user or version, or none active: publish, activate, or serve the base
    ├── InvalidAdapterError       what was given is refused (files, sizes, user id, options): mend it and call again
    ├── BaseModelMismatchError    the adapter belongs to another base: load that base, or personalize again
    ├── PublishConflictError      somebody else changed the user in between: look again, then decide
    ├── UserErasedError           the user was erased after that data was read: train on what the user has now, or stop
    ├── IntegrityError            what is stored is damaged: restore it, or publish again
    ├── KeyMismatchError          the store was made with another pepper or other keys: pass those
    ├── FormatVersionError        the store was written by a newer release: upgrade
    └── BackendError              the storage refused, is full or cannot be reached: mend that, then retry

Each message holds what was asked, what was found and what to do next.
"""

from collections.abc import Mapping


class AdapterStoreError(Exception):
    """Base of every error that a store raises on purpose."""


class AdapterNotFoundError(AdapterStoreError):
    """The user, or that version of the user's adapter, is not in the store, or no version is active."""


class InvalidAdapterError(AdapterStoreError):
    """The files, a size, the user id or another argument cannot be accepted."""


class BaseModelMismatchError(AdapterStoreError):
    """The adapter was trained on another base model than the one that asks for it.

    `differences` maps each differing part to (what the adapter was trained on, what asks for it), None where absent.
    """

    def __init__(
        self, message: str, differences: Mapping[str, tuple[str | None, str | None]] | None = None
    ) -> None:
        super().__init__(message)
        self.differences = dict(differences or {})


class PublishConflictError(AdapterStoreError):
    """The active version is not the one that the publisher expected, or other publishers won every race."""


class UserErasedError(AdapterStoreError):
    """What was to be published began before the user was erased; nothing of it is kept, and nothing of it is served."""


class IntegrityError(AdapterStoreError):
    """Something in the store is damaged, missing or not what was published."""


class KeyMismatchError(AdapterStoreError):
    """The store was made with another pepper, or with other encryption keys, than those at hand."""


class FormatVersionError(AdapterStoreError):
    """The store, or an entry of it, was written in a newer format than this release reads."""


class BackendError(AdapterStoreError):
    """The storage behind the store is unavailable, refused the request or cannot do what a store needs.

    `refused` is True where it is known that a write was turned down for good; otherwise it may land later.
    """

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


UNREADABLE = (IntegrityError, KeyMismatchError, FormatVersionError)
"""What keeps one user from being read, and is no reason to stop for the others."""
