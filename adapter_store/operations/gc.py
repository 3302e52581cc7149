"""Garbage collection: files that no entry names, log entries that nobody needs, what killed processes left.

It is safe beside writers whatever their clocks say or how long they sleep. Before files are removed, an entry in the
user's log says that what began earlier was collected; a publisher that finds it writes its files again, elsewhere. The
grace only keeps that rare, and it is measured by the storage's own clock.
"""

import time
from collections.abc import Collection, Iterator, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace

from adapter_store import layout
from adapter_store.backends.protocol import Backend
from adapter_store.cache import AdapterCache
from adapter_store.errors import (
    UNREADABLE,
    AdapterStoreError,
    BackendError,
    KeyMismatchError,
    PublishConflictError,
)
from adapter_store.facts import UserHead
from adapter_store.log import ErasedSinceError
from adapter_store.open_store import Opened
from adapter_store.vault import OVERHEAD_BYTES, STORE, key_of


@dataclass
class Collected:
    """What a garbage collection removed (in a dry run: would remove); `problems` are users that it had to pass over."""

    users: int = 0
    versions: int = 0
    version_bytes: int = 0
    entries: int = 0
    keys: int = 0
    unfinished_files: int = 0
    cached_versions: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Rules:
    """What may go: files older than `grace`; entries beyond the newest `keep_entries` and older than `entry_age`, in s."""

    grace: float
    keep_entries: int
    entry_age: float
    dry_run: bool


def storage_time(backend: Backend, dry_run: bool) -> float:
    """Return the storage's time, in seconds since 1970; in a dry run, which writes nothing, this machine's."""
    if dry_run:
        return time.time()
    place = layout.new_probe()
    with suppress(FileExistsError):  # said of our own write, where its first answer was lost
        backend.put_if_absent(place, b"")
    found = backend.stat(place)
    backend.delete(place)
    return found.modified if found else 0.0


def collect_user(opened: Opened, user_key: str, rules: Rules, now: float, done: Collected) -> None:
    """Collect the garbage of one user."""
    done.users += 1
    try:
        head = opened.log.head_or_new(user_key)
        _finish_erasure(opened, head, rules, done)
        _orphans(opened, head, rules, now, done)
        _trim(opened, user_key, rules, now, done)
    except (*UNREADABLE, PublishConflictError) as error:
        done.problems.append(str(error))


def collect_unfinished(opened: Opened, rules: Rules, now: float, done: Collected) -> None:
    """Remove what killed processes left of writing and of probing."""
    backend = opened.backend
    places = [f"{layout.STAGING}/{name}" for name in backend.list_folder(layout.STAGING)]
    places += [
        f"{layout.PROBES}/{name}/{layout.PROBE}"
        for name in backend.list_folder(layout.PROBES)
        if layout.is_probe(name)
    ]
    for place in places:
        found = backend.stat(place)
        if found is not None and found.modified <= now - rules.grace:
            done.unfinished_files += 1
            if not rules.dry_run:
                backend.delete(place)


def collect_cache(opened: Opened, cache: AdapterCache, rules: Rules, done: Collected) -> None:
    """Remove from this machine's cache what is no longer listed."""
    for user_key in cache.users(opened.root.store_id):
        with suppress(*UNREADABLE):
            kept = cache.versions(opened.root.store_id, user_key)
            head = opened.log.head(
                user_key
            )  # after the look: it lists whatever was fetched until then
            for version in kept:
                if head is None or head.find(version) is None:
                    done.cached_versions += 1
                    if not rules.dry_run:
                        _forget(opened, user_key, version, done)
    if not rules.dry_run:
        cache.evict()  # what was removed by processes that were killed meanwhile


def rotate_pepper(opened: Opened, problems: list[AdapterStoreError]) -> int:
    """Wrap the store's pepper with the newest master key, not what a killed maker of the store left; return how many."""
    if opened.root.vault is None:
        raise KeyMismatchError("this store has no keys to rotate: it was made without encryption")
    pepper_key = opened.root.pepper_key
    return opened.root.vault.rewrap(STORE, problems, () if pepper_key is None else (pepper_key,))


def rotate_user_keys(opened: Opened, user_key: str, problems: list[AdapterStoreError]) -> int:
    """Wrap a user's keys with the newest master key; return how many were not yet."""
    if opened.root.vault is None:
        return 0
    rewrapped = opened.root.vault.rewrap(user_key, problems)
    if rewrapped:
        # An erasure in between may have missed the copy just written; it has left its entry, so look for that now.
        with suppress(*UNREADABLE):
            head = opened.log.head_or_new(user_key)
            for key in opened.root.vault.made_before(user_key, head.erased_seq):
                opened.root.vault.remove(user_key, key)
    return rewrapped


