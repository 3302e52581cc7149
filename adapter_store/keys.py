"""Master keys of encrypted stores: from the environment, a file, or a key management service.

A store asks a `KeyProvider` for two things only, to wrap a small secret and to unwrap it again. The
secrets are the users' own keys (`vault.py`); a master key never touches an adapter. The first key
listed wraps what is new, the others still unwrap what is old, until `AdapterStore.rotate_keys` has
wrapped everything anew.
"""

import base64
import binascii
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from adapter_store.errors import AdapterStoreError, BackendError, KeyMismatchError
from adapter_store.text import shorten

KEY_BYTES = 32
NONCE_BYTES = 12
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@runtime_checkable
class KeyProvider(Protocol):
    """The holder of the master keys. Any thread may call.

    KeyMismatchError where a key is missing or does not fit.
    """

    @property
    def key_id(self) -> str:
        """The name of the master key that wraps what is new."""

    def wrap(self, secret: bytes, context: str) -> tuple[str, bytes]:
        """Return the name of that key and `secret` encrypted with it.

        The same `context` is needed to unwrap it.
        """

    def unwrap(self, key_id: str, wrapped: bytes, context: str) -> bytes:
        """Return the secret that was wrapped with the master key of that name."""


class KmsClient(Protocol):
    """What a key management service must do; a few lines around a vendor's own client."""

    def encrypt(self, key_id: str, plaintext: bytes, context: Mapping[str, str]) -> bytes:
        """Return `plaintext` encrypted with the service's key `key_id`, bound to `context`."""

    def decrypt(self, key_id: str, ciphertext: bytes, context: Mapping[str, str]) -> bytes:
        """Return the plaintext again; raise anything where key or context do not fit."""


def cipher(key: bytes) -> Any:
    """Return AES-256-GCM with that key. BackendError where its package is not installed."""
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        raise BackendError(
            "an encrypted store needs the package cryptography: "
            "pip install 'langchain-cope[encryption]'"
        ) from None
    return AESGCM(key)


def is_key_name(text: str) -> bool:
    """Return whether `text` may name a master key: 1 to 64 letters, digits, `.`, `-` and `_`."""
    return _NAME.fullmatch(text) is not None


def new_key() -> str:
    """Return a new random master key as base64 text."""
    return base64.b64encode(os.urandom(KEY_BYTES)).decode()


class _HeldKeys:
    """Master keys held in this process, the first for what is new."""

    _keys: dict[str, bytes]
    _where: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._where!r})"

    @property
    def key_id(self) -> str:
        """The name of the first key."""
        return next(iter(self._keys))

    @property
    def names(self) -> list[str]:
        """The names of all keys, the newest first."""
        return list(self._keys)

    def wrap(self, secret: bytes, context: str) -> tuple[str, bytes]:
        """Encrypt with the first key."""
        key_id, nonce = self.key_id, os.urandom(NONCE_BYTES)
        sealed: bytes = cipher(self._keys[key_id]).encrypt(nonce, secret, context.encode())
        return key_id, nonce + sealed

    def unwrap(self, key_id: str, wrapped: bytes, context: str) -> bytes:
        """Decrypt with the key of that name."""
        if key_id not in self._keys:
            self._refresh()
        if key_id not in self._keys:
            raise KeyMismatchError(
                f"the store's keys are wrapped with the master key {shorten(key_id)}, and "
                f"{self._where} holds {', '.join(self._keys)}: add that key"
            )
        aead = cipher(self._keys[key_id])
        nonce, sealed = wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:]
        try:
            secret: bytes = aead.decrypt(nonce, sealed, context.encode())
        except Exception as error:  # the library's InvalidTag, or ValueError for what is too short
            raise KeyMismatchError(
                f"the master key {shorten(key_id)} of {self._where} is not the one that the "
                "store's keys were wrapped with, or they were moved or damaged: give the right key"
            ) from error
        return secret

    def _refresh(self) -> None:
        """Look again where the keys came from, for one that was added since."""


class EnvironmentKeys(_HeldKeys):
    """Master keys from an environment variable: `name:base64` pairs with commas, newest first.

    KeyMismatchError where the variable is unset or holds something else.
    """

    def __init__(self, variable: str = "COPE_STORE_KEYS") -> None:
        text = os.environ.get(variable, "")
        self._where = f"the environment's {variable}"
        if not text.strip():
            raise KeyMismatchError(
                f"{self._where} is not set: set it to name:base64, 32 random bytes in base64"
            )
        self._keys = _parsed([pair.partition(":")[::2] for pair in text.split(",")], self._where)


