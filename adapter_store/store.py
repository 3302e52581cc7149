"""The store: publish, resolve, fetch and the rest of the interface, on any backend.

A change is one new log entry with the user's whole head, put where no entry was: a writer who loses
that race reads the winner's entry and tries again on top of it (`log.py`). Data comes first, the
entry last, so that a version which is listed is there. What is remembered between calls is checked
against the storage before it is believed, and any number of threads and processes may use the same
store. Calls block; asynchronous callers use a thread.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from adapter_store import layout
from adapter_store.backends.local import LocalBackend, local_path
from adapter_store.backends.parallel import each
from adapter_store.backends.protocol import Backend, open_backend
from adapter_store.cache import AdapterCache
from adapter_store.checks import (
    check_alpha,
    check_base,
    check_data_seq,
    check_idempotency_key,
    check_reason,
    check_tau,
    check_user_id,
    check_values,
)
from adapter_store.errors import (
    UNREADABLE,
    AdapterNotFoundError,
    AdapterStoreError,
    BackendError,
    BaseModelMismatchError,
    IntegrityError,
    InvalidAdapterError,
    PublishConflictError,
)
from adapter_store.facts import (
    UNSET,
    AdapterVersion,
    FileFacts,
    HistoryEntry,
    Limits,
    Unset,
    UserHead,
    base_differences,
)
from adapter_store.files import read_adapter, write_new_folder
from adapter_store.keys import KeyProvider
from adapter_store.log import ErasedSinceError, now
from adapter_store.open_store import OpenStore
from adapter_store.opening import Opener
from adapter_store.operations import gc as collecting
from adapter_store.operations.candidates import accepted, withdrawn
from adapter_store.operations.erasing import erase
from adapter_store.operations.gc import Collected
from adapter_store.operations.publishing import (
    Terms,
    activated,
    check_expected,
    publish_version,
    remove_dropped,
    without,
)
from adapter_store.operations.rotating import rotate_pepper, rotate_user_keys
from adapter_store.operations.verifying import UserReport, Verified, verify_user
from adapter_store.root import MIN_PEPPER_BYTES
from adapter_store.text import location, shorten, value_or_none, without_secrets

_NOTHING: Mapping[str, Any] = {}
_KEPT_ENTRIES = 100
_MAX_EXPORTS = 10


class AdapterStore:
    """Every user's adapters, version by version.

    Opening reads and makes nothing; the first `prepare` or `publish` makes the store. Each call may
    raise BackendError, and KeyMismatchError, FormatVersionError or IntegrityError where the store
    is not what it should be.

    Args:
        place: A folder ("~" is expanded), a URL (file://, memory://name shared in this process by
            name, s3://bucket/prefix, gs://bucket/prefix, az://container/prefix) or a Backend.
        pepper: The secret (at least 16 bytes) that user keys are made with; without one the store
            makes and keeps its own.
        keys: The master keys that make an encrypted store, and open it.
        cache: A folder, or an AdapterCache, where fetched adapters are kept on this machine.
        limits: How much the store accepts.
    """

    def __init__(
        self,
        place: str | os.PathLike[str] | Backend,
        *,
        pepper: bytes | None = None,
        keys: KeyProvider | None = None,
        cache: str | os.PathLike[str] | AdapterCache | None = None,
        limits: Limits | None = None,
    ) -> None:
        if pepper is not None and (not isinstance(pepper, bytes) or len(pepper) < MIN_PEPPER_BYTES):
            raise ValueError(
                f"pepper must be at least {MIN_PEPPER_BYTES} random bytes, such as os.urandom(32)"
            )
        if keys is not None and not isinstance(keys, KeyProvider):
            raise TypeError(
                f"keys is {shorten(keys)}, "
                "expected a KeyProvider such as EnvironmentKeys or FileKeys"
            )
        if cache is not None and not isinstance(cache, AdapterCache):
            cache = AdapterCache(cache)
        self._backend = open_backend(place)
        self._cache = cache
        self._limits = limits or Limits()
        self._opener = Opener(self._backend, pepper, keys, cache, self._limits)

    def __repr__(self) -> str:
        return f"AdapterStore({self.url!r})"

    @property
    def url(self) -> str:
        """The store's location as a URL, with userinfo and query masked."""
        return without_secrets(self._backend.url)

    def is_encrypted(self) -> bool:
        """Return whether an encrypted store exists here. Raises what opening it raises."""
        store = self._opener.open()
        return store is not None and store.root.vault.is_encrypted

    def exists(self) -> bool:
        """Return whether a store exists here yet; the first publish makes it.

        Raises what opening it raises.
        """
        return self._opener.open() is not None

    # ── publish ──

    def prepare(self, user_id: str) -> None:
        """Check, before long work, that a publish for this user could be stored.

        Makes the store where it does not exist. InvalidAdapterError for the user id, BackendError
        where the store cannot be written.
        """
        check_user_id(user_id, self._limits)
        self._opener.open_to_write(probe=True)

    def data_seq(self, user_id: str) -> int:
        """Return what `publish` takes as `data_seq`.

        Asked before a user's data is read, it fences off an erasure.
        """
        head = self._head(user_id)
        return head.seq if head else 0

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
        candidate: bool = False,
        idempotency_key: str | None = None,
        expected_active: str | Unset | None = UNSET,
        data_seq: int | None = None,
        reason: str = "",
    ) -> AdapterVersion:
        """Store an adapter as the user's newest version, and return it.

        Beyond `Limits.live_versions` the oldest version that is not active is dropped, its files
        too.

        Args:
            user_id: Any text.
            folder_or_files: A peft folder, of which adapter_model.safetensors and
                adapter_config.json are read, or exactly these two as bytes by name.
            base: The fingerprint of the model that it was trained on, part by part.
            metrics: What was measured, as JSON can keep it.
            alpha: The alpha that it recommends for decoding, None where it recommends none.
            tau: The tau that it recommends for decoding, None where it recommends none.
            metadata: Anything else, as JSON can keep it.
            activate: Whether it is active at once.
            candidate: Whether it only waits, as nobody's version, for `accept` or `withdraw`; it
                takes the place of an earlier candidate of the user.
            idempotency_key: While a version or a candidate published with that key is kept, it is
                returned and nothing is published.
            expected_active: Publish only while that version (None: no version) is active.
            data_seq: What `data_seq()` returned before the training data was read; by default what
                it returns now.
            reason: Why, for the history.

        Raises:
            InvalidAdapterError: An argument cannot be accepted; nothing has been stored then.
            PublishConflictError: Another version is active than the expected one.
            UserErasedError: The user was erased since the data was read.
        """
        check_user_id(user_id, self._limits)
        files = read_adapter(folder_or_files, self._limits)
        created_at = now()
        # Everything is checked before the store is made or touched; only the user key needs the
        # store.
        described = partial(
            AdapterVersion,
            user_id=user_id,
            version=layout.new_version(created_at),
            created_at=created_at,
            files={name: FileFacts.of(data) for name, data in files.items()},
            base=check_base(base, self._limits),
            metrics=check_values(metrics, "metrics", self._limits),
            alpha=check_alpha(alpha),
            tau=check_tau(tau),
            metadata=check_values(metadata, "metadata", self._limits),
            idempotency_key=check_idempotency_key(idempotency_key),
        )
        reason = check_reason(reason, self._limits)
        if data_seq is not None:
            check_data_seq(data_seq, self.data_seq(user_id))
        store = self._opener.open_to_write()
        terms = Terms(
            activate=activate,
            candidate=candidate,
            expected_active=expected_active,
            reason=reason,
            live_versions=self._limits.live_versions,
            data_seq=data_seq,
        )
        return publish_version(store, described(user_key=store.log.user_key(user_id)), files, terms)

    def import_peft(
        self,
        user_id: str,
        folder: str | os.PathLike[str],
        *,
        base: Mapping[str, str],
        **options: Any,
    ) -> AdapterVersion:
        """Publish a plain peft folder that was trained elsewhere.

        `base` is the fingerprint of the model that it was trained on, `options` are the other
        arguments of `publish`. Raises what that raises.
        """
        options = {"reason": "imported from a peft folder", **options}
        return self.publish(user_id, local_path(folder), base=base, **options)

    # ── read ──

    def resolve(
        self, user_id: str, version: str | None = None, *, base: Mapping[str, str] | None = None
    ) -> AdapterVersion:
        """Return a user's version, None meaning the active one.

        AdapterNotFoundError where the store has no such user or version, or none is active. With
        `base`, the fingerprint of the model at hand: BaseModelMismatchError where the version was
        trained on another one.
        """
        live = self._live(user_id, version, self._head(user_id))
        if base is not None:
            _check_same_base(live, base)
        return live

    def fetch(self, version: AdapterVersion) -> dict[str, bytes]:
        """Return the content of a version's files by name, size and sha256 checked at each call.

        AdapterNotFoundError where the version was deleted, or its user erased, since it was
        resolved, IntegrityError where a file is damaged.
        """
        store = self._opener.open()
        if store is None:
            raise self._not_found(version.user_id, version.version, None)
        self._check_listed(store, version)
        try:
            return store.blobs.read(version, partial(self._check_listed, store, version))
        except FileNotFoundError:
            self._check_listed(store, version)
            raise self._missing(version) from None

    def fetch_dir(self, version: AdapterVersion) -> Path:
        """Return a peft folder on this machine that holds a version, checked as in `fetch`.

        Read only, and to be read soon: in a local store it is the store's own, elsewhere a
        temporary one of this process, removed at its exit, or earlier where many others were asked
        for since. Deleting the version in this process takes either away, erasing the user in any
        process of this machine does.
        """
        files = self.fetch(version)
        store = self._opener.open()
        if store is None:
            raise self._not_found(version.user_id, version.version, None)
        if isinstance(self._backend, LocalBackend) and not store.root.vault.is_encrypted:
            return self._backend.path_of(layout.version_folder(version.user_key, version.version))
        try:
            return store.blobs.as_folder(version, files)
        finally:
            # An erasure since has missed this folder, and takes it away now.
            self._check_listed(store, version)

    def versions(self, user_id: str) -> list[AdapterVersion]:
        """Return a user's live versions in the order of publishing; none for an unknown user."""
        head = self._head(user_id)
        return list(head.versions) if head else []

    def active(self, user_id: str) -> str | None:
        """Return the id of a user's active version, None where none is active or no user known."""
        head = self._head(user_id)
        return head.active if head else None

    def candidate(self, user_id: str) -> AdapterVersion | None:
        """Return what waits to be accepted as the user's version, if anything does."""
        head = self._head(user_id)
        return head.candidates[-1] if head and head.candidates else None

    def user_key(self, user_id: str) -> str:
        """Return the keyed hash that names a user in this store, to those who know its pepper.

        It tells users apart without telling who they are. AdapterNotFoundError where there is no
        store yet.
        """
        check_user_id(user_id, self._limits)
        store = self._opener.open()
        if store is None:
            raise self._not_found(user_id, None, None)
        return store.log.user_key(user_id)

    def history(
        self, user_id: str, *, before_seq: int | None = None, limit: int = 100
    ) -> list[HistoryEntry]:
        """Return a user's latest changes, oldest first.

        Each says what was done when and why, and what was active from then on. Up to `limit` of
        them, before entry `before_seq`, such as the first one's `seq` of the page after. Of
        changes older than a month the newest hundred are kept, of an erased user nothing but the
        erasure.
        """
        check_user_id(user_id, self._limits)
        _check_limit(limit)
        store = self._opener.open()
        if store is None:
            return []
        head = store.log.head_or_new(store.log.user_key(user_id))
        end = head.seq + 1 if before_seq is None else before_seq
        seqs = [seq for seq in store.log.seqs(head.user_key) if head.erased_seq <= seq < end]
        entries = each(self._backend, partial(_entry_or_none, store, head.user_key), seqs[-limit:])
        return [_history_entry(entry) for entry in entries if entry is not None]

    def list_users(
        self,
        cursor: str | None = None,
        limit: int = 1000,
        *,
        on_problem: Callable[[AdapterStoreError], None] | None = None,
    ) -> tuple[list[UserHead], str | None]:
        """Return up to `limit` users in the order of their keys, and the cursor of the next page.

        The cursor is None on the last page. A user without versions, all deleted, is listed, an
        erased one is not. `on_problem` is called with what is wrong with a user that cannot be
        read; without it, that is raised: IntegrityError, KeyMismatchError or FormatVersionError.
        """
        if cursor is not None and not (isinstance(cursor, str) and layout.is_sha256(cursor)):
            raise InvalidAdapterError(
                f"cursor {shorten(cursor)} comes from no listing: pass the one returned, or none"
            )
        _check_limit(limit)
        store = self._opener.open()
        if store is None:
            return [], None
        user_keys = list(islice(store.log.user_keys(cursor or ""), limit + 1))
        heads = []
        for head in each(self._backend, partial(_head_or_problem, store), user_keys[:limit]):
            with _skip_bad_users(on_problem):
                if isinstance(head, AdapterStoreError):
                    raise head
                # A folder without an entry is a first publish that is running: not a user yet.
                if head is not None and not head.is_erased:
                    heads.append(head)
        return heads, user_keys[limit - 1] if len(user_keys) > limit else None

    # ── change ──

    def activate(
        self,
        user_id: str,
        version: str,
        *,
        expected_active: str | Unset | None = UNSET,
        reason: str = "",
    ) -> AdapterVersion:
        """Make a live version the active one and return it; where it is already, write nothing.

        `expected_active`: only while that version (None: no version) is active, else
        PublishConflictError.
        """
        check_reason(reason, self._limits)

        def change(head: UserHead) -> UserHead | None:
            check_expected(head, user_id, expected_active)
            if self._live(user_id, version, head).version == head.active:
                return None
            return replace(
                without(activated(head, version), set()),
                operation="activate",
                operation_version=version,
                reason=reason,
            )

        _, _, head = self._change(user_id, version, change)
        return self._live(user_id, version, head)

    def rollback(
        self, user_id: str, *, expected_active: str | Unset | None = UNSET, reason: str = ""
    ) -> AdapterVersion:
        """Make the version active that was active before the present one, and return it.

        Another call goes to the one before that. AdapterNotFoundError where no earlier one is left.
        """
        check_reason(reason, self._limits)

        def change(head: UserHead) -> UserHead:
            check_expected(head, user_id, expected_active)
            if not head.versions:
                raise self._not_found(user_id, None, head)
            if not head.previous:
                raise AdapterNotFoundError(
                    f"user {shorten(user_id)} has no earlier active version in {self.url} to go "
                    "back to: activate the one that you want"
                )
            return replace(
                head,
                active=head.previous[-1],
                previous=head.previous[:-1],
                operation="rollback",
                operation_version=head.previous[-1],
                reason=reason,
            )

        _, _, head = self._change(user_id, None, change)
        return self._live(user_id, None, head)

    def accept(
        self,
        user_id: str,
        version: str,
        *,
        expected_active: str | Unset | None = UNSET,
        reason: str = "",
    ) -> AdapterVersion:
        """Make a candidate the user's newest and active version, and return it.

        One that was accepted before is returned, and nothing is written. AdapterNotFoundError where
        there is no such candidate, PublishConflictError where another version is active than the
        expected one.
        """
        check_reason(reason, self._limits)

        def change(head: UserHead) -> UserHead | None:
            if head.find(version) is not None:
                return None
            if not any(one.version == version for one in head.candidates):
                raise self._no_candidate(user_id, version)
            check_expected(head, user_id, expected_active)
            return accepted(head, version, self._limits.live_versions, reason)

        store, before, after = self._change(user_id, version, change)
        with suppress(BackendError):  # it is accepted, whatever becomes of what it displaced
            remove_dropped(store, before, after)
        return self._live(user_id, version, after)

    def withdraw(self, user_id: str, version: str, *, reason: str = "") -> None:
        """Remove a candidate and its files; where it is gone already, do nothing."""
        check_reason(reason, self._limits)
        with suppress(AdapterNotFoundError):  # not even a store
            remove_dropped(
                *self._change(user_id, version, partial(withdrawn, version=version, reason=reason))
            )

    def delete_version(self, user_id: str, version: str, *, reason: str = "") -> None:
        """Remove a version, and its files.

        Deleting the active one leaves the user with none active.
        """
        check_reason(reason, self._limits)

        def change(head: UserHead) -> UserHead:
            self._live(user_id, version, head)
            active = None if head.active == version else head.active
            changed = replace(
                head, active=active, operation="delete", operation_version=version, reason=reason
            )
            return without(changed, {version})

        remove_dropped(*self._change(user_id, version, change))

    def erase_user(self, user_id: str) -> None:
        """Remove everything of a user, known or not, for good; done when this returns.

        From then on every `resolve` and `fetch` in any process refuses, the store and this
        machine's cache hold no byte of the user's adapters and keys, and publishes of what was
        trained on earlier data raise UserErasedError. Other machines' caches empty themselves of
        the user at their next access, and at their next `gc`. Interrupted, or where it raises
        BackendError, it is called again.
        """
        check_user_id(user_id, self._limits)
        store = self._opener.open_to_write()
        erase(store, store.log.user_key(user_id))

    # ── look after ──

    def verify(
        self, user_id: str | None = None, *, on_user: Callable[[UserReport], None] | None = None
    ) -> Verified:
        """Read and check everything of one user, or of all, past any cache.

        Damage is reported, not raised. `on_user` is called with each user's report as it goes.
        """
        if user_id is not None:
            check_user_id(user_id, self._limits)
        store, done = self._opener.open(), Verified()
        if store is None:
            return done
        user_keys = store.log.user_keys() if user_id is None else [store.log.user_key(user_id)]
        for user_key in user_keys:
            report = verify_user(store, user_key)
            done.add(report)
            if on_user is not None:
                on_user(report)
        return done

    def gc(
        self,
        *,
        grace: timedelta = timedelta(days=1),
        entry_age: timedelta = timedelta(days=30),
        candidate_age: timedelta = timedelta(days=7),
        dry_run: bool = False,
        on_user: Callable[[int], None] | None = None,
    ) -> Collected:
        """Remove what is no longer needed, safely beside writers, and return what that was.

        That is: files that no entry names and that are older than `grace` (what killed publishers
        left), candidates older than `candidate_age` (of runs that never came back for them), log
        entries older than `entry_age` beyond a user's newest hundred, the rest of erasures that
        were interrupted, and copies of deleted versions in this machine's cache.
        `on_user` is called with the number of users done so far.
        """
        store = self._opener.open()
        done = Collected()
        if store is None:
            return done
        rules = collecting.Rules(
            grace=grace.total_seconds(),
            keep_entries=_KEPT_ENTRIES,
            entry_age=entry_age.total_seconds(),
            candidate_age=candidate_age.total_seconds(),
            dry_run=dry_run,
        )
        if min(rules.grace, rules.entry_age, rules.candidate_age) < 0:
            raise InvalidAdapterError(
                "a grace below zero would remove what is being written: give at least 0"
            )
        storage_time = collecting.storage_time(self._backend, dry_run)
        for user_key in store.user_keys():
            collecting.collect_user(store, user_key, rules, storage_time, done)
            if on_user is not None:
                on_user(done.users)
        collecting.collect_unfinished(store, rules, storage_time, done)
        if self._cache is not None:
            collecting.collect_cache(store, self._cache, rules, done)
        return done

    def rotate_keys(self, *, on_user: Callable[[int], None] | None = None) -> int:
        """Wrap every key of an encrypted store with the newest master key; return how many changed.

        Afterwards the older master keys can be destroyed. `on_user` is called with the number of
        users done so far. KeyMismatchError for a store without encryption. Where a key cannot be
        read, all others are wrapped first; then the first such error comes, and says how many keys
        cannot be read.
        """
        store = self._opener.open()
        if store is None:
            return 0
        problems: list[AdapterStoreError] = []
        count = rotate_pepper(store, problems)
        for number, user_key in enumerate(store.root.vault.user_keys(), 1):
            count += rotate_user_keys(store, user_key, problems)
            if on_user is not None:
                on_user(number)
        if problems:
            raise type(problems[0])(
                f"{count} keys were wrapped anew, {len(problems)} could not be read and stay as "
                "they are (keep the older master keys until those can be read); "
                f"the first: {problems[0]}"
            )
        return count

    # ── in and out ──

    def export_peft(
        self, user_id: str, folder: str | os.PathLike[str], version: str | None = None
    ) -> Path:
        """Write a version (None: the active one) as a plain peft folder; return its path.

        The folder must be new or empty. Raises what `resolve` and `fetch` raise, BackendError where
        the folder cannot be written.
        """
        path = local_path(folder)
        write_new_folder(path, self.fetch(self.resolve(user_id, version)))
        return path

    def export_user(self, user_id: str, file: str | os.PathLike[str]) -> Path:
        """Write all versions of a user, with all that is known of them, as a new tar file.

        Return its path. The archive is not encrypted. AdapterNotFoundError for an unknown user,
        IntegrityError where something is damaged, BackendError where the file exists already or
        cannot be written.
        """
        check_user_id(user_id, self._limits)
        from adapter_store.operations import archive  # tar is slow to import, and few need it

        path, store = local_path(file), self._opener.open()
        for _ in range(_MAX_EXPORTS):
            head = store.log.head(store.log.user_key(user_id)) if store else None
            if store is None or head is None or not head.versions:
                raise self._not_found(user_id, None, head)
            with suppress(AdapterNotFoundError):  # a version was deleted meanwhile
                archive.write_archive(store, head, path, self.fetch)
                return path
        raise PublishConflictError(
            f"versions of user {shorten(user_id)} were deleted each of {_MAX_EXPORTS} times that "
            "it was exported: nothing was written; try again"
        )

    def import_user(self, file: str | os.PathLike[str]) -> UserHead:
        """Read a user from a tar file that `export_user` wrote, and return the user's head.

        It may come from this store or another. Versions get new ids, and an idempotency key where
        they had none, so that a repeated import finds them: those that are there already are left
        as they are, and those beyond `Limits.live_versions` stay away. All is imported or nothing.
        InvalidAdapterError where the file is not such an archive. UserErasedError where the user
        was erased in this store after it was written; when an archive was written that is not of
        this store is unknown, so there one erasure ever is enough.
        """
        from adapter_store.operations import archive, importing

        path = local_path(file)
        try:
            with path.open("rb") as content:
                manifest = archive.check_archive(content, self._limits, str(path))
                store = self._opener.open_to_write()
                return importing.import_archive(store, content, manifest, self._limits, str(path))
        except OSError as error:
            raise InvalidAdapterError(
                f"cannot read {path} ({error.strerror or error}): name an archive"
            ) from error

    def export_users(
        self,
        folder: str | os.PathLike[str],
        *,
        on_user: Callable[[int], None] | None = None,
        on_problem: Callable[[AdapterStoreError], None] | None = None,
    ) -> int:
        """Write every user as a tar file of a folder and return how many were written.

        Users with a file there already are skipped, so that an export that was interrupted goes on
        where it was. `on_user` is called with the number written so far, `on_problem` with why a
        user could not be exported; without it, that is raised. Raises what `export_user` raises.
        """
        path, count = local_path(folder), 0
        if path.exists() and not path.is_dir():
            raise BackendError(
                f"{path} is not a folder: name a new one, or one that an earlier export wrote"
            )
        cursor: str | None = None
        while True:
            heads, cursor = self.list_users(cursor, on_problem=on_problem)
            for head in heads:
                target = path / f"{head.user_key}.tar"
                if not head.versions or target.exists():
                    continue
                # AdapterNotFoundError: deleted or erased since it was listed.
                with suppress(AdapterNotFoundError), _skip_bad_users(on_problem):
                    self.export_user(head.user_id, target)
                    count += 1
                    if on_user is not None:
                        on_user(count)
            if cursor is None:
                return count

    def import_users(
        self,
        folder: str | os.PathLike[str],
        *,
        on_user: Callable[[int], None] | None = None,
        on_problem: Callable[[AdapterStoreError], None] | None = None,
    ) -> int:
        """Read every tar file of a folder that `export_users` wrote; return how many were imported.

        Safe to repeat. `on_user` is called with their number so far, `on_problem` with why a file
        could not be imported; without it, that is raised. Raises what `import_user` raises.
        """
        count = 0
        for file in sorted(local_path(folder).glob("*.tar")):
            with _skip_bad_users(on_problem):
                self.import_user(file)
                count += 1
                if on_user is not None:
                    on_user(count)
        return count

    # ── inside ──

    def _head(self, user_id: str) -> UserHead | None:
        check_user_id(user_id, self._limits)
        store = self._opener.open()
        if store is None:
            return None
        return _head_of(store, store.log.user_key(user_id))

    def _change(
        self, user_id: str, version: str | None, change: Callable[[UserHead], UserHead | None]
    ) -> tuple[OpenStore, UserHead, UserHead]:
        """Commit a change of a user; return the store and the heads before and after."""
        check_user_id(user_id, self._limits)
        store = self._opener.open()
        if store is None:
            raise self._not_found(user_id, version, None)
        try:
            before, after = store.log.commit(store.log.user_key(user_id), change)
        except ErasedSinceError as erased:  # it was done, and a reader may have seen it
            before, after = erased.heads
        return store, before, after

    def _check_listed(self, store: OpenStore, version: AdapterVersion) -> None:
        """Raise AdapterNotFoundError unless a version is live now, and remove its copies here."""
        head = _head_of(store, version.user_key)
        live = None if head is None else head.find(version.version)
        if live is None or live.files != version.files:
            store.blobs.forget(version.user_key, None if head is None else version.version)
            raise self._not_found(version.user_id, version.version, head)

    def _live(self, user_id: str, version: str | None, head: UserHead | None) -> AdapterVersion:
        """Return a live version of `head`, None meaning the active one, or raise what is there."""
        live = None
        if head is not None:
            live = head.find(head.active if version is None else version)
        if live is None:
            raise self._not_found(user_id, version, head)
        return live

    def _not_found(
        self, user_id: str, version: str | None, head: UserHead | None
    ) -> AdapterNotFoundError:
        user = f"user {shorten(user_id)}"
        if head is None or not head.versions:
            return AdapterNotFoundError(
                f"{user} has no adapter in {self.url}: personalize and publish one first"
            )
        newest = head.versions[-1].version
        count = "1 version" if len(head.versions) == 1 else f"{len(head.versions)} versions"
        if version is None:
            return AdapterNotFoundError(
                f"{user} has {count} in {self.url} and none is active: "
                f"activate one, such as the newest, {newest}"
            )
        return AdapterNotFoundError(
            f"{user} has no version {shorten(version)} in {self.url}, but {count}: "
            f"the newest is {newest}"
        )

    def _no_candidate(self, user_id: str, version: str) -> AdapterNotFoundError:
        return AdapterNotFoundError(
            f"user {shorten(user_id)} has no candidate {shorten(version)} in {self.url}: it was "
            "withdrawn, replaced or erased; personalize the user again"
        )

    def _missing(self, version: AdapterVersion) -> IntegrityError:
        folder = layout.version_folder(version.user_key, version.version)
        there = self._backend.list_folder(folder)
        for name in layout.ADAPTER_FILES:
            if name not in there:
                where = location(self._backend.url, f"{folder}/{name}")
                return IntegrityError(
                    f"{where} is missing; restore it from a backup, activate another version, "
                    "or publish again"
                )
        return IntegrityError(
            f"the key that {location(self._backend.url, folder)} is encrypted with is missing; "
            "restore it from a backup, or publish again"
        )


