"""Users' logs: find a head, commit the next one.

Put-if-absent of an entry is the commit; nothing else decides. Two things are remembered in memory,
and both are checked before they are believed. A head counts while no entry follows it and its own
entry is still there, looked at in this order: entries go in ascending order, so the second look
says that the first was not made too late. The storage's mark tells its own from another one put
there since. And an entry that was put where an erased or trimmed one had been before is taken
back: it would lie below the head, where no reader sees it.
"""

import base64
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from os import urandom
from threading import Lock
from typing import Any, NamedTuple

from adapter_store import layout
from adapter_store.backends.protocol import Backend
from adapter_store.entry import MAX_ENTRY_BYTES, decode, encode, parse
from adapter_store.errors import (
    UNREADABLE,
    BackendError,
    FormatVersionError,
    IntegrityError,
    InvalidAdapterError,
    PublishConflictError,
)
from adapter_store.facts import StoredFile, UserHead
from adapter_store.listing import user_keys
from adapter_store.root import Root, keyed_hash
from adapter_store.text import location, shorten, to_json
from adapter_store.vault import key_of

_MAX_ATTEMPTS = 200
_MAX_PAUSE_SECONDS = 0.05
_MAX_LOOKS = 20
_MAX_REMEMBERED = 1024


Heads = tuple[UserHead, UserHead]
"""A user's head before and after a commit; twice the same where nothing was left to do."""


def now() -> datetime:
    """Return the time to record, aware, in UTC."""
    return datetime.now(UTC)


class ErasedSinceError(Exception):
    """A change was made, and the user erased right after it. Never leaves this package."""

    def __init__(self, before: UserHead, after: UserHead) -> None:
        super().__init__()
        self.heads: Heads = before, after


class _EntryVanished(Exception):  # noqa: N818 - an outcome that its only caller handles
    """An entry was put, and was not there a moment later. Never leaves this module."""


class _Remembered(NamedTuple):
    """A head that was read.

    `own` is the key of its entry, `mark` the storage's mark of that very writing, and `following`
    the key that the next entry would have.
    """

    head: UserHead
    own: str
    mark: Hashable
    following: str


