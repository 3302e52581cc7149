"""The root file: the store's format and id, whether it is encrypted, and its pepper.

User keys are made with the pepper, which keeps them from being guessed from user ids. Without one
given, a store makes its own at random: a plain store keeps it in the root file (mode 0600 in a
local store), an encrypted one wrapped among its keys. A given one is never written. Either way the
check value in the root file tells another pepper from the right one, because a wrong one would
find no user and say nothing.
"""

import hashlib
import hmac
import os
from dataclasses import dataclass
from typing import Any, Final

from adapter_store.backends.protocol import Backend
from adapter_store.entry import check_format
from adapter_store.errors import FormatVersionError, IntegrityError, KeyMismatchError
from adapter_store.keys import KeyProvider
from adapter_store.layout import FORMAT, ROOT_FILE, USERS, is_key_id
from adapter_store.text import location, parse_json_object, to_json
from adapter_store.vault import STORE, NoVault, Vault

MIN_PEPPER_BYTES: Final = 16
_MAX_ROOT_BYTES = 64 * 1024
# No user key is ever equal to it: user ids hold no NUL.
_CHECKED_TEXT = "\0adapter_store check value"


@dataclass(frozen=True)
class Root:
    """The identity and the secrets of an open store.

    `pepper_key` is the pepper's key in the vault, None where the pepper lies elsewhere.
    """

    store_id: str
    pepper: bytes
    vault: Vault | NoVault
    pepper_key: str | None


def keyed_hash(pepper: bytes, text: str) -> str:
    """Return HMAC-SHA256(pepper, text as UTF-8) in hex: the user key, where `text` is a user id."""
    return hmac.digest(pepper, text.encode(), hashlib.sha256).hex()


def open_root(backend: Backend, pepper: bytes | None, keys: KeyProvider | None) -> Root | None:
    """Return what the root file holds, None where no store exists yet.

    KeyMismatchError where `pepper` or `keys` are not the store's, IntegrityError where the root
    file is damaged or lost, FormatVersionError where it is newer.
    """
    data = _read(backend)
    if data is None and backend.list_folder(USERS):
        # Users come after the root file, so it is there by now, or it was removed.
        data = _read(backend)
        if data is None:
            raise IntegrityError(
                f"{location(backend.url, ROOT_FILE)} is missing, but the store has users: "
                "without it no user can be found; restore it from a backup"
            )
    return None if data is None else _opened(backend, data, pepper, keys)


def make_root(backend: Backend, pepper: bytes | None, keys: KeyProvider | None) -> Root:
    """Return what the root file holds, after writing it where no store exists yet.

    Raises what `open_root` raises.
    """
    root = open_root(backend, pepper, keys)
    while root is None:
        own_pepper, store_id = pepper or os.urandom(32), os.urandom(16).hex()
        vault = NoVault() if keys is None else Vault(backend, store_id, keys)
        wrapped = vault.add(STORE, own_pepper) if pepper is None else None
        content = {
            "format": FORMAT,
            "id": store_id,
            "check": keyed_hash(own_pepper, _CHECKED_TEXT),
            "encrypted": vault.is_encrypted,
            "pepper": None if pepper or vault.is_encrypted else own_pepper.hex(),
            "pepper_key": wrapped,
        }
        try:
            backend.put_if_absent(ROOT_FILE, to_json(content))
        except FileExistsError:
            # Another first publisher was faster, and its pepper counts; or the answer to our own
            # put was lost on its way.
            if wrapped is not None and _has_another_pepper(backend, wrapped):
                vault.remove(STORE, wrapped)
        root = open_root(backend, pepper, keys)
    return root


def _has_another_pepper(backend: Backend, key: str) -> bool:
    """Return whether the root file names another pepper than `key`; in doubt it does not."""
    data = _read(backend)
    try:
        return data is not None and parse_json_object(data).get("pepper_key") != key
    except ValueError:
        return False


def _read(backend: Backend) -> bytes | None:
    try:
        return backend.get(ROOT_FILE, _MAX_ROOT_BYTES)
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class _RootFile:
    """What a root file says."""

    store_id: str
    check: str
    is_encrypted: bool
    pepper: bytes | None
    pepper_key: str | None


def _opened(backend: Backend, data: bytes, pepper: bytes | None, keys: KeyProvider | None) -> Root:
    where = location(backend.url, ROOT_FILE)
    try:
        file = _parsed(data)
    except FormatVersionError as error:
        raise FormatVersionError(
            f"cannot open {where}: {error}; upgrade the package that opens it"
        ) from None
    except ValueError as error:
        raise IntegrityError(
            f"{where} is not the root file of a store: {error}; restore it from a backup"
        ) from None
    vault = _vault(backend, file, keys, where)
    stored = file.pepper
    if pepper is None and isinstance(vault, Vault) and file.pepper_key is not None:
        stored = _unwrapped(vault, file.pepper_key, where)
    if pepper is None and stored is None:
        raise KeyMismatchError(
            f"{where} was made with a pepper of its owner: pass that one as pepper="
        )
    if pepper is not None and not hmac.compare_digest(
        keyed_hash(pepper, _CHECKED_TEXT), file.check
    ):
        keeps_its_own = ", or none, since it keeps its own" if stored or file.pepper_key else ""
        raise KeyMismatchError(
            f"{where} was made with another pepper than the one given: "
            f"pass the one it was made with{keeps_its_own}"
        )
    if stored is not None and keyed_hash(stored, _CHECKED_TEXT) != file.check:
        raise IntegrityError(
            f"{where} is damaged: its pepper and its check value differ; restore it from a backup"
        )
    return Root(file.store_id, pepper or stored or b"", vault, file.pepper_key)


def _parsed(data: bytes) -> _RootFile:
    content = parse_json_object(data)
    check_format(content)
    check, pepper = content.get("check"), content.get("pepper")
    if not isinstance(check, str) or not check.isascii():
        raise ValueError("it has no check value")
    if pepper is not None and not isinstance(pepper, str):
        raise ValueError("its pepper is not text")
    # Before format 2 a store had no id; its check value is as good.
    store_id = content.get("id", check)
    if not isinstance(store_id, str) or not store_id.isascii() or not store_id.isalnum():
        raise ValueError("it has no id")
    is_encrypted, key = content.get("encrypted", False), content.get("pepper_key")
    if not isinstance(is_encrypted, bool) or not _is_key_or_none(key):
        raise ValueError("it does not say how it is encrypted")
    own_pepper = None if pepper is None else bytes.fromhex(pepper)
    return _RootFile(store_id, check, is_encrypted, own_pepper, key)


def _is_key_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and is_key_id(value))


def _vault(
    backend: Backend, file: _RootFile, keys: KeyProvider | None, where: str
) -> Vault | NoVault:
    if keys is None:
        if file.is_encrypted:
            raise KeyMismatchError(f"{where} is of an encrypted store: pass its keys as keys=")
        return NoVault()
    if not file.is_encrypted:
        raise KeyMismatchError(
            f"{where} is of a store without encryption, and keys were given: pass none, or export "
            "its users and import them into a new store that is made with these keys"
        )
    return Vault(backend, file.store_id, keys)


def _unwrapped(vault: Vault, key: str, where: str) -> bytes:
    try:
        return vault.secret(STORE, key)
    except FileNotFoundError:
        raise IntegrityError(
            f"the pepper of {where} is missing from the store's keys: "
            "restore the folder keys/ from a backup"
        ) from None
