"""Which adapter store is meant: the one given, the environment's, or one in a default folder.

COPE_STORE            folder or URL
COPE_STORE_KEY_FILE   file with the master keys of an encrypted store
COPE_STORE_KEYS       the master keys themselves, where no file is named
COPE_STORE_PEPPER     the pepper in hexadecimal, where the store does not keep its own
COPE_STORE_CACHE      folder that fetched adapters of a remote store are kept in
"""

import os
from functools import lru_cache
from pathlib import Path

from platformdirs import user_data_path

from adapter_store import AdapterStore
from adapter_store.backends.local import local_path
from adapter_store.errors import KeyMismatchError
from adapter_store.keys import EnvironmentKeys, FileKeys, KeyProvider
from adapter_store.root import MIN_PEPPER_BYTES

_SECRETS = ("COPE_STORE_KEY_FILE", "COPE_STORE_KEYS", "COPE_STORE_PEPPER")
_SETTINGS = (*_SECRETS, "COPE_STORE_CACHE")


def open_store(store: "str | os.PathLike[str] | AdapterStore | None" = None) -> AdapterStore:
    """Return the store at a folder or URL; an open store as it is.

    None takes the environment's `COPE_STORE`, else `adapters` in the user data folder of
    langchain-cope. The same location gives the same object, with what it remembers, as long as the
    environment says the same. Nothing is created until something is to be published.
    KeyMismatchError where the environment's keys or pepper cannot be used.
    """
    if isinstance(store, AdapterStore):
        return store
    return _opened(location_of(store), *map(_setting, _SETTINGS))


def location_of(store: "str | os.PathLike[str] | None" = None) -> str:
    """Return the folder or URL of the store that is meant, as another process may open it."""
    location = os.fspath(store or os.environ.get("COPE_STORE") or default_folder())
    if "://" not in location:
        # What is relative, or the home folder's, may mean another folder later.
        location = str(local_path(location))
    return location


def _setting(name: str) -> str | None:
    value = os.environ.get(name)
    # As where a secret did not arrive: a plain store shall not be made of that.
    if value == "" and name in _SECRETS:
        raise KeyMismatchError(
            f"the environment's {name} is set and empty: give it a value, or unset it"
        )
    return value or None


@lru_cache(maxsize=64)
def _opened(
    location: str, key_file: str | None, keys: str | None, pepper: str | None, cache: str | None
) -> AdapterStore:
    provider: KeyProvider | None = None
    if key_file:
        provider = FileKeys(key_file)
    elif keys:
        provider = EnvironmentKeys("COPE_STORE_KEYS")
    secret = None if pepper is None else _pepper(pepper)
    return AdapterStore(location, pepper=secret, keys=provider, cache=cache)


def _pepper(text: str) -> bytes:
    try:
        pepper = bytes.fromhex(text)
    except ValueError:  # what it says may hold the secret
        pepper = b""
    if len(pepper) < MIN_PEPPER_BYTES:
        raise KeyMismatchError(
            "the environment's COPE_STORE_PEPPER cannot be used: give it in hexadecimal, "
            f"at least {MIN_PEPPER_BYTES} random bytes"
        )
    return pepper


def default_folder() -> Path:
    """Return the folder where adapters are kept by default."""
    return user_data_path("langchain-cope", appauthor=False) / "adapters"
