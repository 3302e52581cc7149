"""A publish, step by step: data first, entry last; and the files of unlisted versions removed."""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from adapter_store import layout
from adapter_store.errors import (
    AdapterStoreError,
    BackendError,
    PublishConflictError,
    UserErasedError,
)
from adapter_store.facts import UNSET, AdapterVersion, Unset, UserHead
from adapter_store.log import ErasedSinceError
from adapter_store.open_store import OpenStore
from adapter_store.text import shorten, value_or_none

MAX_TRIES = 30
"""How often what was collected as garbage in the middle is written anew."""


class CollectedError(Exception):
    """A garbage collection came between the files and the entry: the files may be gone.

    Never leaves this package.
    """


@dataclass(frozen=True)
class Terms:
    """On what terms a version may be published.

    Attributes:
        activate: Whether it becomes the active version.
        candidate: Whether it only waits, in the place of an earlier candidate.
        expected_active: The version that must be active, or UNSET.
        reason: Why, for the history.
        live_versions: How many versions are kept.
        data_seq: Where the user's log was when the data was read; None: when the publish began.
        began_seq: Where the log was when the first file was written.
        key: What the user's entry is sealed with where it has no key yet.
    """

    activate: bool
    expected_active: str | Unset | None
    reason: str
    live_versions: int
    data_seq: int | None
    began_seq: int = 0
    key: str | None = None
    candidate: bool = False


def with_version(head: UserHead, version: AdapterVersion, terms: Terms) -> UserHead | None:
    """Return `head` with `version` published on top, on these terms.

    The oldest versions beyond `live_versions` are dropped. None where the version is there, or was
    published before with its idempotency key. PublishConflictError where another version is active
    than the expected one, UserErasedError where the user was erased since the data was read.
    """
    if _published_before(head, version) is not None or head.keeps(version.version):
        return None
    data_seq = terms.began_seq if terms.data_seq is None else terms.data_seq
    check_fences(head, version.user_id, data_seq, terms.began_seq)
    check_expected(head, version.user_id, terms.expected_active, "published")
    changed = replace(
        head,
        user_id=version.user_id,
        key=head.key or terms.key,
        operation="propose" if terms.candidate else "publish",
        operation_version=version.version,
        reason=terms.reason,
    )
    if terms.candidate:
        return replace(changed, candidates=(version,))
    changed = replace(changed, versions=(*head.versions, version))
    if terms.activate:
        changed = activated(changed, version.version)
    return without_oldest(changed, terms.live_versions, (version.version,))


def check_fences(head: UserHead, user_id: str, data_seq: int, began_seq: int) -> None:
    """Raise UserErasedError or CollectedError where what is to be committed came too late."""
    if data_seq < head.erased_seq:
        raise erased_error(user_id)
    if began_seq < head.collected_seq:
        raise CollectedError


def check_expected(
    head: UserHead, user_id: str, expected: str | Unset | None, done: str = "changed"
) -> None:
    """Raise PublishConflictError, saying that nothing was `done`, unless `expected` is active."""
    if expected is not UNSET and head.active != expected:
        raise PublishConflictError(
            f"user {shorten(user_id)} has {value_or_none(head.active)} active where "
            f"{value_or_none(expected)} was expected: nothing was {done}; "
            "look at what is active, then decide"
        )


def erased_error(user_id: str) -> UserErasedError:
    """Return the error for what came too late, or was erased the moment it was there."""
    return UserErasedError(
        f"user {shorten(user_id)} was erased after the data of this adapter was read: "
        "nothing of it is kept; train on what the user has now, or stop"
    )


def activated(head: UserHead, version: str | None) -> UserHead:
    """Return `head` with another version active, and the one before on the stack."""
    if version == head.active:
        return head
    previous = head.previous if head.active is None else (*head.previous, head.active)
    return replace(head, active=version, previous=previous)


def without_oldest(head: UserHead, live_versions: int, new: Sequence[str]) -> UserHead:
    """Return `head` with the oldest versions dropped until `live_versions` are left.

    The active one and those in `new` stay.
    """
    droppable = [
        live.version
        for live in head.versions
        if live.version != head.active and live.version not in new
    ]
    num_dropped = max(0, len(head.versions) - live_versions)
    return without(head, set(droppable[:num_dropped]))


