"""The keys of an encrypted store: one or a few a user, each wrapped by a master key; erasing a user shreds them.

Adapters and log entries are sealed with AES-256-GCM under a key of their user. What a seal is made for (store, user,
version and file, or place in the log) is part of it, so that nothing sealed can be moved elsewhere. Keys lie under
keys/, apart from what they open: a backup without that folder is worth nothing once a key is shredded.
"""

import base64
import contextlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Final

from adapter_store import layout
from adapter_store.errors import AdapterStoreError, BackendError, IntegrityError
from adapter_store.keys import KEY_BYTES, NONCE_BYTES, KeyProvider, cipher
from adapter_store.text import location, parse_json_object, to_json

if TYPE_CHECKING:
    from adapter_store.backends.protocol import Backend

STORE: Final = "store"
"""Stands in the place of a user key for the store's own secret, its pepper."""
_MAGIC = b"ASE1"
_KEY_ID_BYTES = 8
OVERHEAD_BYTES: Final = len(_MAGIC) + _KEY_ID_BYTES + NONCE_BYTES + 16
"""By how much sealed bytes are longer than plain ones."""
MAX_SEALED_BYTES: Final = 2**31 - 1 - OVERHEAD_BYTES
_MAX_RECORD_BYTES = 64 * 1024
_MAX_KNOWN = 4096
_MAX_TRIES = 5


@dataclass(frozen=True)
class _Record:
    """A wrapped key as it lies in the store. `since_seq`: where its user's log was when the key was made."""

    number: int
    master: str
    wrapped: bytes
    since_seq: int


