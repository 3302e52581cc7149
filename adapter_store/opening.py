"""How a store is opened: its root file read, looked at again, and made before the first write.

While the root file stays the same, what was opened is kept, with all that its log remembers. A
near store's root file is looked at each time, a remote one's once a minute: it changes only where a
store is removed and made anew.
"""

import time
from collections.abc import Hashable
from threading import Lock
from typing import Any, NamedTuple

from adapter_store.backends.parallel import is_near
from adapter_store.backends.probing import probe_put_if_absent
from adapter_store.backends.protocol import Backend
from adapter_store.blobs import Blobs
from adapter_store.cache import AdapterCache
from adapter_store.facts import Limits
from adapter_store.keys import KeyProvider
from adapter_store.layout import ROOT_FILE
from adapter_store.log import Log
from adapter_store.open_store import OpenStore
from adapter_store.root import Root, make_root, open_root

_TRUST_SECONDS = 60.0


class _Known(NamedTuple):
    """The store as it was opened.

    `mark` is the storage's mark of its root file then, which a remote store is believed to have
    until `trusted_until`.
    """

    store: OpenStore
    mark: Hashable
    trusted_until: float


class Opener:
    """Opens the store of one location. Thread-safe; it may be pickled, with its keys and pepper."""

    def __init__(
        self,
        backend: Backend,
        pepper: bytes | None,
        keys: KeyProvider | None,
        cache: AdapterCache | None,
        limits: Limits,
    ) -> None:
        self.backend = backend
        self.pepper = pepper
        self.keys = keys
        self.cache = cache
        self.limits = limits
        self._known: _Known | None = None
        self._probed = False
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs to open the same store."""
        return {**self.__dict__, "_known": None, "_probed": False, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())

    def open(self) -> OpenStore | None:
        """Return the open store, None where no store exists yet. Raises what `open_root` raises."""
        known = self._known
        is_remote = not is_near(self.backend)
        if known is not None and is_remote and time.monotonic() < known.trusted_until:
            return known.store
        mark = self._mark()
        if known is not None and mark is not None and mark == known.mark:
            if is_remote:
                self._known = known._replace(trusted_until=time.monotonic() + _TRUST_SECONDS)
            return known.store
        root = open_root(self.backend, self.pepper, self.keys)
        if root is None:
            self._known = None
            return None
        return self._keep(root, mark)

    def open_to_write(self, *, probe: bool = False) -> OpenStore:
        """Return the open store, made where it does not exist yet.

        Before the first write, and at each call with `probe`, the storage is asked to prove that it
        does not write over what is there; BackendError where it does.
        """
        if probe or not self._probed:
            self._probed = False
            probe_put_if_absent(self.backend)
            self._probed = True
        store = self.open()
        if store is None:
            root = make_root(self.backend, self.pepper, self.keys)
            store = self._keep(root, self._mark())
        return store

    def _mark(self) -> Hashable:
        file = self.backend.stat(ROOT_FILE)
        return None if file is None else file.mark

    def _keep(self, root: Root, mark: Hashable) -> OpenStore:
        with self._lock:
            if self._known is not None and _is_same(self._known.store.root, root):
                store = self._known.store  # with what its log remembers
            else:
                log = Log(self.backend, root)
                blobs = Blobs(self.backend, root, self.cache, self.limits)
                store = OpenStore(self.backend, root, log, blobs)
            self._known = _Known(store, mark, time.monotonic() + _TRUST_SECONDS)
            return store


def _is_same(one: Root, other: Root) -> bool:
    return (one.store_id, one.pepper) == (other.store_id, other.pepper)