def without(head: UserHead, dropped: set[str]) -> UserHead:
    """Return `head` without some versions, nowhere listed and not on the stack of earlier ones."""
    versions = tuple(live for live in head.versions if live.version not in dropped)
    listed = {live.version for live in versions}
    return replace(head, versions=versions, previous=_earlier_active(head, listed))


def _earlier_active(head: UserHead, listed: set[str]) -> tuple[str, ...]:
    """Return the stack of earlier active versions: those still listed, each unlike the one before.

    It holds no more of them than versions are listed.
    """
    stack: list[str] = []
    for version in head.previous:
        if version in listed and (not stack or stack[-1] != version):
            stack.append(version)
    if stack and stack[-1] == head.active:
        stack.pop()
    return tuple(stack[-max(1, len(listed)) :])


def publish_version(
    store: OpenStore, version: AdapterVersion, files: dict[str, bytes], terms: Terms
) -> AdapterVersion:
    """Write the files, commit the version, and return what is published.

    That is `version`, or the earlier one of the same job.
    """
    for _ in range(MAX_TRIES):
        began = store.log.head_or_new(version.user_key, version.user_id)
        if terms.data_seq is None:  # for all tries: an erasure between two of them counts
            terms = replace(terms, data_seq=began.seq)
        terms = replace(terms, began_seq=began.seq)
        # Asked once before any byte is written: a job done before, or a conflict, costs no upload.
        if with_version(began, version, terms) is None:
            break
        terms = replace(terms, key=store.key_for(began))
        published = _publish_once(store, version, files, terms, began)
        if published is not None:
            return published
        version = replace(version, version=layout.new_version(version.created_at))
    earlier = _published_before(began, version)
    if earlier is None:
        raise PublishConflictError(
            f"what was written for user {shorten(version.user_id)} was collected as garbage "
            f"{MAX_TRIES} times: nothing was published; let gc run less often, and try again"
        )
    return earlier


def _publish_once(
    store: OpenStore,
    version: AdapterVersion,
    files: dict[str, bytes],
    terms: Terms,
    began: UserHead,
) -> AdapterVersion | None:
    """Publish on top of the head `began`; None where garbage was collected in the middle."""

    def change(head: UserHead) -> UserHead | None:
        return with_version(head, version, terms)

    written = False
    try:
        store.blobs.write(version, files, terms.key)
        written = True
        before, after = store.log.commit(version.user_key, change, known=began)
    # The files may be gone; or the key is, of a user erased since.
    except (CollectedError, FileNotFoundError):
        discard(store, [version], began, terms.key)
        return None
    except ErasedSinceError:
        discard(store, [version], began, terms.key)
        raise erased_error(version.user_id) from None
    except BaseException as error:  # Ctrl-C too
        # An entry that was put without an answer may land yet, and needs its files: gc removes them
        # where it does not.
        if not written or not may_land(error):
            discard(store, [version], began, terms.key)
        raise
    if not after.keeps(version.version):
        discard(store, [version], began, terms.key)
    # The publish is done, whatever becomes of the files of a version that it dropped.
    with contextlib.suppress(BackendError):
        remove_dropped(store, before, after)
    return _published_before(after, version) or version


def remove_dropped(store: OpenStore, before: UserHead, after: UserHead) -> None:
    """Remove the files of the versions that a commit dropped.

    Raises BackendError, naming what is left.
    """
    for version in before.kept:
        if not after.keeps(version.version):
            store.blobs.remove(version)


def _published_before(head: UserHead, version: AdapterVersion) -> AdapterVersion | None:
    """Return what another publish with the same idempotency key made, if it is kept."""
    if version.idempotency_key is None:
        return None
    for live in head.kept:
        if live.idempotency_key == version.idempotency_key and live.version != version.version:
            return live
    return None


def may_land(error: BaseException) -> bool:
    """Return whether the entry may land after this error of its commit."""
    if isinstance(error, BackendError):
        return not error.refused
    return not isinstance(error, Exception)


def discard(
    store: OpenStore, versions: Iterable[AdapterVersion], began: UserHead, key: str | None
) -> None:
    """Remove the files of those versions that were not committed, and their key if it is unused.

    In doubt they stay: a listed version must have its files.
    """
    with contextlib.suppress(AdapterStoreError):
        head = store.log.head_or_new(began.user_key)
        listed = [version for version in versions if head.keeps(version.version)]
        for version in versions:
            if version not in listed:
                store.blobs.remove(version)
        if not listed and head.key != key:
            store.drop_unused_key(began, key)
