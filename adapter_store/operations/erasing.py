"""A user erased: from the first step on nothing is served, after the last nothing is left.

The entry comes first; it fences whatever began before. Then the user's keys are shredded, the
versions' files removed, and the older entries, strictly in ascending order, which is what warm
readers rely on; then what this machine keeps. Killed in between, a second call or a garbage
collection does the rest.
"""

from os import urandom

from adapter_store.facts import UserHead
from adapter_store.log import now
from adapter_store.open_store import OpenStore


def erase(store: OpenStore, user_key: str) -> None:
    """Erase a user, known or not: what an unknown one has in training is refused too."""
    doomed: list[str] = []

    def erased(seq: int, parent: str) -> UserHead:
        # Listed between the entries before and this one: what was committed is in it, and of what
        # is written by publishers that began later, to which this entry will be the past, nothing.
        doomed[:] = store.version_folders(user_key)
        return UserHead(
            user_id="",
            user_key=user_key,
            seq=seq,
            commit=urandom(16).hex(),
            parent=parent,
            updated_at=now(),
            operation="erase",
            operation_version="",
            active=None,
            versions=(),
            erased_seq=seq,
        )

    entry = store.log.commit_blind(user_key, erased)
    for key in store.root.vault.made_before(user_key, entry.seq, or_damaged=True):
        store.root.vault.remove(user_key, key)
    for version in doomed:
        store.blobs.remove_folder(user_key, version)
    for seq in store.log.seqs(user_key):
        if seq < entry.seq:
            store.log.remove(user_key, seq)
    store.blobs.forget(user_key)
