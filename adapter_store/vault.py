"""The keys of an encrypted store: one or a few a user, each wrapped by a master key.

Adapters and log entries are sealed with AES-256-GCM under a key of their user; erasing the user
shreds it. What a seal is made for (store, user, version and file, or number in the log) is part of
it, so that nothing sealed can be moved elsewhere. Keys lie under keys/, apart from what they open:
a backup without that folder is worth nothing once a key is shredded. A store without encryption
has a `NoVault`, which does the same without a key.
"""

import base64
import contextlib
import math
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Final

from adapter_store import layout
from adapter_store.backends.protocol import Backend
from adapter_store.errors import AdapterStoreError, BackendError, IntegrityError
from adapter_store.keys import KEY_BYTES, NONCE_BYTES, KeyProvider, cipher
from adapter_store.listing import user_keys
from adapter_store.text import location, parse_json_object, to_json

STORE: Final = "store"
"""Stands where a user key would be, for the store's own secret, its pepper."""
_MAGIC = b"ASE1"
_KEY_ID_BYTES = 8
OVERHEAD_BYTES: Final = len(_MAGIC) + _KEY_ID_BYTES + NONCE_BYTES + 16
_MAX_SEALED_BYTES = 2**31 - 1 - OVERHEAD_BYTES
_MAX_RECORD_BYTES = 64 * 1024
_MAX_KNOWN = 4096
_MAX_TRIES = 5


class NoVault:
    """What a store without encryption has for a vault: nothing is sealed, and no key exists."""

    is_encrypted: Final = False
    overhead_bytes: Final = 0
    """By how much sealed bytes are longer than plain ones."""
    max_bytes: Final = math.inf
    """How many bytes can be sealed at once."""

    def add(self, user_key: str, secret: bytes | None = None, since_seq: int = 0) -> str | None:
        """Make no key."""
        return None

    def seal(self, user_key: str, key: str | None, purpose: str, data: bytes) -> bytes:
        """Return `data` as it is."""
        return data

    def unseal(self, user_key: str, purpose: str, sealed: bytes) -> bytes:
        """Return `sealed` as it is."""
        return sealed

    def remove(self, user_key: str, key: str) -> None:
        """Do nothing."""

    def user_keys(self) -> Iterator[str]:
        """Yield nothing."""
        return iter(())

    def made_before(self, user_key: str, before_seq: int, *, or_damaged: bool = False) -> list[str]:
        """Return no key."""
        return []

    def written_until(self, user_key: str, time: float) -> list[str]:
        """Return no key."""
        return []

    def rewrap(
        self, user_key: str, problems: list[AdapterStoreError], keys: Sequence[str] | None = None
    ) -> int:
        """Wrap nothing."""
        return 0


@dataclass(frozen=True)
class _Record:
    """A wrapped key as it lies in the store.

    `since_seq` is where its user's log was when the key was made.
    """

    number: int
    master: str
    wrapped: bytes
    since_seq: int