@contextmanager
def _skip_bad_users(on_problem: Callable[[AdapterStoreError], None] | None) -> Iterator[None]:
    """Give `on_problem`, where it is given, what is wrong with one user, and go on.

    Storage that fails, fails for all: that is raised.
    """
    try:
        yield
    except (BackendError, AdapterNotFoundError):
        raise
    except AdapterStoreError as error:
        if on_problem is None:
            raise
        on_problem(error)


def _check_limit(limit: int) -> None:
    if limit < 1:
        raise InvalidAdapterError(f"limit is {limit}: give at least 1")


def _check_same_base(version: AdapterVersion, base: Mapping[str, str]) -> None:
    differences = base_differences(version.base, base)
    if differences:
        parts = "; ".join(
            f"{part} was {value_or_none(trained)} and is {value_or_none(asked)}"
            for part, (trained, asked) in differences.items()
        )
        trained_on = version.base.get("model")
        raise BaseModelMismatchError(
            f"version {version.version} of user {shorten(version.user_id)} was trained on another "
            f"base model ({value_or_none(trained_on)}, "
            f"now {value_or_none(base.get('model'))}): {parts}; "
            f"{_what_to_load(version, differences)}, or personalize the user again on this one",
            differences,
            trained_on,
        )


def _what_to_load(
    version: AdapterVersion, differences: Mapping[str, tuple[str | None, str | None]]
) -> str:
    """Return what to do about a base that is another one: most often its task adapter is."""
    trained_on = version.base.get("model")
    if differences.keys() == {"task_adapter"}:
        if differences["task_adapter"][0] in (None, "none"):
            return "load the base without a task adapter, as it was trained"
        name = version.metadata.get("task_adapter")
        called = f" {shorten(name)}" if isinstance(name, str) else ""
        return f"load the base with the task adapter{called} (task_adapter=, --task-adapter)"
    options = f" (model={trained_on!r}, --model {trained_on})" if trained_on else ""
    return f"load the base that it was trained on{options}"


