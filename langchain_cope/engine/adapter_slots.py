"""A few adapters ready in device memory for any number of users.

Requests lease a slot in the order of their arrival. Threads of its own load them: a few adapters
are fetched at a time, so that nobody waits for a slow store once for each who came before, and one
is read at a time, which is work for a processor. A lease keeps its adapter from being evicted; the
least recently used one without a lease makes room.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path

from langchain_cope.engine.adapter import Adapter
from langchain_cope.engine.device import release_thread_pool
from langchain_cope.engine.request import AdapterSource

# Seconds for loads under way when everything ends; their threads do not keep the process.
_JOIN_TIMEOUT = 5.0
_LOADERS = 8  # adapters that are fetched at a time


class Lease:
    """A request's hold on its adapter."""

    def __init__(self, source: AdapterSource) -> None:
        self.source = source
        self.adapter: Adapter | None = None
        """Set once it is loaded."""
        self.error: BaseException | None = None
        """Why it could not be loaded."""

    @property
    def done(self) -> bool:
        """True once the adapter is loaded or has failed to."""
        return self.adapter is not None or self.error is not None


class _Slot:
    def __init__(self) -> None:
        self.adapter: Adapter | None = None
        self.leases: set[Lease] = set()


class AdapterSlots:
    """Slots for `capacity` adapters. Thread-safe."""

    def __init__(
        self, capacity: int, read: Callable[[Path, str], Adapter], on_done: Callable[[], None]
    ) -> None:
        """Start with empty slots.

        Args:
            capacity: number of slots.
            read: makes an adapter of a folder and its name.
            on_done: called after leases got their adapter, or an error.
        """
        self._capacity = capacity
        self._read = read
        self._on_done = on_done
        self._lock = threading.RLock()
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        self._waiting: deque[Lease] = deque()
        self._to_load: deque[AdapterSource] = deque()
        self._loaders: set[threading.Thread] = set()
        self._reading = threading.Lock()
        self._closed = False
        self.num_loaded = self.num_evicted = 0

    def lease(self, source: AdapterSource) -> Lease:
        """Ask for an adapter; it is there at once where a slot holds it."""
        lease = Lease(source)
        with self._lock:
            self._waiting.append(lease)
            self._assign_slots()
        return lease

    def release(self, lease: Lease) -> None:
        """Give a lease back, at any stage. Safe to call twice."""
        with self._lock:
            slot = self._slots.get(lease.source.name)
            if slot is not None:
                slot.leases.discard(lease)
            if lease in self._waiting:
                self._waiting.remove(lease)
            self._assign_slots()

    @property
    def num_in_use(self) -> int:
        """Slots that some request holds."""
        with self._lock:
            return len([slot for slot in self._slots.values() if slot.leases])

    def drop_idle(self) -> None:
        """Drop the adapters that no lease holds."""
        with self._lock:
            for name, slot in list(self._slots.items()):
                if not slot.leases and slot.adapter is not None:
                    del self._slots[name]

    def clear(self) -> None:
        """Drop every adapter and every lease that waits for one; nothing is loaded any more."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
            self._to_load.clear()
            self._slots.clear()
            loaders = self._loaders - {threading.current_thread()}
        ends_at = time.monotonic() + _JOIN_TIMEOUT
        for loader in loaders:
            loader.join(max(0.0, ends_at - time.monotonic()))

    def _assign_slots(self) -> None:
        """Give slots to the leases that wait, first come first served."""
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
        """Tell whether there is a free slot, after evicting where one can be."""
        if len(self._slots) < self._capacity:
            return True
        for name, slot in self._slots.items():
            if not slot.leases and slot.adapter is not None:
                del self._slots[name]
                self.num_evicted += 1
                return True
        return False

    def _start_loader(self) -> None:
        if len(self._loaders) < _LOADERS:
            loader = threading.Thread(
                target=self._load_all, name="cope-adapter-loader", daemon=True
            )
            self._loaders.add(loader)
            loader.start()

    def _load_all(self) -> None:
        """Load until nothing is left to load; the thread then ends."""
        while True:
            with self._lock:
                if not self._to_load:
                    self._loaders.remove(threading.current_thread())
                    return
                source = self._to_load.popleft()
            try:
                folder = source.folder()
                with self._reading:
                    result: Adapter | BaseException = self._read(folder, source.name)
            except BaseException as error:
                result = error
            release_thread_pool()  # idle threads would take the cores from the engine's own
            self._hand_out(source.name, result)
            self._on_done()

    def _hand_out(self, name: str, result: Adapter | BaseException) -> None:
        """Give what loading came to, an adapter or an error, to the leases of its slot."""
        with self._lock:
            slot = self._slots.get(name)
            if slot is None:  # cleared meanwhile
                return
            for lease in slot.leases:
                if isinstance(result, Adapter):
                    lease.adapter = result
                else:
                    lease.error = result
            if isinstance(result, Adapter):
                slot.adapter = result
                self.num_loaded += 1
            else:
                del self._slots[name]  # the next request tries again
            self._assign_slots()
