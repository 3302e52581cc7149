"""Garbage collection: files that no entry names, old entries, what killed processes left.

It is safe beside writers whatever their clocks say or how long they sleep. Before files are
removed, an entry in the user's log says that what began earlier was collected; a publisher that
finds it writes its files again, elsewhere. The grace only keeps that rare, and it is measured by
the storage's own clock.
"""

import time
from collections.abc import Collection, Iterator, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

from adapter_store import layout
from adapter_store.backends.protocol import Backend
from adapter_store.cache import AdapterCache
from adapter_store.errors import UNREADABLE, BackendError, PublishConflictError
from adapter_store.facts import UserHead
from adapter_store.log import ErasedSinceError
from adapter_store.open_store import OpenStore
from adapter_store.operations.candidates import withdrawn
from adapter_store.operations.publishing import remove_dropped
from adapter_store.vault import OVERHEAD_BYTES, key_of


@dataclass
class Collected:
    """What a garbage collection removed, or in a dry run would remove.

    `problems` are what was wrong with users that it had to skip.
    """

    users: int = 0
    versions: int = 0
    version_bytes: int = 0
    entries: int = 0
    keys: int = 0
    candidates: int = 0
    unfinished_files: int = 0
    cached_versions: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Rules:
    """What may go, with ages in seconds.

    Files older than `grace`, candidates that wait longer than `candidate_age`, and entries older
    than `entry_age` beyond the newest `keep_entries`.
    """

    grace: float
    keep_entries: int
    entry_age: float
    candidate_age: float
    dry_run: bool


def storage_time(backend: Backend, dry_run: bool) -> float:
    """Return the storage's time, in seconds since 1970.

    In a dry run, which writes nothing, it is this machine's.
    """
    if dry_run:
        return time.time()
    probe = layout.new_probe()
    # FileExistsError is said of our own write, where its first answer was lost.
    with suppress(FileExistsError):
        backend.put_if_absent(probe, b"")
    file = backend.stat(probe)
    backend.delete(probe)
    return file.modified if file else 0.0


def collect_user(
    store: OpenStore, user_key: str, rules: Rules, now: float, done: Collected
) -> None:
    """Collect the garbage of one user."""
    done.users += 1
    try:
        head = store.log.head_or_new(user_key)
        _finish_erasure(store, head, rules, done)
        head = _drop_candidates(store, head, rules, now, done)
        _remove_orphans(store, head, rules, now, done)
        _trim(store, user_key, rules, now, done)
    except (*UNREADABLE, PublishConflictError) as error:
        done.problems.append(str(error))


def collect_unfinished(store: OpenStore, rules: Rules, now: float, done: Collected) -> None:
    """Remove what killed processes left of writing and of probing."""
    backend = store.backend
    paths = [f"{layout.STAGING}/{name}" for name in backend.list_folder(layout.STAGING)]
    for name in backend.list_folder(layout.PROBES):
        if layout.is_probe(name):
            paths.append(f"{layout.PROBES}/{name}/{layout.PROBE}")
    for path in paths:
        file = backend.stat(path)
        if file is not None and file.modified <= now - rules.grace:
            done.unfinished_files += 1
            if not rules.dry_run:
                backend.delete(path)


def collect_cache(store: OpenStore, cache: AdapterCache, rules: Rules, done: Collected) -> None:
    """Remove from this machine's cache what is no longer listed."""
    for user_key in cache.users(store.root.store_id):
        with suppress(*UNREADABLE):
            versions = cache.versions(store.root.store_id, user_key)
            # After the look: the head lists whatever was fetched until then.
            head = store.log.head(user_key)
            for version in versions:
                if head is None or head.find(version) is None:
                    done.cached_versions += 1
                    if not rules.dry_run:
                        _forget(store, user_key, version, done)
    if not rules.dry_run:
        cache.evict()  # what was removed by processes that were killed meanwhile


def _finish_erasure(store: OpenStore, head: UserHead, rules: Rules, done: Collected) -> None:
    for seq in store.log.seqs(head.user_key):
        if seq < head.erased_seq:
            done.entries += 1
            if not rules.dry_run:
                store.log.remove(head.user_key, seq)
    if head.erased_seq:
        # Not the damaged keys, as an erasure does: it is unknown what is still sealed with those.
        keys = store.root.vault.made_before(head.user_key, head.erased_seq)
        _remove_keys(store, head.user_key, keys, rules, done)