class FileKeys(_HeldKeys):
    """Master keys from a file that only its owner may read: lines `name base64`, newest first.

    What is added to the file counts at once. KeyMismatchError where the file cannot be used.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path).expanduser()
        self._where = str(self._path)
        self._keys = self._read()

    @property
    def key_id(self) -> str:
        """The name of the first key in the file."""
        self._refresh()
        return super().key_id

    @classmethod
    def create(cls, path: str | os.PathLike[str], name: str = "key-1") -> "FileKeys":
        """Make the file with one random key and return its keys; FileExistsError if it exists."""
        file = Path(path).expanduser()
        _check_name(name, str(file))
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_private(file, f"{name} {new_key()}\n")
        return cls(file)

    def add(self, name: str) -> None:
        """Put a new random key in front, for what is new from now on.

        ValueError where the name is taken.
        """
        self._refresh()
        if name in self._keys:
            raise ValueError(f"{self._where} has a key {name} already: give another name")
        _check_name(name, self._where)
        staged = self._path.with_name(f".{self._path.name}.{os.urandom(6).hex()}")
        _write_private(staged, f"{name} {new_key()}\n{self._path.read_text(encoding='utf-8')}")
        staged.replace(self._path)
        self._refresh()

    def _refresh(self) -> None:
        self._keys = self._read()

    def _read(self) -> dict[str, bytes]:
        try:
            mode = stat.S_IMODE(self._path.stat().st_mode)
            text = self._path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise KeyMismatchError(
                f"cannot read the key file {self._where} ({reason}): name one that new-key made"
            ) from error
        if mode & 0o077:
            raise KeyMismatchError(
                f"the key file {self._where} can be read by others (mode {mode:o}): chmod 600 it"
            )
        pairs = []
        for line in text.splitlines():
            if not line.strip() or line.startswith("#"):
                continue
            words = line.split()
            if len(words) != 2:
                raise KeyMismatchError(
                    f"the key file {self._where} has a line that is not: name base64"
                )
            pairs.append((words[0], words[1]))
        return _parsed(pairs, self._where)


class KmsKeys:
    """Master keys that never leave a key management service.

    `key_id` names the one for what is new.
    """

    def __init__(self, client: KmsClient, key_id: str) -> None:
        self._client = client
        self._key_id = key_id

    def __repr__(self) -> str:
        return f"KmsKeys({self._key_id!r})"

    @property
    def key_id(self) -> str:
        """The service's name of the key."""
        return self._key_id

    def wrap(self, secret: bytes, context: str) -> tuple[str, bytes]:
        """Have the service encrypt it."""
        return self._key_id, self._ask("encrypt", self._key_id, secret, context)

    def unwrap(self, key_id: str, wrapped: bytes, context: str) -> bytes:
        """Have the service decrypt it."""
        return self._ask("decrypt", key_id, wrapped, context)

    def _ask(self, verb: str, key_id: str, data: bytes, context: str) -> bytes:
        try:
            answer = getattr(self._client, verb)(key_id, data, {"adapter_store": context})
        except AdapterStoreError:
            raise
        except Exception as error:  # each vendor's client has errors of its own
            raise BackendError(
                f"the key service did not {verb} with key {shorten(key_id)} "
                f"({type(error).__name__}): check that it can be reached and that this caller may "
                "use the key"
            ) from error
        return bytes(answer)


def _write_private(path: Path, text: str) -> None:
    """Write a new file that only its owner may read, durably."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _parsed(pairs: list[tuple[str, str]], where: str) -> dict[str, bytes]:
    keys: dict[str, bytes] = {}
    for number, (label, text) in enumerate(pairs, 1):
        name = label.strip()
        _check_name(name, where)
        try:
            key = base64.b64decode(text.strip(), validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if len(key) != KEY_BYTES:
            # Its name may be the secret, in the wrong place.
            raise KeyMismatchError(
                f"key number {number} of {where} is not a name and {KEY_BYTES} bytes in base64"
            )
        if name in keys:
            raise KeyMismatchError(f"{where} has the key {name} twice: give each its own name")
        keys[name] = key
    if not keys:
        raise KeyMismatchError(
            f"{where} holds no key: add a line with a name and {KEY_BYTES} random bytes in base64"
        )
    return keys


def _check_name(name: str, where: str) -> None:
    # Never the whole text: where a separator is missing, it would be the key itself.
    if not is_key_name(name):
        raise KeyMismatchError(
            f"a key of {where} has no name of 1 to 64 letters, digits, dots, dashes and "
            "underscores in front"
        )
