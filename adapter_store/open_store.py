"""An opened store: the parts that its operations work on."""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import groupby

from adapter_store.backends.protocol import Backend
from adapter_store.blobs import Blobs
from adapter_store.facts import UserHead
from adapter_store.layout import KEYS, is_version, versions_folder
from adapter_store.log import Log
from adapter_store.root import Root


@dataclass(frozen=True)
class Opened:
    """A store whose root file was read."""

    backend: Backend
    root: Root
    log: Log
    blobs: Blobs

    def user_keys(self) -> Iterator[str]:
        """Yield the keys of all users of whom there is anything, in ascending order."""
        if self.root.vault is None:
            yield from self.log.user_keys()
            return
        for user_key, _ in groupby(merge(self.log.user_keys(), self.log.user_keys(top=KEYS))):
            yield user_key

    def version_folders(self, user_key: str) -> list[str]:
        """Return the versions of a user of which something lies there, listed or not."""
        return [
            name for name in self.backend.list_folder(versions_folder(user_key)) if is_version(name)
        ]

    def key_for(self, head: UserHead) -> str | None:
        """Return the encryption key that a user's next things are sealed with, made where there is none yet."""
        if self.root.vault is None:
            return None
        return head.key or self.root.vault.add(head.user_key, since_seq=head.seq)

    def drop_unused_key(self, head: UserHead, key: str | None) -> None:
        """Shred a key that `key_for(head)` made, where nothing was sealed with it in the end."""
        if self.root.vault is not None and key is not None and head.key is None:
            self.root.vault.remove(head.user_key, key)
