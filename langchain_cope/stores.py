"""Which adapter store is meant: the one given, else ``COPE_STORE``, else the user's data folder."""

import os
from pathlib import Path

from platformdirs import user_data_path

from adapter_store import AdapterStore


def open_store(store: "str | os.PathLike[str] | AdapterStore | None" = None) -> AdapterStore:
    """The store at a folder, a ``file://`` or a ``memory://`` URL; an open store as it is.

    None takes the environment's ``COPE_STORE``, else ``adapters`` in the user data folder of langchain-cope.
    Nothing is created until something is to be published.
    """
    if isinstance(store, AdapterStore):
        return store
    return AdapterStore(store or os.environ.get("COPE_STORE") or default_folder())


def default_folder() -> Path:
    """Where adapters are kept when nobody says otherwise."""
    return user_data_path("langchain-cope", appauthor=False) / "adapters"
