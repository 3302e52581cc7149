"""Several calls to the storage at once, where each call goes over the network."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from adapter_store.backends.local import LocalBackend
from adapter_store.backends.memory import MemoryBackend
from adapter_store.backends.protocol import Backend

_MAX_AT_ONCE = 16
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def is_near(backend: Backend) -> bool:
    """Return whether asking the storage takes no time worth saving."""
    return isinstance(backend, LocalBackend | MemoryBackend)


def each(
    backend: Backend, call: Callable[[_Item], _Result], items: Iterable[_Item]
) -> list[_Result]:
    """Return `call(item)` for each item, in order; what the first of them raises comes through."""
    arguments = list(items)
    if is_near(backend) or len(arguments) < 2:
        return [call(item) for item in arguments]
    from concurrent.futures import ThreadPoolExecutor  # slow to import

    with ThreadPoolExecutor(min(len(arguments), _MAX_AT_ONCE)) as pool:
        return list(pool.map(call, arguments))