def _drop_candidates(
    store: OpenStore, head: UserHead, rules: Rules, now: float, done: Collected
) -> UserHead:
    """Withdraw the candidates that nobody came back for, and return the head after it."""
    forgotten = set()
    for one in head.candidates:
        folder = layout.version_folder(head.user_key, one.version)
        file = store.backend.stat(f"{folder}/{layout.WEIGHTS}")
        if file is not None and file.modified <= now - rules.candidate_age:
            forgotten.add(one.version)
    done.candidates += len(forgotten)
    if rules.dry_run or not forgotten:
        return head
    for version in forgotten:
        with suppress(ErasedSinceError):
            before, head = store.log.commit(head.user_key, partial(withdrawn, version=version))
            remove_dropped(store, before, head)
    return head


def _remove_orphans(
    store: OpenStore, head: UserHead, rules: Rules, now: float, done: Collected
) -> None:
    """Remove the files of versions that are not listed, once the log says so."""
    grace = 0.0 if head.erased_seq and head.is_erased else rules.grace
    sizes = dict(_unlisted(store, head, now - grace))
    removed, keys = set(sizes), _unused_keys(store, head, set(sizes), now - grace)
    if not removed and not keys:
        return

    def collected(current: UserHead) -> UserHead | None:
        removed.difference_update(version.version for version in current.kept)
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
            _, head = store.log.commit(head.user_key, collected)
        # A publisher may have used one of them meanwhile.
        keys &= _unused_keys(store, head, removed, now - grace)
    _remove_keys(store, head.user_key, keys, rules, done)
    for version in sorted(removed):
        done.versions += 1
        done.version_bytes += sizes[version]
        if not rules.dry_run:
            store.blobs.remove_folder(head.user_key, version)
            _forget(store, head.user_key, version, done)


def _unused_keys(store: OpenStore, head: UserHead, removed: Set[str], time: float) -> set[str]:
    """Return the keys written until `time` that nothing is sealed with but `removed` versions."""
    unused = set(store.root.vault.written_until(head.user_key, time)) - {head.key}
    if not unused:  # almost always
        return set()
    # Those were counted before, as part of an erasure.
    unused.difference_update(store.root.vault.made_before(head.user_key, head.erased_seq))
    for version in store.version_folders(head.user_key):
        if version in removed:
            continue
        folder = layout.version_folder(head.user_key, version)
        for name in store.backend.list_folder(folder):
            with suppress(FileNotFoundError):
                start = store.backend.get(f"{folder}/{name}", OVERHEAD_BYTES)
                try:
                    unused.discard(key_of(start))
                except ValueError:  # damaged: it is unknown what opens it
                    return set()
    return unused


def _remove_keys(
    store: OpenStore, user_key: str, keys: Collection[str], rules: Rules, done: Collected
) -> None:
    done.keys += len(keys)
    if not rules.dry_run:
        for key in keys:
            store.root.vault.remove(user_key, key)


def _forget(store: OpenStore, user_key: str, version: str, done: Collected) -> None:
    try:
        store.blobs.forget(user_key, version)
    except BackendError as error:  # a problem of this machine: no reason to stop
        done.problems.append(str(error))


def _unlisted(store: OpenStore, head: UserHead, time: float) -> Iterator[tuple[str, int]]:
    """Yield each unlisted version and its bytes, if all of them were written until `time`."""
    for version in store.version_folders(head.user_key):
        if head.keeps(version):
            continue
        folder = layout.version_folder(head.user_key, version)
        stats = [
            store.backend.stat(f"{folder}/{name}") for name in store.backend.list_folder(folder)
        ]
        files = [file for file in stats if file is not None]
        if all(file.modified <= time for file in files):
            yield version, sum(file.size for file in files)


def _trim(store: OpenStore, user_key: str, rules: Rules, now: float, done: Collected) -> None:
    """Remove old entries beyond the newest."""
    seqs = store.log.seqs(user_key)
    for seq in seqs[: -rules.keep_entries]:
        file = store.backend.stat(layout.entry_key(user_key, seq))
        if file is not None and file.modified > now - rules.entry_age:
            break  # in ascending order: the ones after are younger
        done.entries += 1
        if not rules.dry_run:
            store.log.remove(user_key, seq)
