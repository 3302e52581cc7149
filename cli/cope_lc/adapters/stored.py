"""Stores and versions as commands need them: opened by URL, and as plain data."""

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import typer

from cope_lc.text import clean

if TYPE_CHECKING:
    from adapter_store import AdapterStore, AdapterVersion, HistoryEntry, UserHead


def store_at(url: str | None) -> "AdapterStore":
    """Open the store at a folder or URL; None is the environment's, else the default."""
    from langchain_cope.stores import open_store

    return open_store(url)


def existing_store_at(url: str | None) -> "AdapterStore":
    """Open a store that must exist: of a mistyped one a command must not say that all is well."""
    store = store_at(url)
    if not store.exists():
        raise typer.BadParameter(
            f"{clean(location_of(store))} is not a store: nothing was done; name the right one",
            param_hint="--store",
        )
    return store


def local_folder(store: "AdapterStore") -> Path | None:
    """Return the folder of a local store, whether it exists yet or not."""
    scheme, _, path = store.url.partition("://")
    return Path(unquote(path)) if scheme == "file" else None


def location_of(store: "AdapterStore") -> str:
    """Return where a store is, for people: a plain path where it is a folder."""
    return str(local_folder(store) or store.url)


def user_facts(user: "UserHead") -> dict[str, Any]:
    """Return a listed user as plain data for `--json`."""
    return {
        "user_id": user.user_id,
        "active": user.active,
        "versions": [version.version for version in user.versions],
        "updated_at": user.updated_at.isoformat(),
    }


def history_facts(change: "HistoryEntry") -> dict[str, Any]:
    """Return a change of a user as plain data for `--json`."""
    return {**asdict(change), "at": change.at.isoformat()}


def version_facts(version: "AdapterVersion") -> dict[str, Any]:
    """Return a version as plain data for `--json`."""
    return {
        "version": version.version,
        "created_at": version.created_at.isoformat(),
        "digest": version.digest,
        "bytes": num_bytes(version),
        "base": version.base,
        "alpha": version.alpha,
        "tau": version.tau,
        "metrics": version.metrics,
        "metadata": version.metadata,
    }


def num_bytes(version: "AdapterVersion") -> int:
    """Return the size of a version's files together."""
    return sum(file.size for file in version.files.values())


def local_time(time: datetime) -> str:
    """Return a time for people, in this machine's zone."""
    return f"{time.astimezone():%Y-%m-%d %H:%M}"