def _finish_erasure(opened: Opened, head: UserHead, rules: Rules, done: Collected) -> None:
    for seq in opened.log.seqs(head.user_key):
        if seq < head.erased_seq:
            done.entries += 1
            if not rules.dry_run:
                opened.log.remove(head.user_key, seq)
    if opened.root.vault is not None and head.erased_seq:
        # Not the damaged ones, as an erasure does: of those nobody knows whether something is still sealed with them.
        keys = opened.root.vault.made_before(head.user_key, head.erased_seq)
        _remove_keys(opened, head.user_key, keys, rules, done)


def _orphans(opened: Opened, head: UserHead, rules: Rules, now: float, done: Collected) -> None:
    """Remove the files of versions that are not listed, once the log says so."""
    grace = 0.0 if head.erased_seq and head.is_erased else rules.grace
    sizes = {
        version: size
        for version, size, newest in _unlisted(opened, head)
        if newest is None or newest <= now - grace
    }
    removed, keys = set(sizes), _unused_keys(opened, head, set(sizes), now - grace)
    if not removed and not keys:
        return

    def collected(current: UserHead) -> UserHead | None:
        removed.difference_update(version.version for version in current.versions)
        if not removed and not keys:
            return None
        return replace(
            current,
            operation="collect",
            operation_version="",
            reason="",
            collected_seq=current.seq + 1,
        )

    if not rules.dry_run:
        with suppress(ErasedSinceError):
            _, head = opened.log.commit(head.user_key, collected)
        keys &= _unused_keys(
            opened, head, removed, now - grace
        )  # of those a publisher may have used one meanwhile
    _remove_keys(opened, head.user_key, keys, rules, done)
    for version in sorted(removed):
        done.versions += 1
        done.version_bytes += sizes[version]
        if not rules.dry_run:
            opened.blobs.remove_folder(head.user_key, version)
            _forget(opened, head.user_key, version, done)


def _unused_keys(opened: Opened, head: UserHead, removed: Set[str], now: float) -> set[str]:
    """Return the keys written until `now` that neither entries nor files, but of `removed` versions, are sealed with."""
    if opened.root.vault is None:
        return set()
    unused = set(opened.root.vault.written_until(head.user_key, now)) - {head.key}
    if not unused:  # almost always
        return unused
    unused.difference_update(
        opened.root.vault.made_before(head.user_key, head.erased_seq)
    )  # counted before
    for version in opened.version_folders(head.user_key):
        folder = layout.version_folder(head.user_key, version)
        for name in opened.backend.list_folder(folder) if version not in removed else []:
            with suppress(FileNotFoundError):
                try:
                    unused.discard(key_of(opened.backend.get(f"{folder}/{name}", OVERHEAD_BYTES)))
                except ValueError:  # damaged: nobody knows what opens it
                    return set()
    return unused


def _remove_keys(
    opened: Opened, user_key: str, keys: Collection[str], rules: Rules, done: Collected
) -> None:
    done.keys += len(keys)
    if opened.root.vault is not None and not rules.dry_run:
        for key in keys:
            opened.root.vault.remove(user_key, key)


def _forget(opened: Opened, user_key: str, version: str, done: Collected) -> None:
    try:
        opened.blobs.forget(user_key, version)
    except BackendError as error:  # this machine's own trouble: no reason to stop
        done.problems.append(str(error))


def _unlisted(opened: Opened, head: UserHead) -> Iterator[tuple[str, int, float | None]]:
    """Yield (version, bytes, time of its newest file) of what lies there and is not listed."""
    for version in opened.version_folders(head.user_key):
        if head.find(version) is None:
            folder = layout.version_folder(head.user_key, version)
            found = [
                opened.backend.stat(f"{folder}/{name}")
                for name in opened.backend.list_folder(folder)
            ]
            files = [file for file in found if file is not None]
            yield (
                version,
                sum(file.size for file in files),
                max((file.modified for file in files), default=None),
            )


def _trim(opened: Opened, user_key: str, rules: Rules, now: float, done: Collected) -> None:
    seqs = opened.log.seqs(user_key)
    for seq in seqs[: -rules.keep_entries]:
        found = opened.backend.stat(layout.entry_key(user_key, seq))
        if found is not None and found.modified > now - rules.entry_age:
            break  # in ascending order: the ones after are younger
        done.entries += 1
        if not rules.dry_run:
            opened.log.remove(user_key, seq)
