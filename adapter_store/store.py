"""The store: publish, resolve, fetch and the rest of the interface, on any backend.

A change is one new log entry with the user's whole head, put where no entry was: whoever loses that race reads the
winner's entry and tries again on top of it (`log.py`). Data comes first, the entry last, so that a version which is
listed is there. The object itself keeps no state: every call reads what is stored now, and any number of threads and
processes may use the same store. Calls block; asynchronous callers use a thread.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from adapter_store import layout
from adapter_store.backend import Backend, open_backend
from adapter_store.checks import check_alpha, check_base, check_facts, check_idempotency_key, check_tau, check_user_id
from adapter_store.errors import (
    AdapterNotFoundError,
    BaseModelMismatchError,
    IntegrityError,
    InvalidAdapterError,
)
from adapter_store.facts import UNSET, AdapterVersion, FileFacts, Limits, Unset, UserHead, base_differences
from adapter_store.files import read_adapter, write_new_folder
from adapter_store.local import LocalBackend, local_path
from adapter_store.log import Heads, Log, now
from adapter_store.publishing import publish_version, remove_dropped, with_version
from adapter_store.root import make_root, open_root
from adapter_store.scratch import write_scratch
from adapter_store.text import location, shorten, value_or_none, without_secrets

_NOTHING: Mapping[str, Any] = {}


class AdapterStore:
    """Every user's adapters, version by version.

    `place` is a folder ("~" is expanded), a file:// URL, memory:// or memory://name (shared in this process by name),
    or a Backend. `pepper` is the secret (at least 16 bytes) that user keys are made with; without one the store makes
    and keeps its own. Opening reads and makes nothing; the first `prepare` or `publish` makes the store. Each call may raise
    BackendError, and KeyMismatchError, FormatVersionError or IntegrityError where the store is not what it should be.
    """

    def __init__(
        self, place: str | os.PathLike[str] | Backend, *, pepper: bytes | None = None, limits: Limits | None = None
    ) -> None:
        if pepper is not None and (not isinstance(pepper, bytes) or len(pepper) < 16):
            raise ValueError("pepper must be at least 16 random bytes, such as os.urandom(32)")
        self._backend = open_backend(place)
        self._pepper = pepper
        self._limits = limits or Limits()

    def __repr__(self) -> str:
        return f"AdapterStore({self.url!r})"

    @property
    def url(self) -> str:
        """The store's place as a URL, with userinfo and query masked."""
        return without_secrets(self._backend.url)

    def prepare(self, user_id: str) -> None:
        """Check, before long work, that a publish for this user could be stored; makes the store where there is none.

        InvalidAdapterError for the user id, BackendError where the store cannot be written.
        """
        check_user_id(user_id, self._limits)
        make_root(self._backend, self._pepper)
        probe = f"probes/{os.urandom(16).hex()}/probe"  # in a folder of its own, which goes with it
        self._backend.put_if_absent(probe, b"")
        self._backend.delete(probe)

    def publish(
        self,
        user_id: str,
        folder_or_files: str | os.PathLike[str] | Mapping[str, bytes],
        *,
        base: Mapping[str, str],
        metrics: Mapping[str, Any] = _NOTHING,
        alpha: float | None = None,
        tau: float | None = None,
        metadata: Mapping[str, Any] = _NOTHING,
        activate: bool = True,
        idempotency_key: str | None = None,
        expected_active: str | Unset | None = UNSET,
    ) -> AdapterVersion:
        """Store an adapter as the user's newest version, active at once unless `activate` is False, and return it.

        The adapter is a peft folder, of which adapter_model.safetensors and adapter_config.json are read, or exactly
        these two as bytes by name. `base` is the fingerprint of the model it was trained on. `idempotency_key`: while
        a version published with that key lives, it is returned and nothing is published. `expected_active`: publish
        only while that version (None: no version) is active, else PublishConflictError. Beyond
        `Limits.live_versions` the oldest version that is not active is dropped, its files too. InvalidAdapterError
        for whatever cannot be accepted; nothing has been stored then.
        """
        check_user_id(user_id, self._limits)
        files = read_adapter(folder_or_files, self._limits)
        created_at = now()
        # Everything is checked before the store is made or touched; only the user key needs the store.
        described = partial(
            AdapterVersion,
            user_id=user_id,
            version=layout.new_version(created_at),
            created_at=created_at,
            files={name: FileFacts(hashlib.sha256(data).hexdigest(), len(data)) for name, data in files.items()},
            base=check_base(base, self._limits),
            metrics=check_facts(metrics, "metrics", self._limits),
            alpha=check_alpha(alpha),
            tau=check_tau(tau),
            metadata=check_facts(metadata, "metadata", self._limits),
            idempotency_key=check_idempotency_key(idempotency_key),
        )
        log = Log(self._backend, make_root(self._backend, self._pepper))
        version = described(user_key=log.user_key(user_id))
        change = partial(
            with_version,
            version=version,
            activate=activate,
            expected_active=expected_active,
            live_versions=self._limits.live_versions,
        )
        return publish_version(self._backend, log, version, files, change)

    def resolve(
        self, user_id: str, version: str | None = None, *, base: Mapping[str, str] | None = None
    ) -> AdapterVersion:
        """Return the facts of a user's version, None meaning the active one.

        AdapterNotFoundError where there is no such user or version, or none is active. With `base`, the fingerprint
        of the model at hand: BaseModelMismatchError where the version was trained on another one.
        """
        found = self._live(user_id, version, self._head(user_id))
        differences = {} if base is None else base_differences(found.base, base)
        if differences:
            parts = "; ".join(
                f"{part} was {value_or_none(trained)} and is {value_or_none(asked)}"
                for part, (trained, asked) in differences.items()
            )
            raise BaseModelMismatchError(
                f"version {found.version} of user {shorten(user_id)} was trained on another base model: {parts}; "
                "load the base that it was trained on, or personalize the user again on this one",
                differences,
            )
        return found

    def fetch(self, version: AdapterVersion) -> dict[str, bytes]:
        """Return the content of a version's files by name, its size and sha256 checked this very time.

        AdapterNotFoundError where the version was deleted since it was resolved, IntegrityError where a file is
        damaged.
        """
        self._open()
        return {name: self._verified(version, name) for name in layout.ADAPTER_FILES}

    def fetch_dir(self, version: AdapterVersion) -> Path:
        """Return a folder on this machine that holds a version as a plain peft folder, checked as in `fetch`.

        Read only: in a local store it is the store's own, elsewhere a temporary one of this process, removed at its
        exit. A later delete of the version takes either away.
        """
        files = self.fetch(version)
        if isinstance(self._backend, LocalBackend):
            return self._backend.path_of(layout.version_folder(version.user_key, version.version))
        return write_scratch(version.name, files)

    def versions(self, user_id: str) -> list[AdapterVersion]:
        """Return a user's live versions in the order of their publishing; none for an unknown user."""
        head = self._head(user_id)
        return list(head.versions) if head else []

    def active(self, user_id: str) -> str | None:
        """Return the id of a user's active version, None where none is active or the user is unknown."""
        head = self._head(user_id)
        return head.active if head else None

    def activate(self, user_id: str, version: str) -> AdapterVersion:
        """Make a live version the active one and return it; where it is already, nothing is written."""

        def activated(head: UserHead) -> UserHead | None:
            if self._live(user_id, version, head).version == head.active:
                return None
            return replace(head, active=version, operation="activate", operation_version=version)

        _, head = self._change(user_id, version, activated)
        return self._live(user_id, version, head)

    def delete_version(self, user_id: str, version: str) -> None:
        """Remove a version, and its files. Deleting the active one leaves the user with none active."""

        def deleted(head: UserHead) -> UserHead:
            gone = self._live(user_id, version, head)
            return replace(
                head,
                active=None if head.active == version else head.active,
                operation="delete",
                operation_version=version,
                versions=tuple(live for live in head.versions if live != gone),
            )

        remove_dropped(self._backend, *self._change(user_id, version, deleted))

    def list_users(self, cursor: str | None = None, limit: int = 1000) -> tuple[list[UserHead], str | None]:
        """Return up to `limit` users in the order of their keys, and the cursor of the next page, None on the last.

        A user whose versions were all deleted is listed without versions.
        """
        if cursor is not None and not (isinstance(cursor, str) and layout.is_sha256(cursor)):
            raise InvalidAdapterError(f"cursor {shorten(cursor)} comes from no listing: pass the one returned, or None")
        if limit < 1:
            raise InvalidAdapterError(f"limit is {limit}: give at least 1")
        log = self._open()
        if log is None:
            return [], None
        keys = list(islice(log.user_keys(cursor or ""), limit + 1))
        # A folder without an entry is a first publish under way: not a user yet.
        heads = [head for key in keys[:limit] if (head := log.head(key)) is not None]
        return heads, keys[limit - 1] if len(keys) > limit else None

    def export_peft(self, user_id: str, folder: str | os.PathLike[str], version: str | None = None) -> Path:
        """Write a version (None: the active one) as a plain peft folder, which must be new or empty; return its path.

        Raises what `resolve` and `fetch` raise, BackendError where the folder cannot be written.
        """
        path = local_path(folder)
        write_new_folder(path, self.fetch(self.resolve(user_id, version)))
        return path

    def _open(self) -> Log | None:
        """Return the log of the store, None where there is no store yet."""
        pepper = open_root(self._backend, self._pepper)
        return None if pepper is None else Log(self._backend, pepper)

    def _head(self, user_id: str) -> UserHead | None:
        check_user_id(user_id, self._limits)
        log = self._open()
        return log.head(log.user_key(user_id)) if log else None

    def _change(self, user_id: str, version: str, change: Callable[[UserHead], UserHead | None]) -> Heads:
        """Commit a change to one of a user's live versions."""
        check_user_id(user_id, self._limits)
        log = self._open()
        if log is None:
            raise self._not_found(user_id, version, None)
        return log.commit(user_id, change)

    def _live(self, user_id: str, version: str | None, head: UserHead | None) -> AdapterVersion:
        """Return a live version of `head`, None meaning the active one, or say what there is instead."""
        found = None if head is None else head.find(head.active if version is None else version)
        if found is None:
            raise self._not_found(user_id, version, head)
        return found

    def _not_found(self, user_id: str, version: str | None, head: UserHead | None) -> AdapterNotFoundError:
        user = f"user {shorten(user_id)}"
        if head is None or not head.versions:
            return AdapterNotFoundError(f"{user} has no adapter in {self.url}: personalize and publish one first")
        newest = head.versions[-1].version
        count = f"{len(head.versions)} version{'s' if len(head.versions) > 1 else ''}"
        if version is None:
            return AdapterNotFoundError(
                f"{user} has {count} in {self.url} and none is active: activate one, such as the newest, {newest}"
            )
        return AdapterNotFoundError(
            f"{user} has no version {shorten(version)} in {self.url}, but {count}: the newest is {newest}"
        )

    def _verified(self, version: AdapterVersion, name: str) -> bytes:
        facts = version.files[name]
        key = f"{layout.version_folder(version.user_key, version.version)}/{name}"
        where = location(self._backend.url, key)
        if facts.size > self._limits.bytes_of(name):
            raise InvalidAdapterError(
                f"{where} has {facts.size} bytes, more than the {self._limits.bytes_of(name)} that this store reads: "
                "open it with larger Limits"
            )
        try:
            data = self._backend.get(key, facts.size + 1)
        except FileNotFoundError:
            head = self._head(version.user_id)
            if head is None or head.find(version.version) is None:
                raise self._not_found(version.user_id, version.version, head) from None
            raise self._damaged(where, "is missing") from None
        if len(data) != facts.size:
            size = f"more than {facts.size}" if len(data) > facts.size else str(len(data))
            raise self._damaged(where, f"has {size} bytes, published were {facts.size}")
        if hashlib.sha256(data).hexdigest() != facts.sha256:
            raise self._damaged(where, "is not what was published: its sha256 differs")
        return data

    def _damaged(self, where: str, what: str) -> IntegrityError:
        return IntegrityError(f"{where} {what}; restore it from a backup, activate another version, or publish again")
