"""A publish, step by step: data first, entry last; and the files of versions that are not listed (any more) removed."""

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
from adapter_store.open_store import Opened
from adapter_store.text import shorten, value_or_none

MAX_TRIES = 30
"""How often what was collected as garbage in the middle is written anew."""


class CollectedError(Exception):
    """A garbage collection came between the files and the entry: the files may be gone. Never leaves this package."""


@dataclass(frozen=True)
class Terms:
    """On what terms a version may be published.

    `data_seq`: where the user's log was when the data was read, None: when the publish began; `began_seq`: where it was
    when the first file was written. `key`: what the user's entry is sealed with where it has no key yet.
    """

    activate: bool
    expected_active: str | Unset | None
    reason: str
    live_versions: int
    data_seq: int | None
    began_seq: int = 0
    key: str | None = None


def with_version(head: UserHead, version: AdapterVersion, terms: Terms) -> UserHead | None:
    """Return `head` with `version` published on top, the oldest dropped beyond the terms' `live_versions`.

    None where it is there, or its idempotency key says that it was published before; PublishConflictError where another version is
    active than the expected one, UserErasedError where the user was erased since the data was read.
    """
    if _published_before(head, version) is not None or head.find(version.version) is not None:
        return None
    data_seq = terms.began_seq if terms.data_seq is None else terms.data_seq
    check_fences(head, version.user_id, data_seq, terms.began_seq)
    if terms.expected_active is not UNSET and head.active != terms.expected_active:
        raise PublishConflictError(
            f"user {shorten(version.user_id)} has {value_or_none(head.active)} active where "
            f"{value_or_none(terms.expected_active)} was expected: nothing was published; "
            "look at what is active, then decide"
        )
    changed = replace(
        head,
        user_id=version.user_id,
        key=head.key or terms.key,
        operation="publish",
        operation_version=version.version,
        reason=terms.reason,
        versions=(*head.versions, version),
    )
    if terms.activate:
        changed = activated(changed, version.version)
    return without_oldest(changed, terms.live_versions, (version.version,))


def check_fences(head: UserHead, user_id: str, data_seq: int, began_seq: int) -> None:
    """Raise UserErasedError or CollectedError where what is to be committed came too late."""
    if data_seq < head.erased_seq:
        raise erased_error(user_id)
    if began_seq < head.collected_seq:
        raise CollectedError


def erased_error(user_id: str) -> UserErasedError:
    """Return the error for what came too late, or was erased the moment it was there."""
    return UserErasedError(
        f"user {shorten(user_id)} was erased after the data of this adapter was read: nothing of it is kept; "
        "train on what the user has now, or stop"
    )


def activated(head: UserHead, version: str | None) -> UserHead:
    """Return `head` with another version active, and the way back kept."""
    if version == head.active:
        return head
    previous = head.previous if head.active is None else (*head.previous, head.active)
    return replace(head, active=version, previous=previous)


def without_oldest(head: UserHead, live_versions: int, new: Sequence[str]) -> UserHead:
    """Return `head` with the oldest versions dropped until `live_versions` are left; what is active or `new` stays."""
    droppable = [
        live.version
        for live in head.versions
        if live.version != head.active and live.version not in new
    ]
    dropped = set(droppable[: max(0, len(head.versions) - live_versions)])
    return without(head, dropped)


def without(head: UserHead, dropped: set[str]) -> UserHead:
    """Return `head` without some versions, neither listed nor on the way back."""
    kept = tuple(live for live in head.versions if live.version not in dropped)
    return replace(head, versions=kept, previous=_way_back(head, {live.version for live in kept}))


def _way_back(head: UserHead, listed: set[str]) -> tuple[str, ...]:
    """Return the versions to go back through: those still listed, each step to another one, no more than there are."""
    way: list[str] = []
    for version in head.previous:
        if version in listed and (not way or way[-1] != version):
            way.append(version)
    if way and way[-1] == head.active:
        way.pop()
    return tuple(way[-max(1, len(listed)) :])


def publish_version(
    opened: Opened, version: AdapterVersion, files: dict[str, bytes], terms: Terms
) -> AdapterVersion:
    """Write the files, commit the version, and return what is published: `version`, or the earlier one of the same job."""
    for _ in range(MAX_TRIES):
        began = opened.log.head_or_new(version.user_key, version.user_id)
        if terms.data_seq is None:
            terms = replace(
                terms, data_seq=began.seq
            )  # for all tries: an erasure between two of them counts
        terms = replace(terms, began_seq=began.seq)
        # Asked once before any byte is written: a job done before, or a conflict, costs no upload.
        if with_version(began, version, terms) is None:
            break
        key = opened.key_for(began)
        terms = replace(terms, key=key)

        def change(
            head: UserHead, version: AdapterVersion = version, terms: Terms = terms
        ) -> UserHead | None:
            return with_version(head, version, terms)

        written = False
        try:
            opened.blobs.write(version, files, key)
            written = True
            before, after = opened.log.commit(version.user_key, change, known=began)
        except (
            CollectedError,
            FileNotFoundError,
        ):  # the files may be gone; or the key is, of a user erased since
            discard(opened, [version], began, key)
            version = replace(version, version=layout.new_version(version.created_at))
            continue
        except ErasedSinceError:
            discard(opened, [version], began, key)
            raise erased_error(version.user_id) from None
        except BaseException as error:  # Ctrl-C too
            # An entry whose put was not answered may land yet, and needs its files: gc removes them where it does not.
            if not written or not may_land(error):
                discard(opened, [version], began, key)
            raise
        if after.find(version.version) is None:
            discard(opened, [version], began, key)
        # The publish is done, whatever becomes of the files of a version that it dropped.
        with contextlib.suppress(BackendError):
            remove_dropped(opened, before, after)
        return _published_before(after, version) or version
    earlier = _published_before(began, version)
    if earlier is None:
        raise PublishConflictError(
            f"what was written for user {shorten(version.user_id)} was collected as garbage {MAX_TRIES} times: "
            "nothing was published; let gc run less often, and try again"
        )
    return earlier


def remove_dropped(opened: Opened, before: UserHead, after: UserHead) -> None:
    """Remove the files of the versions that a commit took off the list. Raises BackendError, naming what is left."""
    listed = {version.version for version in after.versions}
    for version in before.versions:
        if version.version not in listed:
            opened.blobs.remove(version)


def _published_before(head: UserHead, version: AdapterVersion) -> AdapterVersion | None:
    """Return the live version that another publish with the same idempotency key made."""
    if version.idempotency_key is None:
        return None
    same = (live for live in head.versions if live.idempotency_key == version.idempotency_key)
    return next((live for live in same if live.version != version.version), None)


def may_land(error: BaseException) -> bool:
    """Tell whether the entry may land after this error of its commit."""
    return (
        not error.refused if isinstance(error, BackendError) else not isinstance(error, Exception)
    )


def discard(
    opened: Opened, versions: Iterable[AdapterVersion], began: UserHead, key: str | None
) -> None:
    """Remove the files of those versions that were not committed, and their key where no other is sealed with it.

    In doubt they stay: a listed version must have its files.
    """
    with contextlib.suppress(AdapterStoreError):
        head = opened.log.head_or_new(began.user_key)
        listed = [version for version in versions if head.find(version.version) is not None]
        for version in versions:
            if version not in listed:
                opened.blobs.remove(version)
        if not listed and head.key != key:
            opened.drop_unused_key(began, key)