class Vault:
    """The keys of one encrypted store. Thread-safe."""

    is_encrypted: Final = True
    overhead_bytes: Final = OVERHEAD_BYTES
    """By how much sealed bytes are longer than plain ones."""
    max_bytes: Final = _MAX_SEALED_BYTES
    """How many bytes can be sealed at once."""

    def __init__(self, backend: Backend, store_id: str, keys: KeyProvider) -> None:
        self._backend = backend
        self._store_id = store_id
        self._keys = keys
        self._known: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._lock = Lock()

    def add(self, user_key: str, secret: bytes | None = None, since_seq: int = 0) -> str:
        """Make a key for a user whose log is at `since_seq`, and return its id.

        With `secret`, that is kept in place of a new key.
        """
        key, content = os.urandom(_KEY_ID_BYTES).hex(), secret or os.urandom(KEY_BYTES)
        record = _Record(1, *self._wrap(user_key, key, content), since_seq)
        # FileExistsError is said of our own write, where its first answer was lost.
        with contextlib.suppress(FileExistsError):
            self._write(user_key, key, record)
        self._remember(user_key, key, content)
        return key

    def secret(self, user_key: str, key: str) -> bytes:
        """Return a key. FileNotFoundError if it was shredded; KeyMismatchError, IntegrityError."""
        with self._lock:
            known = self._known.get((user_key, key))
            if known is not None:
                self._known.move_to_end((user_key, key))
                return known
        record = self._newest(user_key, key)
        secret = self._keys.unwrap(record.master, record.wrapped, self._context(user_key, key))
        self._remember(user_key, key, secret)
        return secret

    def seal(self, user_key: str, key: str | None, purpose: str, data: bytes) -> bytes:
        """Return `data` sealed for that user and purpose. FileNotFoundError if the key is gone."""
        if key is None:
            raise ValueError("what lies in an encrypted store needs its user's key")
        nonce = os.urandom(NONCE_BYTES)
        aead = cipher(self.secret(user_key, key))
        sealed: bytes = aead.encrypt(nonce, data, self._context(user_key, purpose).encode())
        return b"".join((_MAGIC, bytes.fromhex(key), nonce, sealed))

    def unseal(self, user_key: str, purpose: str, sealed: bytes) -> bytes:
        """Return what was sealed for that user and purpose.

        ValueError where it was not, FileNotFoundError where its key is gone.
        """
        aead = cipher(self.secret(user_key, key_of(sealed)))
        start = len(_MAGIC) + _KEY_ID_BYTES
        nonce, rest = sealed[start : start + NONCE_BYTES], memoryview(sealed)[start + NONCE_BYTES :]
        try:
            data: bytes = aead.decrypt(nonce, rest, self._context(user_key, purpose).encode())
        except Exception as error:  # the library's InvalidTag, or ValueError for what is too short
            raise ValueError("it does not decrypt: it was changed, or belongs elsewhere") from error
        return data

    def remove(self, user_key: str, key: str) -> None:
        """Shred one key."""
        with self._lock:
            self._known.pop((user_key, key), None)
        for number in self._numbers(user_key, key):
            self._backend.delete(_record_key(user_key, key, number))

    def user_keys(self) -> Iterator[str]:
        """Yield the keys of all users who have encryption keys, in ascending order."""
        return user_keys(self._backend, layout.KEYS)

    def made_before(self, user_key: str, before_seq: int, *, or_damaged: bool = False) -> list[str]:
        """Return a user's keys that were made before that number in the log."""
        old = []
        for key in self._ids(user_key):
            try:
                is_old = self._newest(user_key, key).since_seq < before_seq
            except (FileNotFoundError, IntegrityError):
                is_old = or_damaged
            if is_old:
                old.append(key)
        return old

    def written_until(self, user_key: str, time: float) -> list[str]:
        """Return a user's keys that were last written at that time of the storage's, or before."""
        old = []
        for key in self._ids(user_key):
            files = [
                self._backend.stat(_record_key(user_key, key, number))
                for number in self._numbers(user_key, key)
            ]
            if all(file is None or file.modified <= time for file in files):
                old.append(key)
        return old

    def rewrap(
        self, user_key: str, problems: list[AdapterStoreError], keys: Sequence[str] | None = None
    ) -> int:
        """Wrap a user's keys (or only `keys`) with the newest master key where they are not yet.

        Return how many that was. A key that does not unwrap stays as it is, and what is wrong with
        it goes to `problems`.
        """
        count = 0
        for key in self._ids(user_key) if keys is None else keys:
            try:
                if self._rewrap(user_key, key):
                    count += 1
            except FileNotFoundError:  # shredded a moment ago
                continue
            except BackendError:
                raise
            except AdapterStoreError as error:
                where = location(self._backend.url, f"{layout.keys_folder(user_key)}/{key}")
                problems.append(type(error)(f"{where}: {error}"))
        return count

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
                self._backend.delete(_record_key(user_key, key, number))
        return was_written

    def _context(self, user_key: str, purpose: str) -> str:
        return f"{self._store_id}/{user_key}/{purpose}"

    def _wrap(self, user_key: str, key: str, secret: bytes) -> tuple[str, bytes]:
        return self._keys.wrap(secret, self._context(user_key, key))

    def _ids(self, user_key: str) -> list[str]:
        names = self._backend.list_folder(layout.keys_folder(user_key))
        return [name for name in names if layout.is_key_id(name)]

    def _numbers(self, user_key: str, key: str) -> list[int]:
        names = self._backend.list_folder(f"{layout.keys_folder(user_key)}/{key}")
        return sorted(layout.numbers_of(names))

    def _newest(self, user_key: str, key: str) -> _Record:
        for _ in range(_MAX_TRIES):
            numbers = self._numbers(user_key, key)
            if not numbers:
                break
            path = _record_key(user_key, key, numbers[-1])
            try:
                return _record(numbers[-1], self._backend.get(path, _MAX_RECORD_BYTES))
            except FileNotFoundError:  # wrapped anew, or shredded, between the two looks
                continue
            except ValueError as error:
                raise IntegrityError(
                    f"the key {location(self._backend.url, path)} is damaged: {error}; "
                    "restore it from a backup"
                ) from None
        raise FileNotFoundError(key)

    def _write(self, user_key: str, key: str, record: _Record) -> None:
        content = {
            "format": layout.FORMAT,
            "master": record.master,
            "wrapped": base64.b64encode(record.wrapped).decode(),
            "since_seq": record.since_seq,
        }
        self._backend.put_if_absent(_record_key(user_key, key, record.number), to_json(content))

    def _remember(self, user_key: str, key: str, secret: bytes) -> None:
        with self._lock:
            self._known[user_key, key] = secret
            while len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)


def key_of(sealed: bytes) -> str:
    """Return the id of the key that something was sealed with, ValueError where it is not."""
    if len(sealed) < OVERHEAD_BYTES or not sealed.startswith(_MAGIC):
        raise ValueError("it is not encrypted, as everything in this store is")
    return sealed[len(_MAGIC) : len(_MAGIC) + _KEY_ID_BYTES].hex()


def _record_key(user_key: str, key: str, number: int) -> str:
    """Return where record `number` of a key lies."""
    return f"{layout.keys_folder(user_key)}/{key}/{layout.numbered(number)}"


def _record(number: int, data: bytes) -> _Record:
    content = parse_json_object(data)
    master, wrapped = content.get("master"), content.get("wrapped")
    since_seq = content.get("since_seq")
    if not (isinstance(master, str) and isinstance(wrapped, str) and type(since_seq) is int):
        raise ValueError("it lacks the master key's name, the wrapped key or its number in the log")
    return _Record(number, master, base64.b64decode(wrapped, validate=True), since_seq)
