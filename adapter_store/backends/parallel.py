"""Several calls to the storage at once, where each is a way over the network."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from adapter_store.backends.local import LocalBackend
from adapter_store.backends.memory import MemoryBackend

if TYPE_CHECKING:
    from adapter_store.backends.protocol import Backend

_MAX_AT_ONCE = 16
_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


def is_near(backend: "Backend") -> bool:
    """Tell whether asking the storage takes no time worth saving."""
    return isinstance(backend, LocalBackend | MemoryBackend)


def each(
    backend: "Backend", call: Callable[[_Item], _Found], items: Iterable[_Item]
) -> list[_Found]:
    """Return `call(item)` for each item, in their order; what the first of them raises comes through."""
    wanted = list(items)
    if is_near(backend) or len(wanted) < 2:
        return [call(item) for item in wanted]
    from concurrent.futures import ThreadPoolExecutor  # slow to import

    with ThreadPoolExecutor(min(len(wanted), _MAX_AT_ONCE)) as pool:
        return list(pool.map(call, wanted))
