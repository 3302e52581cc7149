"""The users of a store, found by their folders."""

from bisect import bisect_right
from collections.abc import Iterator

from adapter_store import layout
from adapter_store.backends.parallel import each
from adapter_store.backends.protocol import Backend

_LISTED_AT_ONCE = 16


def user_keys(backend: Backend, top: str, after: str = "") -> Iterator[str]:
    """Yield the keys of all users with a folder below `top`, in ascending order.

    Those up to `after` are left out.
    """
    for first in _shards(backend, top, after[:2]):
        least = after[2:4] if first == after[:2] else ""
        seconds = _shards(backend, f"{top}/{first}", least)
        folders = [f"{top}/{first}/{second}" for second in seconds]
        for start in range(0, len(folders), _LISTED_AT_ONCE):
            batch = folders[start : start + _LISTED_AT_ONCE]
            listings = each(backend, backend.list_folder, batch)
            for folder, names in zip(batch, listings, strict=True):
                for name in names[bisect_right(names, after) :]:
                    if layout.is_sha256(name) and f"{top}/{name[:2]}/{name[2:4]}" == folder:
                        yield name


def _shards(backend: Backend, folder: str, least: str) -> list[str]:
    """Return the shards in a folder, in ascending order from `least` on."""
    names = backend.list_folder(folder)
    return [name for name in names if name >= least and layout.is_shard(name)]
