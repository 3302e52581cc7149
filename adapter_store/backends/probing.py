"""Whether storage keeps the promise that all rests on: an existing key is not written again."""

import contextlib
import os

from adapter_store.backends.protocol import Backend
from adapter_store.errors import BackendError
from adapter_store.layout import new_probe
from adapter_store.text import without_secrets

_MAX_TRIES = 3


def probe_put_if_absent(backend: Backend) -> None:
    """Raise BackendError unless a second write of a key is refused and its first content stays.

    Some S3 servers silently ignore the condition: on them two writers would lose each other's
    publishes.
    """
    for _ in range(_MAX_TRIES):  # a collection without grace may take a probe away in the middle
        if _keeps(backend):
            return
    raise BackendError(
        f"{without_secrets(backend.url)} writes over what is there though it is asked not to "
        "(put-if-absent, in S3 the header If-None-Match): two writers would lose each other's "
        "adapters; choose storage that keeps the condition"
    )


def _keeps(backend: Backend) -> bool:
    key = new_probe()
    first, second = os.urandom(16), os.urandom(16)
    try:
        # FileExistsError is said of our own write, where its first answer was lost.
        with contextlib.suppress(FileExistsError):
            backend.put_if_absent(key, first)
        try:
            backend.put_if_absent(key, second)
        except FileExistsError:
            return backend.get(key, len(first) + 1) == first
        return False
    except FileNotFoundError:
        return False
    finally:
        with contextlib.suppress(BackendError):
            backend.delete(key)
