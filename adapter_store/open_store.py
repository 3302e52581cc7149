"""An open store: the parts that its operations work on."""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import groupby

from adapter_store.backends.protocol import Backend
from adapter_store.blobs import Blobs
from adapter_store.facts import UserHead
from adapter_store.layout import is_version, versions_folder
from adapter_store.log import Log
from adapter_store.root import Root


@dataclass(frozen=True)
class OpenStore:
    """Backend, root, log and blobs of an open store."""

    backend: Backend
    root: Root
    log: Log
    blobs: Blobs

    def user_keys(self) -> Iterator[str]:
        """Yield the keys of all users who have anything in the store, in ascending order."""
        for user_key, _ in groupby(merge(self.log.user_keys(), self.root.vault.user_keys())):
            yield user_key

    def version_folders(self, user_key: str) -> list[str]:
        """Return the versions of a user that have a folder, listed or not."""
        names = self.backend.list_folder(versions_folder(user_key))
        return [name for name in names if is_version(name)]

    def key_for(self, head: UserHead) -> str | None:
        """Return the encryption key to seal a user's next things with, made where it has none yet.

        None where the store is not encrypted.
        """
        return head.key or self.root.vault.add(head.user_key, since_seq=head.seq)

    def drop_unused_key(self, head: UserHead, key: str | None) -> None:
        """Shred a key that `key_for(head)` made, where nothing was sealed with it in the end."""
        if key is not None and head.key is None:
            self.root.vault.remove(head.user_key, key)
