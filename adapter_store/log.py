"""Users' logs: find a head, commit the next one. Put-if-absent of an entry is the commit; nothing else decides.

Two things are remembered in memory, and both are checked before they are believed. A head counts while no entry follows
it and its own entry is still there, looked at in this order: entries go in ascending order, so the second look says that
the first was not made too late. The storage's mark tells its own from another one put there since. And an entry that was
put where an erased or trimmed one had been before is taken back: it would lie below the head, seen by nobody.
"""

import base64
import time
from bisect import bisect_right
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
from adapter_store.backends.parallel import each
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
from adapter_store.root import Root, keyed_hash
from adapter_store.text import location, shorten, to_json
from adapter_store.vault import key_of

_MAX_ATTEMPTS = 200
_MAX_PAUSE_SECONDS = 0.05
_MAX_LOOKS = 20
_MAX_REMEMBERED = 1024
_LISTED_AT_ONCE = 16


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


class _GoneError(Exception):
    """An entry was put, and was not there a moment later. Never leaves this module."""


class _Remembered(NamedTuple):
    """A head, where its entry lies, the mark of that very writing, and where the entry after it would lie."""

    head: UserHead
    own: str
    mark: Hashable
    following: str


class Log:
    """The logs of all users of an opened store. Thread-safe."""

    def __init__(self, backend: Backend, root: Root) -> None:
        self._backend = backend
        self._vault = root.vault
        self.user_key = lru_cache(_MAX_REMEMBERED)(partial(keyed_hash, root.pepper))
        """Gives the key under which a user's things lie."""
        self._remembered: OrderedDict[str, _Remembered] = OrderedDict()
        self._lock = Lock()

    def head(self, user_key: str) -> UserHead | None:
        """Return the newest entry of a user, None where there is none. Raises IntegrityError, FormatVersionError."""
        known = self._remembered.get(user_key)
        if (
            known is not None
            and self._backend.stat(known.following) is None
            and (own := self._backend.stat(known.own)) is not None
            and own.mark == known.mark
        ):
            return known.head
        seq = None
        for _ in range(_MAX_LOOKS):
            seq = self._newest(user_key)
            if seq is None:
                return None
            own = self._stat(
                user_key, seq
            )  # before it is read: of another one put in between the mark does not fit
            try:
                head = self.entry(user_key, seq)
            except FileNotFoundError:  # erased since
                continue
            # So it is the one that was listed, and not one put there late; where many write, another has followed it.
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

        `change` gets a head without versions for a new user; it is called again each time that another commit came
        first, and returns None where nothing is left to do. What it raises comes through, with nothing changed. `known`
        is a head that the caller has read: it is tried on top of that first, since the put tells whether it is newest.
        ErasedSinceError where the user was erased right after: somebody may have seen the change. BackendError where
        the call slept so long that its entry was trimmed, or the one after it cannot be read: then nobody can tell.
        """
        for attempt in range(_MAX_ATTEMPTS):
            before = self.head_or_new(user_key) if known is None or attempt else known
            changed = change(before)
            if changed is None:
                return before, before
            after = self.following(before, changed)
            try:
                if self._put(after) and self._counts(after):
                    return before, after
            except _GoneError:
                if self._is_erased_after(after):
                    raise ErasedSinceError(before, after) from None
                raise BackendError(
                    f"a change of user {shorten(before.user_id)} took so long, or was followed by something that cannot be "
                    "read, that nobody can tell whether it counted: look at what is active, then decide"
                ) from None
            with self._lock:
                self._remembered.pop(user_key, None)
            time.sleep(_chance() * min(_MAX_PAUSE_SECONDS, 0.001 * 2 ** min(attempt, 10)))
        raise PublishConflictError(
            f"user {shorten(before.user_id)} was changed by others {_MAX_ATTEMPTS} times in a row, always first: "
            "nothing was changed by this call; try again when fewer write at once"
        )

    def commit_blind(self, user_key: str, make: Callable[[int, str], UserHead]) -> UserHead:
        """Put the entry of an erasure, which rests on no earlier one: that may be damaged.

        `make` gets its number and the commit of the entry before, "" where that cannot be read. It is called after the
        entries before it were looked at and before this one is put. Where another erasure came after it, that will do.
        """
        for _ in range(_MAX_ATTEMPTS):
            newest = self._newest(user_key) or 0
            before = self._readable_or_none(user_key, newest)
            entry = make(newest + 1, before.commit if before else "")
            with suppress(_GoneError):
                if self._put(entry) and self._counts(entry):
                    return entry
            if self._is_erased_after(entry):
                return entry
        raise PublishConflictError(
            f"others changed this user {_MAX_ATTEMPTS} times in a row, always first: try again"
        )

    def _readable_or_none(self, user_key: str, seq: int) -> UserHead | None:
        try:
            return self.entry(user_key, seq)
        except (FileNotFoundError, *UNREADABLE):
            return None

    def _is_erased_after(self, entry: UserHead) -> bool:
        try:
            return self.head_or_new(entry.user_key).erased_seq > entry.seq
        except UNREADABLE:
            return False

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
        names = self._backend.list_folder(layout.log_folder(user_key))
        return [seq for name in names if (seq := layout.number_of(name)) is not None]

    def entry(self, user_key: str, seq: int) -> UserHead:
        """Return one entry. FileNotFoundError where it, or the key that it was sealed with, is gone."""
        try:
            content = parse(self._backend.get(layout.entry_key(user_key, seq), MAX_ENTRY_BYTES + 1))
            head = self._decoded(user_key, seq, content)
            of_user = head.is_erased or self.user_key(head.user_id) == user_key
            if (head.user_key, head.seq) != (user_key, seq) or not of_user:
                raise ValueError("it belongs to another user or place in the log")
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

    def user_keys(self, after: str = "", top: str = layout.USERS) -> Iterator[str]:
        """Yield the keys of all users with a folder below `top`, in ascending order, those up to `after` left out."""
        for first in self._names_from(top, after[:2]):
            seconds = self._names_from(f"{top}/{first}", after[2:4] if first == after[:2] else "")
            folders = [f"{top}/{first}/{second}" for second in seconds]
            for start in range(0, len(folders), _LISTED_AT_ONCE):
                listed = folders[start : start + _LISTED_AT_ONCE]
                for folder, names in zip(
                    listed, each(self._backend, self._backend.list_folder, listed), strict=True
                ):
                    for name in names[bisect_right(names, after) :]:
                        if layout.is_sha256(name) and f"{top}/{name[:2]}/{name[2:4]}" == folder:
                            yield name

    def _names_from(self, folder: str, least: str) -> list[str]:
        return [
            name
            for name in self._backend.list_folder(folder)
            if name >= least and layout.is_shard(name)
        ]

    def _stat(self, user_key: str, seq: int) -> StoredFile | None:
        return self._backend.stat(layout.entry_key(user_key, seq))

    def _newest(self, user_key: str) -> int | None:
        names = self._backend.list_folder(layout.log_folder(user_key))
        return next(
            (seq for name in reversed(names) if (seq := layout.number_of(name)) is not None), None
        )

    def _is_followed(self, head: UserHead) -> bool:
        following = self._readable_or_none(head.user_key, head.seq + 1)
        return following is not None and following.parent == head.commit

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
        """Put the entry; False where another one is there. An entry of this very commit means that we were heard."""
        key = layout.entry_key(head.user_key, head.seq)
        try:
            data = encode(head)
        except (ValueError, RecursionError) as error:
            raise self._damaged(
                head.user_key, head.seq - 1, f"it cannot be written again ({error})"
            ) from error
        if len(data) > MAX_ENTRY_BYTES // 2:  # sealed it grows by a third
            raise InvalidAdapterError(
                f"the facts of {len(head.versions)} versions of user {shorten(head.user_id)} have {len(data)} bytes, "
                f"at most {MAX_ENTRY_BYTES // 2} make a log entry: delete versions, or keep less metadata"
            )
        try:
            sealed = self._sealed(head, data)
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
                raise _GoneError from None
        return True

    def _counts(self, head: UserHead) -> bool:
        """Tell whether an entry that was put is part of the log; remember the newest, take back what never was.

        _GoneError where it was and is erased by now, or where nobody can tell any more.
        """
        own = self._stat(
            head.user_key, head.seq
        )  # before the list, which says that nothing was erased until then
        seqs = self.seqs(head.user_key)
        if seqs and seqs[-1] == head.seq:
            self._remember(head, own)
            return True
        if own is None or head.seq not in seqs:
            raise _GoneError
        try:
            following = self.entry(head.user_key, head.seq + 1)
        except FileNotFoundError:
            again = self._stat(head.user_key, head.seq)
            if again is None or again.mark != own.mark:
                raise _GoneError from None
            may_count = False  # a hole: ours would have gone before the one that followed
        except (IntegrityError, FormatVersionError):
            raise _GoneError from None
        else:
            if following.parent == head.commit and following.seq != following.erased_seq:
                return True
            may_count = following.parent in (head.commit, "")
        # Erased, or never there for anybody; and so are those below, which go first.
        for seq in seqs[: seqs.index(head.seq) + 1]:
            self.remove(head.user_key, seq)
        if may_count:
            raise _GoneError
        return False

    def _sealed(self, head: UserHead, data: bytes) -> bytes:
        if self._vault is None or head.is_erased:  # what is left of an erased user says nothing
            return data
        if head.key is None:
            raise ValueError("an entry of an encrypted store needs its user's key")
        sealed = self._vault.seal(head.user_key, head.key, f"log/{head.seq}", data)
        return to_json({"format": layout.FORMAT, "sealed": base64.b64encode(sealed).decode()})

    def _decoded(self, user_key: str, seq: int, content: dict[str, Any]) -> UserHead:
        if self._vault is None:
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

    def _damaged(self, user_key: str, seq: int, why: str) -> IntegrityError:
        where = location(self._backend.url, layout.entry_key(user_key, seq))
        return IntegrityError(f"the log entry {where} is damaged: {why}; restore it from a backup")


def _chance() -> float:
    """Return a number between 0 and 1; the module `random` is slow to import, and shares its state with forked children."""
    return int.from_bytes(urandom(2), "big") / 65536
