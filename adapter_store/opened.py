"""An opened store: the parts that its operations work on."""

from dataclasses import dataclass

from adapter_store.backend import Backend
from adapter_store.blobs import Blobs
from adapter_store.facts import UserHead
from adapter_store.log import Log
from adapter_store.root import Root


@dataclass(frozen=True)
class Opened:
    """A store whose root file was read."""

    backend: Backend
    root: Root
    log: Log
    blobs: Blobs

    def key_for(self, head: UserHead) -> str | None:
        """Return the encryption key that a user's next things are sealed with, made where there is none yet."""
        if self.root.vault is None:
            return None
        return head.key or self.root.vault.add(head.user_key, since_seq=head.seq)

    def drop_unused_key(self, head: UserHead, key: str | None) -> None:
        """Shred a key that `key_for(head)` made, where nothing was sealed with it in the end."""
        if self.root.vault is not None and key is not None and head.key is None:
            self.root.vault.remove(head.user_key, key)
