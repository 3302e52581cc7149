"""What commands want to know of a store and its versions."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

if TYPE_CHECKING:
    from adapter_store import AdapterStore, AdapterVersion, HistoryEntry


def open_existing(store: str | None) -> "AdapterStore":
    """Open a store that must be there already: whoever looks after one shall not be told that a mistyped one is well."""
    import typer

    from cope_lc.text import clean
    from langchain_cope.stores import open_store

    opened = open_store(store)
    if not opened.exists():
        raise typer.BadParameter(
            f"{clean(place_of(opened))} is no store: nothing was done; name the right one",
            param_hint="--store",
        )
    return opened


def local_folder(store: "AdapterStore") -> Path | None:
    """Return the folder of a local store, whether it is there yet or not."""
    scheme, _, path = store.url.partition("://")
    return Path(unquote(path)) if scheme == "file" else None


def place_of(store: "AdapterStore") -> str:
    """Return where a store is, for people: a plain path where it is a folder."""
    return str(local_folder(store) or store.url)


def history_facts(change: "HistoryEntry") -> dict[str, Any]:
    """Return a change of a user as plain data for ``--json``."""
    return {**asdict(change), "at": change.at.isoformat()}


def version_facts(version: "AdapterVersion") -> dict[str, Any]:
    """Return a version as plain data for ``--json``."""
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
    return sum(facts.size for facts in version.files.values())


def local_time(time: Any) -> str:
    """Return a time for people, in this machine's zone."""
    return f"{time.astimezone():%Y-%m-%d %H:%M}"
