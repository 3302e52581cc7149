"""Whether storage keeps the one promise that everything rests on: a key that is there is not written again."""

import contextlib
import os
from typing import TYPE_CHECKING

from adapter_store.errors import BackendError
from adapter_store.layout import new_probe
from adapter_store.text import without_secrets

if TYPE_CHECKING:
    from adapter_store.backends.protocol import Backend

_MAX_TRIES = 3


def probe_put_if_absent(backend: "Backend") -> None:
    """Write a key twice, and raise BackendError unless the second time is refused and the first content stays.

    Some S3 servers ignore the condition silently: on them two writers would lose each other's publishes.
    """
    for _ in range(_MAX_TRIES):  # a collection without grace may take a probe away in the middle
        if _keeps(backend):
            return
    raise BackendError(
        f"{without_secrets(backend.url)} writes over what is there though it is asked not to (put-if-absent, in S3 the "
        "header If-None-Match): two writers would lose each other's adapters; choose storage that keeps the condition"
    )


def _keeps(backend: "Backend") -> bool:
    key = new_probe()
    first, second = os.urandom(16), os.urandom(16)
    try:
        with contextlib.suppress(
            FileExistsError
        ):  # said of our own write, where its first answer was lost
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
