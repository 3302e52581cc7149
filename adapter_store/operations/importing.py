"""An archive into a store: what is not there yet, in one commit.

Nothing that was erased comes back through a file.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import BinaryIO

from adapter_store import layout
from adapter_store.errors import (
    BackendError,
    InvalidAdapterError,
    PublishConflictError,
    UserErasedError,
)
from adapter_store.facts import AdapterVersion, Limits, UserHead
from adapter_store.log import ErasedSinceError
from adapter_store.open_store import OpenStore
from adapter_store.operations.archive import Manifest, Origin, origin_of, read_archive
from adapter_store.operations.publishing import (
    MAX_TRIES,
    CollectedError,
    activated,
    check_fences,
    discard,
    may_land,
    remove_dropped,
    without_oldest,
)
from adapter_store.text import shorten


def import_archive(
    store: OpenStore, file: BinaryIO, manifest: Manifest, limits: Limits, where: str
) -> UserHead:
    """Put the versions of an archive, which was checked, into the store and return the user's head.

    Versions get new ids: another process may be removing files under the old ones. Those that are
    there already, told by their content and by their idempotency key, or by the place that they
    were first exported from, are left as they are, and those beyond the number that is kept are
    not brought. The archive's active version becomes the active one where the user has none.
    UserErasedError where the user was erased in this store after the archive was written, or ever
    where nothing proves that this store wrote it: then it is unknown which of the two came first.
    """
    for _ in range(MAX_TRIES):
        with suppress(CollectedError):
            return _import_once(store, file, manifest, limits, where)
    raise PublishConflictError(
        f"what was written for user {shorten(manifest.user_id)} was collected as garbage "
        f"{MAX_TRIES} times: nothing was imported; let gc run less often, and try again"
    )


def _import_once(
    store: OpenStore, file: BinaryIO, manifest: Manifest, limits: Limits, where: str
) -> UserHead:
    user_key = store.log.user_key(manifest.user_id)
    began = store.log.head_or_new(user_key, manifest.user_id)
    data_seq = _data_seq(store, manifest, began, where)
    brought = _brought(store, manifest, began, limits.live_versions)
    if not brought:
        return began
    key = store.key_for(began)

    def imported(head: UserHead) -> UserHead | None:
        check_fences(head, manifest.user_id, data_seq, began.seq)
        return _with_imported(store, manifest, head, brought.values(), key, limits.live_versions)

    written = False
    try:
        file.seek(0)
        again, versions = read_archive(file, limits, where, user_key)
        if (again.proven, again.proof) != (manifest.proven, manifest.proof):
            raise InvalidAdapterError(
                f"{where} was changed while it was read: nothing was imported; try again"
            )
        for version, files in versions:
            if version.version in brought:
                store.blobs.write(brought[version.version], files, key)
        written = True
        before, after = store.log.commit(user_key, imported, known=began)
    except (ErasedSinceError, FileNotFoundError):  # or the key is gone, of a user erased since
        discard(store, brought.values(), began, key)
        raise UserErasedError(
            f"user {shorten(manifest.user_id)} was erased meanwhile: "
            f"nothing of it is kept; destroy {where}"
        ) from None
    except BaseException as error:  # Ctrl-C too
        if not written or not may_land(error):
            discard(store, brought.values(), began, key)
        raise
    # The import is done, whatever becomes of the files of a version that it dropped.
    with suppress(BackendError):
        remove_dropped(store, before, after)
    # Some may have been imported by another process meanwhile, or be too many since.
    discard(store, brought.values(), began, key)
    return after


def _data_seq(store: OpenStore, manifest: Manifest, began: UserHead, where: str) -> int:
    """Return where this store's log was when it wrote the archive.

    Of one that it did not write, that is where the log is now.
    """
    if not manifest.comes_from(store.root):
        if began.erased_seq > 0:
            raise UserErasedError(
                f"user {shorten(manifest.user_id)} was erased in this store, and {where}, which "
                "this store did not write, may be older: nothing was imported; destroy it, and "
                "publish what the user has now"
            )
        return began.seq
    if manifest.seq < began.erased_seq:
        raise UserErasedError(
            f"user {shorten(manifest.user_id)} was erased after {where} was written: "
            "nothing was imported; destroy it"
        )
    # This store may be a restored one, and its log shorter than it was.
    return min(manifest.seq, began.seq)


def _brought(
    store: OpenStore, manifest: Manifest, head: UserHead, live_versions: int
) -> dict[str, AdapterVersion]:
    """Return what is to be brought of an archive, as it will be here, by its id there."""
    new = {
        version.version: replace(
            version,
            user_key=head.user_key,
            version=layout.other_version(version.version),
            idempotency_key=manifest.origin(version)[0],
        )
        for version in manifest.versions
    }
    planned = _with_imported(store, manifest, head, new.values(), None, live_versions) or head
    return {
        old: version for old, version in new.items() if planned.find(version.version) is not None
    }


def _with_imported(
    store: OpenStore,
    manifest: Manifest,
    head: UserHead,
    brought: Iterable[AdapterVersion],
    key: str | None,
    live_versions: int,
) -> UserHead | None:
    """Return `head` with what is brought and not there yet, as many versions as are kept.

    None where that changes nothing.
    """
    existing = {origin_of(store.root.store_id, version): version for version in head.versions}
    new: dict[Origin, AdapterVersion] = {}
    for version in brought:
        origin = origin_of(manifest.store_id, version)
        if origin not in existing:
            new[origin] = version
    if not new:
        return None
    changed = replace(
        head,
        user_id=manifest.user_id,
        key=head.key or key,
        operation="import",
        reason="",
        versions=(*new.values(), *head.versions),  # older than what is there
    )
    active = _active(manifest, existing | new)
    if changed.active is None and active is not None:
        changed = activated(changed, active.version)
    changed = without_oldest(changed, live_versions, ())
    added = [version.version for version in new.values() if changed.find(version.version)]
    return replace(changed, operation_version=added[-1]) if added else None


def _active(manifest: Manifest, versions: dict[Origin, AdapterVersion]) -> AdapterVersion | None:
    """Return the version that is the archive's active one."""
    for version in manifest.versions:
        if version.version == manifest.active:
            return versions.get(manifest.origin(version))
    return None
