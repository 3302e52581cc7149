"""The store: publish, resolve, fetch and the rest of the interface, on any backend.

A change is one new log entry with the user's whole head, put where no entry was: whoever loses that race reads the
winner's entry and tries again on top of it (`log.py`). Data comes first, the entry last, so that a version which is
listed is there. What is remembered between calls is checked against the storage before it is believed, and any number
of threads and processes may use the same store. Calls block; asynchronous callers use a thread.
"""

import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from adapter_store import layout
from adapter_store.backends.local import LocalBackend, local_path
from adapter_store.backends.parallel import each, is_near
from adapter_store.backends.probing import probe_put_if_absent
from adapter_store.backends.protocol import Backend, open_backend
from adapter_store.blobs import Blobs
from adapter_store.cache import AdapterCache
from adapter_store.checks import (
    check_alpha,
    check_base,
    check_data_seq,
    check_facts,
    check_idempotency_key,
    check_reason,
    check_tau,
    check_user_id,
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
from adapter_store.log import ErasedSinceError, Log, now
from adapter_store.open_store import Opened
from adapter_store.operations import gc as collecting
from adapter_store.operations.erasing import erase
from adapter_store.operations.gc import Collected
from adapter_store.operations.publishing import (
    Terms,
    activated,
    publish_version,
    remove_dropped,
    without,
)
from adapter_store.operations.verifying import UserReport, Verified, verify_user
from adapter_store.root import MIN_PEPPER_BYTES, Root, make_root, open_root
from adapter_store.text import location, shorten, value_or_none, without_secrets

_NOTHING: Mapping[str, Any] = {}
_ROOT_TRUST_SECONDS = (
    60.0  # on remote storage; it changes only where a store is removed and made anew
)
_ENTRIES_KEPT = 100
_MAX_EXPORTS = 10


class _Known(NamedTuple):
    """The store as it was opened, what marked its root file then, and until when that is believed of remote storage."""

    opened: Opened
    mark: Hashable
    trusted_until: float


class AdapterStore:
    """Every user's adapters, version by version.

    `place` is a folder ("~" is expanded), a URL (file://, memory://name shared in this process by name, s3://bucket/prefix,
    gs://bucket/prefix, az://container/prefix) or a Backend. `pepper` is the secret (at least 16 bytes) that user
    keys are made with; without one the store makes and keeps its own. `keys` makes an encrypted store, and opens it.
    `cache` is a folder, or an AdapterCache, where fetched adapters are kept on this machine. Opening reads and makes
    nothing; the first `prepare` or `publish` makes the store. Each call may raise BackendError, and KeyMismatchError,
    FormatVersionError or IntegrityError where the store is not what it should be.
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
                f"keys is {shorten(keys)}, expected a KeyProvider such as EnvironmentKeys or FileKeys"
            )
        self._backend = open_backend(place)
        self._pepper = pepper
        self._keys = keys
        self._cache = (
            cache if cache is None or isinstance(cache, AdapterCache) else AdapterCache(cache)
        )
        self._limits = limits or Limits()
        self._known: _Known | None = None
        self._probed = False
        self._lock = Lock()

    def __repr__(self) -> str:
        return f"AdapterStore({self.url!r})"

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs to open the same store; its keys and its pepper are part of it."""
        return {**self.__dict__, "_known": None, "_probed": False, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())

    @property
    def url(self) -> str:
        """The store's place as a URL, with userinfo and query masked."""
        return without_secrets(self._backend.url)

    def is_encrypted(self) -> bool:
        """Tell whether there is a store here that is encrypted. Raises what opening it raises."""
        opened = self._open()
        return opened is not None and opened.root.vault is not None

    def exists(self) -> bool:
        """Tell whether there is a store in this place yet; the first publish makes it. Raises what opening it raises."""
        return self._open() is not None

    # ── publish ──

    def prepare(self, user_id: str) -> None:
        """Check, before long work, that a publish for this user could be stored; makes the store where there is none.

        InvalidAdapterError for the user id, BackendError where the store cannot be written.
        """
        check_user_id(user_id, self._limits)
        self._probed = False
        self._open_to_write()

    def data_seq(self, user_id: str) -> int:
        """Return what `publish` takes as `data_seq`: asked before a user's data is read, it fences off an erasure."""
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
        idempotency_key: str | None = None,
        expected_active: str | Unset | None = UNSET,
        data_seq: int | None = None,
        reason: str = "",
    ) -> AdapterVersion:
        """Store an adapter as the user's newest version, active at once unless `activate` is False, and return it.

        The adapter is a peft folder, of which adapter_model.safetensors and adapter_config.json are read, or exactly
        these two as bytes by name. `base` is the fingerprint of the model it was trained on. `idempotency_key`: while
        a version published with that key lives, it is returned and nothing is published. `expected_active`: publish
        only while that version (None: no version) is active, else PublishConflictError. `data_seq`: what `data_seq()`
        returned before the training data was read; UserErasedError where the user was erased since then (without one:
        since this call began). `reason` is kept for the history. Beyond `Limits.live_versions` the oldest version that
        is not active is dropped, its files too. InvalidAdapterError for whatever cannot be accepted; nothing has been
        stored then.
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
            files={name: FileFacts.of(data) for name, data in files.items()},
            base=check_base(base, self._limits),
            metrics=check_facts(metrics, "metrics", self._limits),
            alpha=check_alpha(alpha),
            tau=check_tau(tau),
            metadata=check_facts(metadata, "metadata", self._limits),
            idempotency_key=check_idempotency_key(idempotency_key),
        )
        reason = check_reason(reason, self._limits)
        if data_seq is not None:
            check_data_seq(data_seq, self.data_seq(user_id))
        opened = self._open_to_write()

        terms = Terms(
            activate=activate,
            expected_active=expected_active,
            reason=reason,
            live_versions=self._limits.live_versions,
            data_seq=data_seq,
        )
        return publish_version(
            opened, described(user_key=opened.log.user_key(user_id)), files, terms
        )

    def import_peft(
        self, user_id: str, folder: str | os.PathLike[str], *, base: Mapping[str, str], **facts: Any
    ) -> AdapterVersion:
        """Publish a plain peft folder that was trained elsewhere, on the model with the fingerprint `base`.

        `facts` are those of `publish`. Raises what it raises.
        """
        return self.publish(
            user_id,
            local_path(folder),
            base=base,
            **{"reason": "imported from a peft folder", **facts},
        )

    # ── read ──

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
                f"version {found.version} of user {shorten(user_id)} was trained on another base model "
                f"({value_or_none(found.base.get('model'))}, now {value_or_none((base or {}).get('model'))}): {parts}; "
                "load the base that it was trained on, or personalize the user again on this one",
                differences,
            )
        return found

    def fetch(self, version: AdapterVersion) -> dict[str, bytes]:
        """Return the content of a version's files by name, its size and sha256 checked this very time.

        AdapterNotFoundError where the version was deleted, or its user erased, since it was resolved, IntegrityError
        where a file is damaged.
        """
        opened = self._open()
        if opened is None:
            raise self._not_found(version.user_id, version.version, None)
        self._check_listed(opened, version)
        try:
            return opened.blobs.read(version, partial(self._check_listed, opened, version))
        except FileNotFoundError:
            self._check_listed(opened, version)
            raise self._missing(version) from None

    def fetch_dir(self, version: AdapterVersion) -> Path:
        """Return a folder on this machine that holds a version as a plain peft folder, checked as in `fetch`.

        Read only, and to be read soon: in a local store it is the store's own, elsewhere a temporary one of this
        process, removed at its exit, or earlier where many others were asked for since. Deleting the version in this
        process takes either away, erasing the user in any process of this machine does.
        """
        files = self.fetch(version)
        if isinstance(self._backend, LocalBackend) and self._keys is None:
            return self._backend.path_of(layout.version_folder(version.user_key, version.version))
        opened = self._open()
        if opened is None:
            raise self._not_found(version.user_id, version.version, None)
        try:
            return opened.blobs.as_folder(version, files)
        finally:
            self._check_listed(
                opened, version
            )  # an erasure since has missed this folder, and takes it away now

    def versions(self, user_id: str) -> list[AdapterVersion]:
        """Return a user's live versions in the order of their publishing; none for an unknown user."""
        head = self._head(user_id)
        return list(head.versions) if head else []

    def active(self, user_id: str) -> str | None:
        """Return the id of a user's active version, None where none is active or the user is unknown."""
        head = self._head(user_id)
        return head.active if head else None

    def history(
        self, user_id: str, *, before_seq: int | None = None, limit: int = 100
    ) -> list[HistoryEntry]:
        """Return a user's latest changes, oldest first: what was done when and why, and what was active from then on.

        Up to `limit` of them, before entry `before_seq`, such as the first one's `seq` of the page after. Of changes
        older than a month the newest hundred are kept, of an erased user nothing but that.
        """
        check_user_id(user_id, self._limits)
        if limit < 1:
            raise InvalidAdapterError(f"limit is {limit}: give at least 1")
        opened = self._open()
        if opened is None:
            return []
        head = opened.log.head_or_new(opened.log.user_key(user_id))
        end = head.seq + 1 if before_seq is None else before_seq
        seqs = [seq for seq in opened.log.seqs(head.user_key) if head.erased_seq <= seq < end]
        found: list[HistoryEntry] = []
        for entry in each(
            self._backend, partial(_entry_or_none, opened, head.user_key), seqs[-limit:]
        ):
            if entry is not None:
                changed = entry.find(entry.operation_version)
                found.append(
                    HistoryEntry(
                        seq=entry.seq,
                        at=entry.updated_at,
                        operation=entry.operation,
                        version=entry.operation_version,
                        active=entry.active,
                        reason=entry.reason,
                        metrics=changed.metrics if changed else {},
                    )
                )
        return found

    def list_users(
        self,
        cursor: str | None = None,
        limit: int = 1000,
        *,
        on_problem: Callable[[AdapterStoreError], None] | None = None,
    ) -> tuple[list[UserHead], str | None]:
        """Return up to `limit` users in the order of their keys, and the cursor of the next page, None on the last.

        A user whose versions were all deleted is listed without versions, an erased one is not listed. `on_problem` is
        called with what is wrong with a user that cannot be read; without it, that is raised: IntegrityError,
        KeyMismatchError or FormatVersionError.
        """
        if cursor is not None and not (isinstance(cursor, str) and layout.is_sha256(cursor)):
            raise InvalidAdapterError(
                f"cursor {shorten(cursor)} comes from no listing: pass the one returned, or none"
            )
        if limit < 1:
            raise InvalidAdapterError(f"limit is {limit}: give at least 1")
        opened = self._open()
        if opened is None:
            return [], None
        keys = list(islice(opened.log.user_keys(cursor or ""), limit + 1))
        # A folder without an entry is a first publish under way: not a user yet.
        found = each(self._backend, partial(_head_or_problem, opened), keys[:limit])
        heads = []
        for head in found:
            with _passed_over(on_problem):
                if isinstance(head, AdapterStoreError):
                    raise head
                if head is not None and not head.is_erased:
                    heads.append(head)
        return heads, keys[limit - 1] if len(keys) > limit else None

    # ── change ──

    def activate(
        self,
        user_id: str,
        version: str,
        *,
        expected_active: str | Unset | None = UNSET,
        reason: str = "",
    ) -> AdapterVersion:
        """Make a live version the active one and return it; where it is already, nothing is written.

        `expected_active`: only while that version (None: no version) is active, else PublishConflictError.
        """
        check_reason(reason, self._limits)

        def change(head: UserHead) -> UserHead | None:
            self._check_expected(user_id, head, expected_active)
            if self._live(user_id, version, head).version == head.active:
                return None
            changed = activated(head, version)
            return replace(
                without(changed, set()),
                operation="activate",
                operation_version=version,
                reason=reason,
            )

        _, _, head = self._change(user_id, version, change)
        return self._live(user_id, version, head)

    def rollback(
        self, user_id: str, *, expected_active: str | Unset | None = UNSET, reason: str = ""
    ) -> AdapterVersion:
        """Make the version active that was active before the present one, and return it; again, the one before that.

        AdapterNotFoundError where there is none to go back to.
        """
        check_reason(reason, self._limits)

        def change(head: UserHead) -> UserHead:
            self._check_expected(user_id, head, expected_active)
            if not head.versions:
                raise self._not_found(user_id, None, head)
            if not head.previous:
                raise AdapterNotFoundError(
                    f"user {shorten(user_id)} has no earlier active version in {self.url} to go back to: "
                    "activate the one that you want"
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

    def delete_version(self, user_id: str, version: str, *, reason: str = "") -> None:
        """Remove a version, and its files. Deleting the active one leaves the user with none active."""
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

        From then on every `resolve` and `fetch` in any process refuses, the store and this machine's cache hold no byte
        of the user's adapters and keys, and publishes of what was trained on earlier data raise UserErasedError. Other
        machines' caches empty themselves of the user at their next access, and at their next `gc`. Interrupted, or
        where it raises BackendError, it is called again.
        """
        check_user_id(user_id, self._limits)
        opened = self._open_to_write()
        erase(opened, opened.log.user_key(user_id))

    # ── look after ──

    def verify(
        self, user_id: str | None = None, *, on_user: Callable[[UserReport], None] | None = None
    ) -> Verified:
        """Read and check everything of one user, or of all, past any cache; damage is reported, not raised.

        `on_user` is called with each user's report as it goes.
        """
        if user_id is not None:
            check_user_id(user_id, self._limits)
        opened, done = self._open(), Verified()
        if opened is None:
            return done
        for user_key in (
            opened.log.user_keys() if user_id is None else [opened.log.user_key(user_id)]
        ):
            report = verify_user(opened, user_key)
            done.add(report)
            if on_user is not None:
                on_user(report)
        return done

    def gc(
        self,
        *,
        grace: timedelta = timedelta(days=1),
        entry_age: timedelta = timedelta(days=30),
        dry_run: bool = False,
        on_user: Callable[[int], None] | None = None,
    ) -> Collected:
        """Remove what nobody needs, safely beside writers, and return what that was.

        That is: files that no entry names and that are older than `grace` (what killed publishers left), log entries
        older than `entry_age` beyond a user's newest hundred, the rest of erasures that were interrupted, and copies of
        deleted versions in this machine's cache. `on_user` is called with the number of users done so far.
        """
        opened = self._open()
        done = Collected()
        if opened is None:
            return done
        rules = collecting.Rules(
            grace.total_seconds(), _ENTRIES_KEPT, entry_age.total_seconds(), dry_run
        )
        if min(rules.grace, rules.entry_age) < 0:
            raise InvalidAdapterError(
                "a grace below zero would remove what is being written: give at least 0"
            )
        storage_time = collecting.storage_time(self._backend, dry_run)
        for user_key in opened.user_keys():
            collecting.collect_user(opened, user_key, rules, storage_time, done)
            if on_user is not None:
                on_user(done.users)
        collecting.collect_unfinished(opened, rules, storage_time, done)
        if self._cache is not None:
            collecting.collect_cache(opened, self._cache, rules, done)
        return done

    def rotate_keys(self, *, on_user: Callable[[int], None] | None = None) -> int:
        """Wrap every key of an encrypted store with the newest master key; return how many were not yet.

        Afterwards the older master keys can be destroyed. KeyMismatchError for a store without encryption. Where a key
        cannot be read, all others are wrapped first; then the first such error comes, and says how many there are.
        """
        opened = self._open()
        if opened is None:
            return 0
        problems: list[AdapterStoreError] = []
        rewrapped = collecting.rotate_pepper(opened, problems)
        for number, user_key in enumerate(opened.log.user_keys(top=layout.KEYS), 1):
            rewrapped += collecting.rotate_user_keys(opened, user_key, problems)
            if on_user is not None:
                on_user(number)
        if problems:
            raise type(problems[0])(
                f"{rewrapped} keys were wrapped anew, {len(problems)} could not be read and stay as they are (keep the "
                f"older master keys until they are mended); the first: {problems[0]}"
            )
        return rewrapped

    # ── in and out ──

    def export_peft(
        self, user_id: str, folder: str | os.PathLike[str], version: str | None = None
    ) -> Path:
        """Write a version (None: the active one) as a plain peft folder, which must be new or empty; return its path.

        Raises what `resolve` and `fetch` raise, BackendError where the folder cannot be written.
        """
        path = local_path(folder)
        write_new_folder(path, self.fetch(self.resolve(user_id, version)))
        return path

    def export_user(self, user_id: str, file: str | os.PathLike[str]) -> Path:
        """Write all versions of a user, with their facts, as a new tar file; return its path.

        The archive is not encrypted. AdapterNotFoundError for an unknown user, IntegrityError where something is
        damaged, BackendError where the file is there already or cannot be written.
        """
        check_user_id(user_id, self._limits)
        from adapter_store.operations import archive  # tar is slow to import, and few need it

        path, opened = local_path(file), self._open()
        for _ in range(_MAX_EXPORTS):
            head = opened.log.head(opened.log.user_key(user_id)) if opened else None
            if opened is None or head is None or not head.versions:
                raise self._not_found(user_id, None, head)
            with suppress(AdapterNotFoundError):  # a version was deleted meanwhile
                archive.write_archive(opened, head, path, self.fetch)
                return path
        raise PublishConflictError(
            f"versions of user {shorten(user_id)} were deleted each of {_MAX_EXPORTS} times that it was exported: "
            "nothing was written; try again"
        )

    def import_user(self, file: str | os.PathLike[str]) -> UserHead:
        """Read a user from a tar file that `export_user` wrote, of this store or of another, and return the user's head.

        Versions get new ids, and an idempotency key where they had none, so that a repeated import finds them: those that
        are there already are left as they are, and those beyond `Limits.live_versions` stay away. All is imported or
        nothing. InvalidAdapterError where the file is not such an archive. UserErasedError where the user was erased in
        this store after it was written; of an archive that this store did not write nobody knows, so one erasure ever is
        enough.
        """
        from adapter_store.operations import archive, importing

        path = local_path(file)
        try:
            with path.open("rb") as opened_file:
                manifest = archive.check_archive(opened_file, self._limits, str(path))
                opened = self._open_to_write()
                return importing.import_archive(
                    opened, opened_file, manifest, self._limits, str(path)
                )
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

        Users with a file there already are passed over, so that an export that was interrupted goes on where it was.
        `on_user` is called with the number written so far, `on_problem` with why a user could not be exported; without
        it, that is raised. Raises what `export_user` raises.
        """
        path, count = local_path(folder), 0
        if path.exists() and not path.is_dir():
            raise BackendError(
                f"{path} is no folder: name a new one, or one that an earlier export wrote"
            )
        cursor: str | None = None
        while True:
            heads, cursor = self.list_users(cursor, on_problem=on_problem)
            for head in heads:
                target = path / f"{head.user_key}.tar"
                if not head.versions or target.exists():
                    continue
                with (
                    suppress(AdapterNotFoundError),
                    _passed_over(on_problem),
                ):  # deleted or erased since it was listed
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
        """Read every tar file of a folder that `export_users` wrote; return how many could be imported. Safe to repeat.

        `on_user` is called with their number so far, `on_problem` with why a file could not be imported; without it,
        that is raised. Raises what `import_user` raises.
        """
        count = 0
        for file in sorted(local_path(folder).glob("*.tar")):
            with _passed_over(on_problem):
                self.import_user(file)
                count += 1
                if on_user is not None:
                    on_user(count)
        return count

    # ── inside ──

    def _open(self) -> Opened | None:
        """Return the opened store, None where there is none yet; the root file is looked at, remote only now and then."""
        known = self._known
        if (
            known is not None
            and not is_near(self._backend)
            and time.monotonic() < known.trusted_until
        ):
            return known.opened
        found = self._backend.stat(layout.ROOT_FILE)
        mark = None if found is None else found.mark
        if known is not None and mark is not None and mark == known.mark:
            if not is_near(self._backend):
                self._known = known._replace(trusted_until=time.monotonic() + _ROOT_TRUST_SECONDS)
            return known.opened
        root = open_root(self._backend, self._pepper, self._keys)
        if root is None:
            self._known = None
            return None
        return self._keep(root, mark)

    def _keep(self, root: Root, mark: Hashable) -> Opened:
        with self._lock:
            known = self._known
            if known is not None and (known.opened.root.store_id, known.opened.root.pepper) == (
                root.store_id,
                root.pepper,
            ):
                opened = known.opened  # with what its log remembers
            else:
                blobs = Blobs(self._backend, root, self._cache, self._limits)
                opened = Opened(self._backend, root, Log(self._backend, root), blobs)
            self._known = _Known(opened, mark, time.monotonic() + _ROOT_TRUST_SECONDS)
            return opened

    def _open_to_write(self) -> Opened:
        """Return the opened store, made where there is none, on storage that was seen to keep what is there."""
        if not self._probed:
            probe_put_if_absent(self._backend)
            self._probed = True
        opened = self._open()
        if opened is None:
            root = make_root(self._backend, self._pepper, self._keys)
            found = self._backend.stat(layout.ROOT_FILE)
            opened = self._keep(root, None if found is None else found.mark)
        return opened

    def _head(self, user_id: str) -> UserHead | None:
        check_user_id(user_id, self._limits)
        opened = self._open()
        if opened is None:
            return None
        return self._head_of(opened, opened.log.user_key(user_id))

    @staticmethod
    def _head_of(opened: Opened, user_key: str) -> UserHead | None:
        """Return a head, once this machine keeps nothing from before an erasure, of whatever machine, that it tells of."""
        head = opened.log.head(user_key)
        if head is None or not head.erased_seq:
            return head
        kept = opened.blobs.kept_here(head.user_key)
        if all(head.find(version) is not None for version in kept):
            return head
        newer = opened.log.head_or_new(
            head.user_key
        )  # read after the look: it lists whatever was fetched until then
        for version in kept:
            if newer.find(version) is None:
                opened.blobs.forget(head.user_key, version)
        return head

    def _change(
        self, user_id: str, version: str | None, change: Callable[[UserHead], UserHead | None]
    ) -> tuple[Opened, UserHead, UserHead]:
        """Commit a change to one of a user's live versions; return the opened store and the heads before and after."""
        check_user_id(user_id, self._limits)
        opened = self._open()
        if opened is None:
            raise self._not_found(user_id, version, None)
        try:
            heads = opened.log.commit(opened.log.user_key(user_id), change)
        except ErasedSinceError as erased:  # it was done, and somebody may have seen it
            heads = erased.heads
        return opened, *heads

    def _check_expected(self, user_id: str, head: UserHead, expected: str | Unset | None) -> None:
        if expected is not UNSET and head.active != expected:
            raise PublishConflictError(
                f"user {shorten(user_id)} has {value_or_none(head.active)} active where {value_or_none(expected)} was "
                "expected: nothing was changed; look at what is active, then decide"
            )

    def _check_listed(self, opened: Opened, version: AdapterVersion) -> None:
        """Raise AdapterNotFoundError unless a version is live now; this machine's copies of one that is not are removed."""
        head = self._head_of(opened, version.user_key)
        found = None if head is None else head.find(version.version)
        if found is None or found.files != version.files:
            opened.blobs.forget(version.user_key, None if head is None else version.version)
            raise self._not_found(version.user_id, version.version, head)

    def _live(self, user_id: str, version: str | None, head: UserHead | None) -> AdapterVersion:
        """Return a live version of `head`, None meaning the active one, or say what there is instead."""
        found = None if head is None else head.find(head.active if version is None else version)
        if found is None:
            raise self._not_found(user_id, version, head)
        return found

    def _not_found(
        self, user_id: str, version: str | None, head: UserHead | None
    ) -> AdapterNotFoundError:
        user = f"user {shorten(user_id)}"
        if head is None or not head.versions:
            return AdapterNotFoundError(
                f"{user} has no adapter in {self.url}: personalize and publish one first"
            )
        newest = head.versions[-1].version
        count = f"{len(head.versions)} version{'s' if len(head.versions) > 1 else ''}"
        if version is None:
            return AdapterNotFoundError(
                f"{user} has {count} in {self.url} and none is active: activate one, such as the newest, {newest}"
            )
        return AdapterNotFoundError(
            f"{user} has no version {shorten(version)} in {self.url}, but {count}: the newest is {newest}"
        )

    def _missing(self, version: AdapterVersion) -> IntegrityError:
        folder = layout.version_folder(version.user_key, version.version)
        there = self._backend.list_folder(folder)
        name = next((name for name in layout.ADAPTER_FILES if name not in there), None)
        where = location(self._backend.url, f"{folder}/{name}" if name else folder)
        return IntegrityError(
            f"{where} is missing; restore it from a backup, activate another version, or publish again"
            if name
            else f"the key that {where} is encrypted with is missing; restore it from a backup, or publish again"
        )


@contextmanager
def _passed_over(on_problem: Callable[[AdapterStoreError], None] | None) -> Iterator[None]:
    """Give `on_problem`, where there is one, what is wrong with one user; storage that fails, fails for all."""
    try:
        yield
    except (BackendError, AdapterNotFoundError):
        raise
    except AdapterStoreError as error:
        if on_problem is None:
            raise
        on_problem(error)


def _head_or_problem(opened: Opened, user_key: str) -> UserHead | AdapterStoreError | None:
    try:
        return opened.log.head(user_key)
    except UNREADABLE as error:
        return error


def _entry_or_none(opened: Opened, user_key: str, seq: int) -> UserHead | None:
    try:
        return opened.log.entry(user_key, seq)
    except FileNotFoundError:  # trimmed or erased meanwhile
        return None