class Log:
    """The logs of all users of an open store. Thread-safe."""

    def __init__(self, backend: Backend, root: Root) -> None:
        self._backend = backend
        self._vault = root.vault
        self.user_key = lru_cache(_MAX_REMEMBERED)(partial(keyed_hash, root.pepper))
        """Returns the key of a user id, under which all of the user's things lie."""
        self._remembered: OrderedDict[str, _Remembered] = OrderedDict()
        self._lock = Lock()

    def head(self, user_key: str) -> UserHead | None:
        """Return the newest entry of a user, None where no entry exists.

        Raises IntegrityError, FormatVersionError.
        """
        known = self._remembered.get(user_key)
        if known is not None and self._is_still_head(known):
            return known.head
        seq = None
        for _ in range(_MAX_LOOKS):
            seq = self._newest(user_key)
            if seq is None:
                return None
            # Before it is read: the mark does not fit another one that is put in between.
            own = self._stat(user_key, seq)
            try:
                head = self.entry(user_key, seq)
            except FileNotFoundError:  # erased since
                continue
            # So it is the one that was listed, and not one put there late; where many write,
            # another has followed it.
            if self._newest(user_key) == seq or self._is_followed(head):
                self._remember(head, own)
                return head
        raise self._damaged(user_key, seq or 0, "it is listed, but it or its key is not there")

    def head_or_new(self, user_key: str, user_id: str = "") -> UserHead:
        """Return a user's head, for a new user one of seq 0 without versions."""
        return self.head(user_key) or UserHead(
            user_id=user_id,
            user_key=user_key,
            seq=0,
            commit="",
            updated_at=now(),
            operation="",
            operation_version="",
            active=None,
            versions=(),
        )

    def commit(
        self,
        user_key: str,
        change: Callable[[UserHead], UserHead | None],
        known: UserHead | None = None,
    ) -> Heads:
        """Put what `change` makes of the head as the next entry; return the heads before and after.

        Args:
            user_key: The user.
            change: Gets the head, for a new user one without versions; it is called again each time
                that another commit came first, and returns None where nothing is left to do. What
                it raises comes through, with nothing changed.
            known: A head that the caller has read: it is tried on top of that first, since the put
                tells whether it is newest.

        Raises:
            ErasedSinceError: The user was erased right after: a reader may have seen the change.
            BackendError: The call slept so long that its entry was trimmed, or the one after it
                cannot be read: then it is unknown whether the change counted.
            PublishConflictError: Others committed first, each time.
        """
        for attempt in range(_MAX_ATTEMPTS):
            before = self.head_or_new(user_key) if known is None or attempt else known
            changed = change(before)
            if changed is None:
                return before, before
            after = self.following(before, changed)
            try:
                if self._put(after) and self._is_committed(after):
                    return before, after
            except _EntryVanished:
                if self._is_erased_after(after):
                    raise ErasedSinceError(before, after) from None
                raise BackendError(
                    f"a change of user {shorten(before.user_id)} took so long, or was followed by "
                    "something that cannot be read, that it is unknown whether it counted: look at "
                    "what is active, then decide"
                ) from None
            with self._lock:
                self._remembered.pop(user_key, None)
            time.sleep(_chance() * min(_MAX_PAUSE_SECONDS, 0.001 * 2 ** min(attempt, 10)))
        raise PublishConflictError(
            f"user {shorten(before.user_id)} was changed by others {_MAX_ATTEMPTS} times in a row, "
            "always first: nothing was changed by this call; try again when fewer write at once"
        )

    def commit_blind(self, user_key: str, make: Callable[[int, str], UserHead]) -> UserHead:
        """Put the entry of an erasure, which rests on no earlier one: that may be damaged.

        `make` gets its number and the commit of the entry before, "" where that cannot be read. It
        is called after the entries before it were looked at and before this one is put. Where
        another erasure came after it, that will do.
        """
        for _ in range(_MAX_ATTEMPTS):
            newest = self._newest(user_key) or 0
            before = self._readable_or_none(user_key, newest)
            entry = make(newest + 1, before.commit if before else "")
            with suppress(_EntryVanished):
                if self._put(entry) and self._is_committed(entry):
                    return entry
            if self._is_erased_after(entry):
                return entry
        raise PublishConflictError(
            f"others changed this user {_MAX_ATTEMPTS} times in a row, always first: try again"
        )

    @staticmethod
    def following(before: UserHead, changed: UserHead) -> UserHead:
        """Return `changed` as the entry after `before`."""
        return replace(
            changed,
            seq=before.seq + 1,
            commit=urandom(16).hex(),
            parent=before.commit,
            updated_at=now(),
        )

    def seqs(self, user_key: str) -> list[int]:
        """Return the numbers of a user's entries, ascending."""
        return layout.numbers_of(self._backend.list_folder(layout.log_folder(user_key)))

    def entry(self, user_key: str, seq: int) -> UserHead:
        """Return one entry. FileNotFoundError where it, or the key that sealed it, is gone."""
        try:
            content = parse(self._backend.get(layout.entry_key(user_key, seq), MAX_ENTRY_BYTES + 1))
            head = self._decoded(user_key, seq, content)
            of_user = head.is_erased or self.user_key(head.user_id) == user_key
            if (head.user_key, head.seq) != (user_key, seq) or not of_user:
                raise ValueError("it belongs to another user, or has another number")
        except FormatVersionError as error:
            where = location(self._backend.url, layout.entry_key(user_key, seq))
            raise FormatVersionError(
                f"cannot read {where}: {error}; upgrade the package that reads it"
            ) from None
        except ValueError as error:
            raise self._damaged(user_key, seq, str(error)) from None
        return head

    def remove(self, user_key: str, seq: int) -> None:
        """Remove one entry; of several the lowest first."""
        self._backend.delete(layout.entry_key(user_key, seq))

    def user_keys(self, after: str = "") -> Iterator[str]:
        """Yield the keys of all users, in ascending order, those up to `after` left out."""
        return user_keys(self._backend, layout.USERS, after)

    def _is_still_head(self, known: _Remembered) -> bool:
        if self._backend.stat(known.following) is not None:
            return False
        own = self._backend.stat(known.own)
        return own is not None and own.mark == known.mark

    def _is_erased_after(self, entry: UserHead) -> bool:
        try:
            return self.head_or_new(entry.user_key).erased_seq > entry.seq
        except UNREADABLE:
            return False

    def _is_followed(self, head: UserHead) -> bool:
        following = self._readable_or_none(head.user_key, head.seq + 1)
        return following is not None and following.parent == head.commit

    def _readable_or_none(self, user_key: str, seq: int) -> UserHead | None:
        try:
            return self.entry(user_key, seq)
        except (FileNotFoundError, *UNREADABLE):
            return None

    def _stat(self, user_key: str, seq: int) -> StoredFile | None:
        return self._backend.stat(layout.entry_key(user_key, seq))

    def _newest(self, user_key: str) -> int | None:
        for name in reversed(self._backend.list_folder(layout.log_folder(user_key))):
            seq = layout.number_of(name)
            if seq is not None:
                return seq
        return None

    def _remember(self, head: UserHead, file: StoredFile | None) -> None:
        if file is None:
            return
        own, following = (layout.entry_key(head.user_key, seq) for seq in (head.seq, head.seq + 1))
        with self._lock:
            self._remembered[head.user_key] = _Remembered(head, own, file.mark, following)
            self._remembered.move_to_end(head.user_key)
            if len(self._remembered) > _MAX_REMEMBERED:
                self._remembered.popitem(last=False)

    def _put(self, head: UserHead) -> bool:
        """Put the entry; return False where another one is there.

        An entry of this very commit means that an earlier try arrived.
        """
        key = layout.entry_key(head.user_key, head.seq)
        try:
            sealed = self._sealed(head, self._encoded(head))
        except FileNotFoundError:  # the key: of a user erased since
            return False
        try:
            self._backend.put_if_absent(key, sealed)
        except FileExistsError:
            # The answer to an earlier try of the storage client may have been lost on its way.
            try:
                return self.entry(head.user_key, head.seq).commit == head.commit
            except FileNotFoundError:
                if self._is_erased_after(head):
                    return False
                raise _EntryVanished from None
        return True

    def _is_committed(self, head: UserHead) -> bool:
        """Return True if the entry put is in the log; remove it if it landed below an erasure.

        The newest is remembered. _EntryVanished where it was in the log and is erased by now, or
        where that is unknown.
        """
        # Before the list, which says that nothing was erased until then.
        own = self._stat(head.user_key, head.seq)
        seqs = self.seqs(head.user_key)
        if seqs and seqs[-1] == head.seq:
            self._remember(head, own)
            return True
        if own is None or head.seq not in seqs:
            raise _EntryVanished
        try:
            following = self.entry(head.user_key, head.seq + 1)
        except FileNotFoundError:
            again = self._stat(head.user_key, head.seq)
            if again is None or again.mark != own.mark:
                raise _EntryVanished from None
            may_count = False  # a hole: ours would have gone before the one that followed
        except (IntegrityError, FormatVersionError):
            raise _EntryVanished from None
        else:
            if following.parent == head.commit and following.seq != following.erased_seq:
                return True
            may_count = following.parent in (head.commit, "")
        # Erased, or never there for any reader; and so are those below, which go first.
        for seq in seqs[: seqs.index(head.seq) + 1]:
            self.remove(head.user_key, seq)
        if may_count:
            raise _EntryVanished
        return False

    def _encoded(self, head: UserHead) -> bytes:
        try:
            data = encode(head)
        except (ValueError, RecursionError) as error:
            problem = f"it cannot be written again ({error})"
            raise self._damaged(head.user_key, head.seq - 1, problem) from error
        max_bytes = MAX_ENTRY_BYTES // 2  # sealed it grows by a third
        if len(data) > max_bytes:
            raise InvalidAdapterError(
                f"the log entry of {len(head.versions)} versions of user {shorten(head.user_id)} "
                f"has {len(data)} bytes, at most {max_bytes} are kept: delete versions, or keep "
                "less metadata"
            )
        return data

    def _sealed(self, head: UserHead, data: bytes) -> bytes:
        if not self._vault.is_encrypted or head.is_erased:  # what is left of a user says nothing
            return data
        sealed = self._vault.seal(head.user_key, head.key, f"log/{head.seq}", data)
        return to_json({"format": layout.FORMAT, "sealed": base64.b64encode(sealed).decode()})

    def _decoded(self, user_key: str, seq: int, content: dict[str, Any]) -> UserHead:
        if not self._vault.is_encrypted:
            return decode(content)
        text = content.get("sealed")
        if text is None:
            head = decode(content)
            if not head.is_erased:
                raise ValueError("it is not encrypted, as everything in this store is")
            return head
        if not isinstance(text, str):
            raise ValueError("its seal is not text")
        sealed = base64.b64decode(text, validate=True)
        return decode(parse(self._vault.unseal(user_key, f"log/{seq}", sealed)), key_of(sealed))

    def _damaged(self, user_key: str, seq: int, problem: str) -> IntegrityError:
        where = location(self._backend.url, layout.entry_key(user_key, seq))
        return IntegrityError(
            f"the log entry {where} is damaged: {problem}; restore it from a backup"
        )


def _chance() -> float:
    """Return a number between 0 and 1.

    The module `random` is slow to import, and shares its state with forked children.
    """
    return int.from_bytes(urandom(2), "big") / 65536
