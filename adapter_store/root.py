"""The root file: the store's format and id, whether it is encrypted, and its pepper, from which user keys are made.

The pepper keeps user keys from being guessed from user ids. Without one given, a store makes its own at random: a plain
store keeps it in the root file (mode 0600 in a local store), an encrypted one wrapped among its keys. A given one is
never written. Either way the check value in the root file tells another pepper from the right one, because the wrong one
would silently find nobody.
"""

import hashlib
import hmac
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from adapter_store.entry import check_format
from adapter_store.errors import FormatVersionError, IntegrityError, KeyMismatchError
from adapter_store.layout import FORMAT, ROOT_FILE, USERS, is_key_id
from adapter_store.text import location, parse_json_object, to_json
from adapter_store.vault import STORE, Vault

if TYPE_CHECKING:
    from adapter_store.backends.protocol import Backend
    from adapter_store.keys import KeyProvider

MIN_PEPPER_BYTES: Final = 16
_MAX_ROOT_BYTES = 64 * 1024
# No user key is ever equal to it: user ids hold no NUL.
_CHECKED_TEXT = "\0adapter_store check value"


@dataclass(frozen=True)
class Root:
    """An opened store: its id, its pepper, the vault of an encrypted one, and the pepper's key in it where it is there."""

    store_id: str
    pepper: bytes
    vault: Vault | None
    pepper_key: str | None


def keyed_hash(pepper: bytes, text: str) -> str:
    """Return HMAC-SHA256(pepper, text as UTF-8) in hex: the user key, where `text` is a user id."""
    return hmac.digest(pepper, text.encode(), hashlib.sha256).hex()


def open_root(backend: "Backend", pepper: bytes | None, keys: "KeyProvider | None") -> Root | None:
    """Return the opened store, None where there is none yet.

    KeyMismatchError where `pepper` or `keys` are not the store's, IntegrityError where the root file is damaged or lost,
    FormatVersionError where it is newer.
    """
    data = _read(backend)
    if data is None and backend.list_folder(USERS):
        # Users come after the root file, so it is there by now, or somebody removed it.
        data = _read(backend)
        if data is None:
            raise IntegrityError(
                f"{location(backend.url, ROOT_FILE)} is missing, but the store has users: "
                "without it nobody can be found; restore it from a backup"
            )
    return None if data is None else _opened(backend, data, pepper, keys)


def make_root(backend: "Backend", pepper: bytes | None, keys: "KeyProvider | None") -> Root:
    """Return the opened store, which is made where there is none. Raises what `open_root` raises."""
    root = open_root(backend, pepper, keys)
    while root is None:
        made, store_id = pepper or os.urandom(32), os.urandom(16).hex()
        vault = None if keys is None else Vault(backend, store_id, keys)
        wrapped = vault.add(STORE, made) if vault is not None and pepper is None else None
        content = {
            "format": FORMAT,
            "id": store_id,
            "check": keyed_hash(made, _CHECKED_TEXT),
            "encrypted": vault is not None,
            "pepper": None if pepper or vault else made.hex(),
            "pepper_key": wrapped,
        }
        try:
            backend.put_if_absent(ROOT_FILE, to_json(content))
        except FileExistsError:
            # Another first publisher was faster, and its pepper counts; or the answer to our own put was lost on its way.
            if vault is not None and wrapped is not None and _has_another_pepper(backend, wrapped):
                vault.remove(STORE, wrapped)
        root = open_root(backend, pepper, keys)
    return root


def _has_another_pepper(backend: "Backend", key: str) -> bool:
    """Tell whether the root file that is there names another pepper than `key`. In doubt it does not."""
    data = _read(backend)
    try:
        return data is not None and parse_json_object(data).get("pepper_key") != key
    except ValueError:
        return False


def _read(backend: "Backend") -> bytes | None:
    try:
        return backend.get(ROOT_FILE, _MAX_ROOT_BYTES)
    except FileNotFoundError:
        return None


def _opened(
    backend: "Backend", data: bytes, given: bytes | None, keys: "KeyProvider | None"
) -> Root:
    where = location(backend.url, ROOT_FILE)
    try:
        content = parse_json_object(data)
        check_format(content)
        facts = _facts(content)
    except FormatVersionError as error:
        raise FormatVersionError(
            f"cannot open {where}: {error}; upgrade the package that opens it"
        ) from None
    except ValueError as error:
        raise IntegrityError(
            f"{where} is no root file of a store: {error}; restore it from a backup"
        ) from None
    vault = _vault(backend, facts, keys, where)
    stored = facts.pepper
    if given is None and vault is not None and facts.pepper_key is not None:
        stored = _unwrapped(vault, facts.pepper_key, where)
    if given is None and stored is None:
        raise KeyMismatchError(
            f"{where} was made with a pepper of its owner: pass that one as pepper="
        )
    if given is not None and not hmac.compare_digest(keyed_hash(given, _CHECKED_TEXT), facts.check):
        raise KeyMismatchError(
            f"{where} was made with another pepper than the one given: pass the one it was made with"
            + (", or none, since it keeps its own" if stored or facts.pepper_key else "")
        )
    if stored is not None and keyed_hash(stored, _CHECKED_TEXT) != facts.check:
        raise IntegrityError(
            f"{where} is damaged: its pepper and its check value differ; restore it from a backup"
        )
    return Root(facts.store_id, given or stored or b"", vault, facts.pepper_key)


def _vault(
    backend: "Backend", facts: "_Facts", keys: "KeyProvider | None", where: str
) -> Vault | None:
    if facts.encrypted and keys is None:
        raise KeyMismatchError(f"{where} is of an encrypted store: pass its keys as keys=")
    if keys is None:
        return None
    if not facts.encrypted:
        raise KeyMismatchError(
            f"{where} is of a store without encryption, and keys were given: pass none, or export its users and "
            "import them into a new store that is made with these keys"
        )
    return Vault(backend, facts.store_id, keys)


def _unwrapped(vault: Vault, key: str, where: str) -> bytes:
    try:
        return vault.secret(STORE, key)
    except FileNotFoundError:
        raise IntegrityError(
            f"the pepper of {where} is missing from the store's keys: restore the folder keys/ from a backup"
        ) from None


@dataclass(frozen=True)
class _Facts:
    """What a root file says."""

    store_id: str
    check: str
    encrypted: bool
    pepper: bytes | None
    pepper_key: str | None


def _facts(content: dict[str, Any]) -> _Facts:
    check, pepper = content.get("check"), content.get("pepper")
    # Before format 2 a store had no id; its check value is as good.
    store_id, encrypted, key = (
        content.get("id", check),
        content.get("encrypted", False),
        content.get("pepper_key"),
    )
    if not isinstance(check, str) or not check.isascii():
        raise ValueError("it has no check value")
    if pepper is not None and not isinstance(pepper, str):
        raise ValueError("its pepper is not text")
    if not isinstance(store_id, str) or not store_id.isascii() or not store_id.isalnum():
        raise ValueError("it has no id")
    if not isinstance(encrypted, bool) or (
        key is not None and not (isinstance(key, str) and is_key_id(key))
    ):
        raise ValueError("it does not say how it is encrypted")
    return _Facts(
        store_id, check, encrypted, None if pepper is None else bytes.fromhex(pepper), key
    )
