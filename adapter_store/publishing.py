"""A publish, step by step: data first, entry last; and the files of versions that are not listed (any more) removed."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace

from adapter_store import layout
from adapter_store.backend import Backend
from adapter_store.errors import AdapterStoreError, BackendError, PublishConflictError
from adapter_store.facts import UNSET, AdapterVersion, Unset, UserHead
from adapter_store.log import Log
from adapter_store.scratch import remove_scratch
from adapter_store.text import location, shorten, value_or_none


def with_version(
    head: UserHead,
    version: AdapterVersion,
    activate: bool,
    expected_active: str | Unset | None,
    live_versions: int,
) -> UserHead | None:
    """Return `head` with `version` published on top, the oldest dropped beyond `live_versions`.

    None where its idempotency key says that it was published before; PublishConflictError where another version is
    active than the expected one.
    """
    if _published_before(head, version) is not None:
        return None
    if expected_active is not UNSET and head.active != expected_active:
        raise PublishConflictError(
            f"user {shorten(version.user_id)} has {value_or_none(head.active)} active where "
            f"{value_or_none(expected_active)} was expected: nothing was published; look at what is active, then decide"
        )
    active = version.version if activate else head.active
    droppable = [live for live in head.versions if live.version != active]
    dropped = droppable[: max(0, len(head.versions) + 1 - live_versions)]
    kept = tuple(live for live in head.versions if live not in dropped)
    return replace(
        head, active=active, operation="publish", operation_version=version.version, versions=(*kept, version)
    )


def publish_version(
    backend: Backend,
    log: Log,
    version: AdapterVersion,
    files: Mapping[str, bytes],
    change: Callable[[UserHead], UserHead | None],
) -> AdapterVersion:
    """Write the files, commit `change`, and return what is published: `version`, or the earlier one of the same job."""
    head = log.head_or_new(version.user_id)
    # Asked once before any byte is written: a job done before, or a conflict, costs no upload.
    if change(head) is not None:
        try:
            _write_files(backend, version, files)
            before, head = log.commit(version.user_id, change)
        except BaseException:  # Ctrl-C too leaves nothing behind
            _discard(backend, log, version)
            raise
        # The publish is done, whatever becomes of the files of a version that it dropped.
        with contextlib.suppress(BackendError):
            remove_dropped(backend, before, head)
    earlier = _published_before(head, version)
    if earlier is None:
        return version
    _discard(backend, log, version)
    return earlier


def remove_dropped(backend: Backend, before: UserHead, after: UserHead) -> None:
    """Remove the files of the versions that a commit took off the list. Raises BackendError, naming what is left."""
    listed = {version.version for version in after.versions}
    for version in before.versions:
        if version.version not in listed:
            _remove_files(backend, version)


def _published_before(head: UserHead, version: AdapterVersion) -> AdapterVersion | None:
    """Return the live version that another publish with the same idempotency key made."""
    if version.idempotency_key is None:
        return None
    same = (live for live in head.versions if live.idempotency_key == version.idempotency_key)
    return next((live for live in same if live.version != version.version), None)


def _write_files(backend: Backend, version: AdapterVersion, files: Mapping[str, bytes]) -> None:
    for name, key in _file_keys(version):
        try:
            backend.put_if_absent(key, files[name])
        except FileExistsError:
            raise BackendError(f"{location(backend.url, key)}, a new random name, is taken: publish again") from None


def _discard(backend: Backend, log: Log, version: AdapterVersion) -> None:
    """Remove the files of a version that was not committed. In doubt they stay: a listed version must have its files."""
    with contextlib.suppress(AdapterStoreError):
        head = log.head(version.user_key)
        if head is None or head.find(version.version) is None:
            _remove_files(backend, version)


def _remove_files(backend: Backend, version: AdapterVersion) -> None:
    remove_scratch(version.name)
    for _, key in _file_keys(version):
        try:
            backend.delete(key)
        except BackendError as error:
            raise BackendError(
                f"version {version.version} of user {shorten(version.user_id)} is no longer listed, "
                f"but its files are left: {error}, then remove them by hand"
            ) from error


def _file_keys(version: AdapterVersion) -> list[tuple[str, str]]:
    folder = layout.version_folder(version.user_key, version.version)
    return [(name, f"{folder}/{name}") for name in layout.ADAPTER_FILES]
