"""What can go wrong in a store, one class for each thing that a caller would do differently.

    AdapterStoreError
    ├── AdapterNotFoundError     no such user or version, or none active: publish, or serve the base
    ├── InvalidAdapterError      files, a size, a user id or an option is refused: correct it
    ├── BaseModelMismatchError   trained on another base: load that base, or personalize again
    ├── PublishConflictError     another writer changed the user: look again, then decide
    ├── UserErasedError          erased since the data was read: train on what is left, or stop
    ├── IntegrityError           what is stored is damaged: restore it, or publish again
    ├── KeyMismatchError         the store was made with another pepper or other keys: pass those
    ├── FormatVersionError       the store was written by a newer release: upgrade
    └── BackendError             the storage refused, is full or is out of reach: correct it, retry

Each message holds what was asked, what was found and what to do next.
"""

from collections.abc import Mapping


class AdapterStoreError(Exception):
    """Base of every error that a store raises on purpose."""


class AdapterNotFoundError(AdapterStoreError):
    """The user or that version of the user's adapter is not in the store, or none is active."""


class InvalidAdapterError(AdapterStoreError):
    """The files, a size, the user id or another argument cannot be accepted."""


class BaseModelMismatchError(AdapterStoreError):
    """The adapter was trained on another base model than the one that asks for it.

    `differences` maps each differing part to (what the adapter was trained on, what asks for it),
    None where a part is absent. `trained_on` is the name of the base it was trained on, if noted.
    """

    def __init__(
        self,
        message: str,
        differences: Mapping[str, tuple[str | None, str | None]] | None = None,
        trained_on: str | None = None,
    ) -> None:
        super().__init__(message)
        self.trained_on = trained_on
        self.differences = dict(differences or {})


class PublishConflictError(AdapterStoreError):
    """Another version is active than the publisher expected, or other publishers won every race."""


class UserErasedError(AdapterStoreError):
    """The user was erased after this publish began; nothing of it is kept, nothing is served."""


class IntegrityError(AdapterStoreError):
    """Something in the store is damaged, missing or not what was published."""


class KeyMismatchError(AdapterStoreError):
    """The store was made with another pepper, or with other encryption keys, than those given."""


class FormatVersionError(AdapterStoreError):
    """The store, or an entry of it, was written in a newer format than this release reads."""


class BackendError(AdapterStoreError):
    """The storage is unavailable, refused the request or cannot do what a store needs.

    `refused` is True where it is known that a write was turned down for good; otherwise it may
    land later.
    """

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


UNREADABLE = (IntegrityError, KeyMismatchError, FormatVersionError)
"""Errors that keep one user from being read, and are no reason to stop for the others."""
