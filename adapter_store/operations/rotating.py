"""Rotation: the keys of an encrypted store wrapped with the newest master key."""

from contextlib import suppress

from adapter_store.errors import UNREADABLE, AdapterStoreError, KeyMismatchError
from adapter_store.open_store import OpenStore
from adapter_store.vault import STORE


def rotate_pepper(store: OpenStore, problems: list[AdapterStoreError]) -> int:
    """Wrap the store's pepper with the newest master key; return how many keys that was.

    What a killed maker of the store left is not touched. KeyMismatchError where the store is not
    encrypted.
    """
    if not store.root.vault.is_encrypted:
        raise KeyMismatchError("this store has no keys to rotate: it was made without encryption")
    pepper_key = store.root.pepper_key
    return store.root.vault.rewrap(STORE, problems, () if pepper_key is None else (pepper_key,))


def rotate_user_keys(store: OpenStore, user_key: str, problems: list[AdapterStoreError]) -> int:
    """Wrap a user's keys with the newest master key; return how many were not yet."""
    count = store.root.vault.rewrap(user_key, problems)
    if count:
        # An erasure in between may have missed the copy just written; it has left its entry, so
        # look for that now.
        with suppress(*UNREADABLE):
            head = store.log.head_or_new(user_key)
            for key in store.root.vault.made_before(user_key, head.erased_seq):
                store.root.vault.remove(user_key, key)
    return count
