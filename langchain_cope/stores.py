"""Which adapter store is meant, and how it is opened: what is given, else the environment, else the user's data folder.

COPE_STORE            folder or URL
COPE_STORE_KEY_FILE   file with the master keys of an encrypted store; or COPE_STORE_KEYS, the keys themselves
COPE_STORE_PEPPER     the pepper in hexadecimal, where the store does not keep its own
COPE_STORE_CACHE      folder that fetched adapters of a remote store are kept in
"""

import os
from functools import lru_cache
from pathlib import Path

from platformdirs import user_data_path

from adapter_store import AdapterStore
from adapter_store.errors import KeyMismatchError
from adapter_store.root import MIN_PEPPER_BYTES

_SECRETS = ("COPE_STORE_KEY_FILE", "COPE_STORE_KEYS", "COPE_STORE_PEPPER")
_SETTINGS = (*_SECRETS, "COPE_STORE_CACHE")


def open_store(store: "str | os.PathLike[str] | AdapterStore | None" = None) -> AdapterStore:
    """The store at a folder or URL; an open store as it is.

    None takes the environment's ``COPE_STORE``, else ``adapters`` in the user data folder of langchain-cope. The same
    place gives the same object, with what it remembers, as long as the environment says the same. Nothing is created
    until something is to be published. KeyMismatchError for keys or a pepper in the environment that are none.
    """
    if isinstance(store, AdapterStore):
        return store
    place = os.fspath(store or os.environ.get("COPE_STORE") or default_folder())
    if isinstance(place, str) and "://" not in place:
        from adapter_store.backends.local import local_path

        place = str(
            local_path(place)
        )  # what is relative, or the home folder's, may mean another one later
    return _opened(place, *map(_setting, _SETTINGS))


def _setting(name: str) -> str | None:
    value = os.environ.get(name)
    if (
        value == "" and name in _SECRETS
    ):  # as where a secret did not arrive: a plain store shall not be made of that
        raise KeyMismatchError(
            f"the environment's {name} is set and empty: give it a value, or unset it"
        )
    return value or None


@lru_cache(maxsize=64)
def _opened(
    place: str, key_file: str | None, keys: str | None, pepper: str | None, cache: str | None
) -> AdapterStore:
    from adapter_store.keys import EnvironmentKeys, FileKeys

    provider = (
        FileKeys(key_file) if key_file else EnvironmentKeys("COPE_STORE_KEYS") if keys else None
    )
    return AdapterStore(
        place, pepper=None if pepper is None else _pepper(pepper), keys=provider, cache=cache
    )


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
    """Where adapters are kept when nobody says otherwise."""
    return user_data_path("langchain-cope", appauthor=False) / "adapters"
