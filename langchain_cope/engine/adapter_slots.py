"""A few adapters ready in device memory for any number of users.

Requests lease a slot in the order of their arrival. Loading, which may mean fetching, is done by a thread of its own, one adapter
after the other; a lease keeps its adapter from being evicted, and the least recently used one without a lease makes room.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path

from langchain_cope.engine.adapter import Adapter
from langchain_cope.engine.request import AdapterSource
from langchain_cope.engine.threads import release_pool

_PATIENCE = (
    5.0  # seconds for a load under way when everything ends; its thread does not keep the process
)


class Lease:
    """A request's hold on its adapter."""

    def __init__(self, source: AdapterSource) -> None:
        self.source = source
        self.adapter: Adapter | None = None
        """There once it is loaded."""
        self.error: BaseException | None = None
        """Why it will never be there."""

    @property
    def settled(self) -> bool:
        """Loaded or failed."""
        return self.adapter is not None or self.error is not None


class _Slot:
    def __init__(self) -> None:
        self.adapter: Adapter | None = None
        self.leases: set[Lease] = set()


class AdapterSlots:
    """``capacity`` adapters. Thread-safe."""

    def __init__(
        self, capacity: int, read: Callable[[Path, str], Adapter], on_settled: Callable[[], None]
    ) -> None:
        """``read`` makes an adapter of a folder and its name; ``on_settled`` is called after leases got theirs, or an error."""
        self._capacity = capacity
        self._read = read
        self._on_settled = on_settled
        self._lock = threading.RLock()
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        self._waiting: deque[Lease] = deque()
        self._to_load: deque[AdapterSource] = deque()
        self._loader: threading.Thread | None = None
        self._closed = False
        self.num_loaded = self.num_evicted = 0

    def lease(self, source: AdapterSource) -> Lease:
        """Ask for an adapter; it is there at once where a slot holds it."""
        lease = Lease(source)
        with self._lock:
            self._waiting.append(lease)
            self._serve()
        return lease

    def release(self, lease: Lease) -> None:
        """Give a lease back, at any stage. Safe to call twice."""
        with self._lock:
            slot = self._slots.get(lease.source.name)
            if slot is not None:
                slot.leases.discard(lease)
            if lease in self._waiting:
                self._waiting.remove(lease)
            self._serve()

    @property
    def num_in_use(self) -> int:
        """Slots that some request holds."""
        with self._lock:
            return sum(bool(slot.leases) for slot in self._slots.values())

    def clear(self) -> None:
        """Drop every adapter and whoever waits for one; nothing is loaded any more."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
            self._to_load.clear()
            self._slots.clear()
            loader = self._loader
        if loader is not None and loader is not threading.current_thread():
            loader.join(_PATIENCE)

    def _serve(self) -> None:
        """Give slots to those who wait, first come first served."""
        while self._waiting and not self._closed:
            source = self._waiting[0].source
            slot = self._slots.get(source.name)
            if slot is None:
                if not self._make_room():
                    return
                slot = self._slots[source.name] = _Slot()
                self._to_load.append(source)
                self._start_loader()
            self._slots.move_to_end(source.name)
            lease = self._waiting.popleft()
            lease.adapter = slot.adapter
            slot.leases.add(lease)

    def _make_room(self) -> bool:
        if len(self._slots) < self._capacity:
            return True
        idle = next(
            (
                name
                for name, slot in self._slots.items()
                if not slot.leases and slot.adapter is not None
            ),
            None,
        )
        if idle is None:
            return False
        del self._slots[idle]
        self.num_evicted += 1
        return True

    def _start_loader(self) -> None:
        if self._loader is None:
            self._loader = threading.Thread(
                target=self._load_all, name="cope-adapter-loader", daemon=True
            )
            self._loader.start()

    def _load_all(self) -> None:
        """Load until nothing is left to load; the thread then ends."""
        while True:
            with self._lock:
                if not self._to_load:
                    self._loader = None
                    return
                source = self._to_load.popleft()
            try:
                loaded: Adapter | BaseException = self._read(source.folder(), source.name)
            except BaseException as error:
                loaded = error
            release_pool()  # the engine's own threads are not to share the cores with idle ones
            self._settle(source.name, loaded)
            self._on_settled()

    def _settle(self, name: str, loaded: Adapter | BaseException) -> None:
        with self._lock:
            slot = self._slots.get(name)
            if slot is None:  # cleared meanwhile
                return
            for lease in slot.leases:
                if isinstance(loaded, Adapter):
                    lease.adapter = loaded
                else:
                    lease.error = loaded
            if isinstance(loaded, Adapter):
                slot.adapter = loaded
                self.num_loaded += 1
            else:
                del self._slots[name]  # the next request tries again
            self._serve()
