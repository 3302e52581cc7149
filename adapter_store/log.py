"""Users' logs: find a head, commit the next one. Put-if-absent of an entry is the commit; nothing else decides."""

import random
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from os import urandom

from adapter_store import layout
from adapter_store.backend import Backend
from adapter_store.entry import MAX_ENTRY_BYTES, decode, encode
from adapter_store.errors import FormatVersionError, IntegrityError, InvalidAdapterError, PublishConflictError
from adapter_store.facts import UserHead
from adapter_store.root import keyed_hash
from adapter_store.text import location, shorten

_MAX_ATTEMPTS = 200
_MAX_PAUSE_SECONDS = 0.05


Heads = tuple[UserHead, UserHead]
"""A user's head before and after a commit; twice the same where nothing was left to do."""


def now() -> datetime:
    """Return the time to record, aware, in UTC."""
    return datetime.now(UTC)


class Log:
    """The logs of all users of an opened store, whose pepper is known."""

    def __init__(self, backend: Backend, pepper: bytes) -> None:
        self._backend = backend
        self._pepper = pepper

    def user_key(self, user_id: str) -> str:
        """Return the key under which a user's things lie."""
        return keyed_hash(self._pepper, user_id)

    def head(self, user_key: str) -> UserHead | None:
        """Return the newest entry of a user, None where there is none. Raises IntegrityError, FormatVersionError."""
        names = self._backend.list_folder(layout.log_folder(user_key))
        seq = next((seq for name in reversed(names) if (seq := layout.entry_seq(name)) is not None), None)
        return None if seq is None else self._entry(user_key, seq)

    def commit(self, user_id: str, change: Callable[[UserHead], UserHead | None]) -> Heads:
        """Put what `change` makes of the head as the next entry; return the heads before and after.

        `change` gets a head without versions for a new user; it is called again each time that another commit came
        first, and returns None where nothing is left to do. What it raises comes through, with nothing changed.
        """
        for attempt in range(_MAX_ATTEMPTS):
            before = self.head_or_new(user_id)
            changed = change(before)
            if changed is None:
                return before, before
            after = replace(changed, seq=before.seq + 1, commit=urandom(16).hex(), updated_at=now())
            if self._put(after):
                return before, after
            time.sleep(random.uniform(0, min(_MAX_PAUSE_SECONDS, 0.001 * 2 ** min(attempt, 10))))
        raise PublishConflictError(
            f"user {shorten(user_id)} was changed by others {_MAX_ATTEMPTS} times in a row, always first: "
            "nothing was changed by this call; try again when fewer write at once"
        )

    def head_or_new(self, user_id: str) -> UserHead:
        """Return a user's head, for a new user one of seq 0 without versions."""
        user_key = self.user_key(user_id)
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

    def user_keys(self, after: str = "") -> Iterator[str]:
        """Yield the keys of all users with a folder, in ascending order, those up to `after` left out."""
        for first in self._names_from(layout.USERS, after[:2]):
            for second in self._names_from(f"{layout.USERS}/{first}", after[2:4] if first == after[:2] else ""):
                names = self._backend.list_folder(f"{layout.USERS}/{first}/{second}")
                for name in names[bisect_right(names, after) :]:
                    if layout.is_sha256(name) and name.startswith(first + second):
                        yield name

    def _names_from(self, folder: str, least: str) -> list[str]:
        return [name for name in self._backend.list_folder(folder) if name >= least]

    def _put(self, head: UserHead) -> bool:
        """Put the entry; False where another one is there. An entry of this very commit means that we were heard."""
        key = layout.entry_key(head.user_key, head.seq)
        try:
            data = encode(head)
        except (ValueError, RecursionError) as error:
            raise self._damaged(head.user_key, head.seq - 1, f"it cannot be written again ({error})") from error
        if len(data) > MAX_ENTRY_BYTES:
            raise InvalidAdapterError(
                f"the facts of {len(head.versions)} versions of user {shorten(head.user_id)} have {len(data)} bytes, "
                f"at most {MAX_ENTRY_BYTES} make a log entry: delete versions, or keep less metadata"
            )
        try:
            self._backend.put_if_absent(key, data)
        except FileExistsError:
            # The answer to an earlier try of the storage client may have been lost on its way.
            return self._entry(head.user_key, head.seq).commit == head.commit
        return True

    def _entry(self, user_key: str, seq: int) -> UserHead:
        try:
            head = decode(self._backend.get(layout.entry_key(user_key, seq), MAX_ENTRY_BYTES + 1))
            if (head.user_key, head.seq) != (user_key, seq) or self.user_key(head.user_id) != user_key:
                raise ValueError("it belongs to another user or place in the log")
        except FormatVersionError as error:
            where = location(self._backend.url, layout.entry_key(user_key, seq))
            raise FormatVersionError(f"cannot read {where}: {error}; upgrade the package that reads it") from None
        except FileNotFoundError:
            raise self._damaged(user_key, seq, "it was listed, and is gone") from None
        except ValueError as error:
            raise self._damaged(user_key, seq, str(error)) from None
        return head

    def _damaged(self, user_key: str, seq: int, why: str) -> IntegrityError:
        where = location(self._backend.url, layout.entry_key(user_key, seq))
        return IntegrityError(f"the log entry {where} is damaged: {why}; restore it from a backup")
