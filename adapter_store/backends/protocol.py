"""The seam between the store and its storage: five verbs, and the URL that picks a backend."""

import os
from typing import Protocol, runtime_checkable
from urllib.parse import unquote

from adapter_store.backends.local import LocalBackend
from adapter_store.backends.memory import MemoryBackend
from adapter_store.errors import BackendError
from adapter_store.facts import StoredFile
from adapter_store.text import shorten, without_secrets


@runtime_checkable
class Backend(Protocol):
    """Where bytes lie, under relative keys with slashes. Any thread may call.

    Besides what is said below, the verbs raise BackendError only: unavailable, refused, full.
    """

    @property
    def url(self) -> str:
        """The location, as a URL; the store masks its secrets before it prints it."""

    def get(self, key: str, max_bytes: int) -> bytes:
        """Return the content of `key`, of a longer one its first `max_bytes` bytes.

        Raises FileNotFoundError.
        """

    def stat(self, key: str) -> StoredFile | None:
        """Return what is known of the file `key`, None where it does not exist."""

    def put_if_absent(self, key: str, data: bytes) -> None:
        """Write `key` whole or not at all, durably before returning.

        FileExistsError where it exists already. Of many that try at once, in any processes, exactly
        one wins.
        """

    def list_folder(self, folder: str) -> list[str]:
        """Return the sorted names of the files and folders directly in `folder`.

        A folder that does not exist is empty.
        """

    def delete(self, key: str) -> None:
        """Remove `key`; where it does not exist, do nothing."""


def open_backend(location: str | os.PathLike[str] | Backend) -> Backend:
    """Return the backend of a folder path or a URL (file, memory, s3, gs, az).

    A backend is returned as it is. Nothing is read or made yet. BackendError for a URL that is not
    supported, TypeError for another kind of object.
    """
    if isinstance(location, os.PathLike):
        return LocalBackend(location)
    if isinstance(location, str):
        return _open_text(location)
    if isinstance(location, Backend):
        return location
    raise TypeError(f"a store is named by a folder, a URL or a Backend, not by {shorten(location)}")


def _open_text(location: str) -> Backend:
    scheme, separator, rest = location.partition("://")
    if not separator:
        return LocalBackend(location)
    match scheme.lower():
        case "memory":
            return MemoryBackend.shared(rest)
        case "file":
            return _open_file(location, rest)
        case "s3" | "gs" | "az":
            from adapter_store.backends.cloud import ObjectBackend  # the only user of obstore

            return ObjectBackend.from_url(location)
    raise BackendError(
        f"store URL {without_secrets(location)} has an unknown scheme: supported are a folder "
        "path, file:///absolute/path, memory://name, s3://bucket/prefix, gs://bucket/prefix and "
        "az://container/prefix"
    )


def _open_file(url: str, rest: str) -> Backend:
    path = rest.removeprefix("localhost")
    if not path.startswith("/") or "?" in path or "#" in path:
        raise BackendError(
            f"store URL {without_secrets(url)} names no folder of this machine: write "
            "file:///absolute/path (with %3F for ? and %23 for #), or give the plain path"
        )
    return LocalBackend(unquote(path))
