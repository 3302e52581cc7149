"""Storage backends that let a test act, wait or fail around each put."""

from collections.abc import Callable
from typing import Any

from adapter_store import Backend, MemoryBackend

Hook = Callable[[str], Any]


class HookedBackend:
    """Another backend's storage, far away. `before` and `after` get the key of each put."""

    url = "hooked://"

    def __init__(
        self, backend: Backend, before: Hook | None = None, after: Hook | None = None
    ) -> None:
        self.get, self.stat = backend.get, backend.stat
        self.list_folder, self.delete = backend.list_folder, backend.delete
        self.put = backend.put_if_absent
        self.before = before or (lambda key: None)
        self.after = after or (lambda key: None)

    def put_if_absent(self, key: str, data: bytes) -> None:
        self.before(key)
        self.put(key, data)
        self.after(key)


class HookedMemory(MemoryBackend):
    """The same storage as another one in memory. `before` gets the key of each put."""

    def __init__(self, backend: MemoryBackend, before: Hook | None = None) -> None:
        self.__dict__.update(backend.__dict__)
        self.put = backend.put_if_absent
        self.before = before or (lambda key: None)

    def put_if_absent(self, key: str, data: bytes) -> None:
        self.before(key)
        self.put(key, data)


def once(act: Callable[[], Any], at: str = "/log/") -> Hook:
    """Return a hook that acts at the first put only of a key that holds `at`."""
    acts = [act]

    def hook(key: str) -> None:
        if at in key and acts:
            acts.pop()()

    return hook