def _head_of(store: OpenStore, user_key: str) -> UserHead | None:
    """Return a user's head, once this machine has no copy from before an erasure that it tells of.

    The erasure may have been on any machine.
    """
    head = store.log.head(user_key)
    if head is None or not head.erased_seq:
        return head
    copies = store.blobs.copies(head.user_key)
    if all(head.find(version) is not None for version in copies):
        return head
    # Read after the look: it lists whatever was fetched until then.
    newer = store.log.head_or_new(head.user_key)
    for version in copies:
        if newer.find(version) is None:
            store.blobs.forget(head.user_key, version)
    return head


def _head_or_problem(store: OpenStore, user_key: str) -> UserHead | AdapterStoreError | None:
    try:
        return store.log.head(user_key)
    except UNREADABLE as error:
        return error


def _entry_or_none(store: OpenStore, user_key: str, seq: int) -> UserHead | None:
    try:
        return store.log.entry(user_key, seq)
    except FileNotFoundError:  # trimmed or erased meanwhile
        return None


def _history_entry(entry: UserHead) -> HistoryEntry:
    changed = entry.find(entry.operation_version)
    return HistoryEntry(
        seq=entry.seq,
        at=entry.updated_at,
        operation=entry.operation,
        version=entry.operation_version,
        active=entry.active,
        reason=entry.reason,
        metrics=changed.metrics if changed else {},
    )