class Vault:
    """The keys of one store. Thread-safe."""

    def __init__(self, backend: "Backend", store_id: str, keys: KeyProvider) -> None:
        self._backend = backend
        self._store_id = store_id
        self._keys = keys
        self._known: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._lock = Lock()

    def add(self, user_key: str, secret: bytes | None = None, since_seq: int = 0) -> str:
        """Make a key (or keep the `secret` given) for a user whose log is at `since_seq`; return its id."""
        key, made = os.urandom(_KEY_ID_BYTES).hex(), secret or os.urandom(KEY_BYTES)
        with contextlib.suppress(
            FileExistsError
        ):  # said of our own write, where its first answer was lost
            self._write(user_key, key, _Record(1, *self._wrap(user_key, key, made), since_seq))
        self._remember(user_key, key, made)
        return key

    def secret(self, user_key: str, key: str) -> bytes:
        """Return a key. FileNotFoundError where it was shredded; KeyMismatchError, IntegrityError."""
        with self._lock:
            if (known := self._known.get((user_key, key))) is not None:
                self._known.move_to_end((user_key, key))
                return known
        record = self._newest(user_key, key)
        found = self._keys.unwrap(record.master, record.wrapped, self._context(user_key, key))
        self._remember(user_key, key, found)
        return found

    def seal(self, user_key: str, key: str, place: str, data: bytes) -> bytes:
        """Return `data` sealed for that user and place."""
        nonce = os.urandom(NONCE_BYTES)
        aead = cipher(self.secret(user_key, key))
        sealed: bytes = aead.encrypt(nonce, data, self._context(user_key, place).encode())
        return b"".join((_MAGIC, bytes.fromhex(key), nonce, sealed))

    def unseal(self, user_key: str, place: str, sealed: bytes) -> bytes:
        """Return what was sealed for that user and place. ValueError where it was not; FileNotFoundError: no key."""
        aead = cipher(self.secret(user_key, key_of(sealed)))
        start = len(_MAGIC) + _KEY_ID_BYTES
        nonce, rest = sealed[start : start + NONCE_BYTES], memoryview(sealed)[start + NONCE_BYTES :]
        try:
            data: bytes = aead.decrypt(nonce, rest, self._context(user_key, place).encode())
        except Exception as error:  # the library's InvalidTag, or ValueError for what is too short
            raise ValueError("it does not decrypt: it was changed, or belongs elsewhere") from error
        return data

    def remove(self, user_key: str, key: str) -> None:
        """Shred one key."""
        with self._lock:
            self._known.pop((user_key, key), None)
        for number in self._numbers(user_key, key):
            self._backend.delete(f"{layout.keys_folder(user_key)}/{key}/{layout.numbered(number)}")

    def made_before(self, user_key: str, before_seq: int, *, or_damaged: bool = False) -> list[str]:
        """Return a user's keys that were made before that place in the log."""
        found = []
        for key in self._ids(user_key):
            try:
                is_old = self._newest(user_key, key).since_seq < before_seq
            except (FileNotFoundError, IntegrityError):
                is_old = or_damaged
            if is_old:
                found.append(key)
        return found

    def written_until(self, user_key: str, time: float) -> list[str]:
        """Return a user's keys that were written last at that time of the storage's clock, or before."""
        found = []
        for key in self._ids(user_key):
            folder = f"{layout.keys_folder(user_key)}/{key}"
            files = [
                self._backend.stat(f"{folder}/{layout.numbered(n)}")
                for n in self._numbers(user_key, key)
            ]
            if all(file is None or file.modified <= time for file in files):
                found.append(key)
        return found

    def rewrap(
        self, user_key: str, problems: list[AdapterStoreError], keys: Sequence[str] | None = None
    ) -> int:
        """Wrap a user's keys (or only `keys`) with the newest master key where they are not yet; return how many.

        A key that does not unwrap stays as it is, and what is wrong with it goes to `problems`.
        """
        rewrapped = 0
        for key in self._ids(user_key) if keys is None else keys:
            try:
                rewrapped += self._rewrap(user_key, key)
            except FileNotFoundError:  # shredded a moment ago
                continue
            except BackendError:
                raise
            except AdapterStoreError as error:
                where = location(self._backend.url, f"{layout.keys_folder(user_key)}/{key}")
                problems.append(type(error)(f"{where}: {error}"))
        return rewrapped

    def _rewrap(self, user_key: str, key: str) -> bool:
        """Wrap one key with the newest master key; return whether it was not yet."""
        record, was_written = self._newest(user_key, key), False
        while record.master != self._keys.key_id:
            secret = self._keys.unwrap(record.master, record.wrapped, self._context(user_key, key))
            anew = _Record(record.number + 1, *self._wrap(user_key, key, secret), record.since_seq)
            try:
                self._write(user_key, key, anew)
                record, was_written = anew, True
            except FileExistsError:  # another rotation is at it, perhaps to another master key
                record = self._newest(user_key, key)
        for number in self._numbers(user_key, key):
            if number < record.number:
                self._backend.delete(
                    f"{layout.keys_folder(user_key)}/{key}/{layout.numbered(number)}"
                )
        return was_written

    def _context(self, user_key: str, place: str) -> str:
        return f"{self._store_id}/{user_key}/{place}"

    def _wrap(self, user_key: str, key: str, secret: bytes) -> tuple[str, bytes]:
        return self._keys.wrap(secret, self._context(user_key, key))

    def _ids(self, user_key: str) -> list[str]:
        return [
            name
            for name in self._backend.list_folder(layout.keys_folder(user_key))
            if layout.is_key_id(name)
        ]

    def _numbers(self, user_key: str, key: str) -> list[int]:
        names = self._backend.list_folder(f"{layout.keys_folder(user_key)}/{key}")
        return sorted(number for name in names if (number := layout.number_of(name)) is not None)

    def _newest(self, user_key: str, key: str) -> _Record:
        for _ in range(_MAX_TRIES):
            numbers = self._numbers(user_key, key)
            if not numbers:
                break
            place = f"{layout.keys_folder(user_key)}/{key}/{layout.numbered(numbers[-1])}"
            try:
                return _record(numbers[-1], self._backend.get(place, _MAX_RECORD_BYTES))
            except FileNotFoundError:  # wrapped anew, or shredded, between the two looks
                continue
            except ValueError as error:
                raise IntegrityError(
                    f"the key {location(self._backend.url, place)} is damaged: {error}; restore it from a backup"
                ) from None
        raise FileNotFoundError(key)

    def _write(self, user_key: str, key: str, record: _Record) -> None:
        content = {
            "format": layout.FORMAT,
            "master": record.master,
            "wrapped": base64.b64encode(record.wrapped).decode(),
            "since_seq": record.since_seq,
        }
        place = f"{layout.keys_folder(user_key)}/{key}/{layout.numbered(record.number)}"
        self._backend.put_if_absent(place, to_json(content))

    def _remember(self, user_key: str, key: str, secret: bytes) -> None:
        with self._lock:
            self._known[user_key, key] = secret
            while len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)


def key_of(sealed: bytes) -> str:
    """Return the id of the key that something was sealed with. ValueError where it is not sealed."""
    if len(sealed) < OVERHEAD_BYTES or not sealed.startswith(_MAGIC):
        raise ValueError("it is not encrypted, as everything in this store is")
    return sealed[len(_MAGIC) : len(_MAGIC) + _KEY_ID_BYTES].hex()


def _record(number: int, data: bytes) -> _Record:
    content = parse_json_object(data)
    master, wrapped, since_seq = (
        content.get("master"),
        content.get("wrapped"),
        content.get("since_seq"),
    )
    if not (isinstance(master, str) and isinstance(wrapped, str) and type(since_seq) is int):
        raise ValueError("it lacks the master key's name, the wrapped key or its place in the log")
    return _Record(number, master, base64.b64decode(wrapped, validate=True), since_seq)
