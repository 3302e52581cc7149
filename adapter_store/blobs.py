"""The files of published versions: sealed where encrypted, read through the cache, checked."""

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from adapter_store import layout
from adapter_store.backends.parallel import each
from adapter_store.backends.protocol import Backend
from adapter_store.cache import AdapterCache
from adapter_store.errors import BackendError, IntegrityError, InvalidAdapterError
from adapter_store.facts import AdapterVersion, Limits
from adapter_store.root import Root
from adapter_store.scratch import (
    remove_scratch,
    remove_scratch_everywhere,
    scratch_names,
    write_scratch,
)
from adapter_store.text import location, shorten


class Blobs:
    """The content of versions, in one store."""

    def __init__(
        self, backend: Backend, root: Root, cache: AdapterCache | None, limits: Limits
    ) -> None:
        self._backend = backend
        self._store_id = root.store_id
        self._vault = root.vault
        self._cache = cache
        self._limits = limits

    def write(self, version: AdapterVersion, files: Mapping[str, bytes], key: str | None) -> None:
        """Write a version's files, sealed with the user's `key` where the store is encrypted."""

        def put(item: tuple[str, str]) -> None:
            name, path = item
            try:
                self._backend.put_if_absent(path, self._sealed(version, name, files[name], key))
            except FileExistsError:
                # The answer to an earlier try of the storage client may have been lost on its way.
                if not self._holds(version, name, path, files[name]):
                    raise BackendError(
                        f"{location(self._backend.url, path)} is taken by other content: "
                        "run gc, then try again"
                    ) from None

        each(self._backend, put, _paths(version))

    def read(self, version: AdapterVersion, check_listed: Callable[[], None]) -> dict[str, bytes]:
        """Return a version's files, size and sha256 checked.

        `check_listed` is called after a copy was put into the cache: an erasure in between has
        missed that copy. FileNotFoundError where a file, or its key, is gone.
        """
        for name in layout.ADAPTER_FILES:
            size, limit = version.files[name].size, self._limits.bytes_of(name)
            if size > limit:
                raise InvalidAdapterError(
                    f"{self._where(version, name)} has {size} bytes, more than the {limit} that "
                    "this store reads: open it with larger Limits"
                )
        if self._cache is None:
            return self._checked(version, self._stored(version))
        cached = self._cached(version)
        if cached is None:
            cached = self._fetched(self._cache, version)
            check_listed()
        return cached

    def check(self, version: AdapterVersion) -> None:
        """Check what the storage has, past the cache. Raises as `read` does."""
        self._checked(version, self._stored(version))

    def remove(self, version: AdapterVersion) -> None:
        """Remove a version's files, then this machine's copies. BackendError names what is left."""
        for _, path in _paths(version):
            try:
                self._backend.delete(path)
            except BackendError as error:
                raise BackendError(
                    f"version {version.version} of user {shorten(version.user_id)} is no longer "
                    f"listed, but its files are left: {error}, then remove them with gc"
                ) from error
        self.forget(version.user_key, version.version)

    def remove_folder(self, user_key: str, version: str) -> None:
        """Remove whatever lies in the storage's folder of a version that is not listed."""
        folder = layout.version_folder(user_key, version)
        # An empty folder goes with its last file.
        for name in self._backend.list_folder(folder) or layout.ADAPTER_FILES:
            self._backend.delete(f"{folder}/{name}")

    def forget(self, user_key: str, version: str | None = None) -> None:
        """Remove the copies of a user on this machine; of a version those of process and cache."""
        if version is None:
            remove_scratch_everywhere(self._scratch_name(user_key))
        else:
            remove_scratch(self._scratch_name(user_key, version))
        if self._cache is not None:
            try:
                self._cache.drop(self._store_id, user_key, version)
            except OSError as error:
                raise BackendError(
                    f"a copy in {self._cache} cannot be removed ({error}): "
                    "correct that, then repeat this"
                ) from error

    def copies(self, user_key: str) -> set[str]:
        """Return a user's versions of which this process, or this machine's cache, has a copy."""
        versions = {name.rpartition("@")[2] for name in scratch_names(self._scratch_name(user_key))}
        if self._cache is not None:
            versions.update(self._cache.versions(self._store_id, user_key))
        return versions

    def as_folder(self, version: AdapterVersion, files: Mapping[str, bytes]) -> Path:
        """Return a temporary folder of this process with a version's files.

        BackendError where it cannot be written.
        """
        return write_scratch(self._scratch_name(version.user_key, version.version), files)

    def _scratch_name(self, user_key: str, version: str = "") -> str:
        return f"{self._store_id[:16]}-{user_key}@{version}"

    def _holds(self, version: AdapterVersion, name: str, path: str, content: bytes) -> bool:
        try:
            stored = self._backend.get(path, len(content) + self._vault.overhead_bytes + 1)
            return self._plain(version, name, stored) == content
        except (FileNotFoundError, ValueError):
            return False

    def _fetched(self, cache: AdapterCache, version: AdapterVersion) -> dict[str, bytes]:
        with cache.fetching(self._store_id, version.user_key, version.version):
            cached = self._cached(version)
            if cached is not None:  # another process fetched it meanwhile
                return cached
            stored = self._stored(version)
            files = self._checked(version, stored)
            cache.write(self._store_id, version.user_key, version.version, stored)
        return files

    def _cached(self, version: AdapterVersion) -> dict[str, bytes] | None:
        if self._cache is None:
            return None
        sizes = {
            name: file.size + self._vault.overhead_bytes for name, file in version.files.items()
        }
        stored = self._cache.read(self._store_id, version.user_key, version.version, sizes)
        if stored is None:
            return None
        with contextlib.suppress(IntegrityError):
            return self._checked(version, stored)
        self.forget(version.user_key, version.version)
        return None

    def _stored(self, version: AdapterVersion) -> dict[str, bytes]:

        def get(item: tuple[str, str]) -> bytes:
            name, path = item
            size = version.files[name].size + self._vault.overhead_bytes
            return self._backend.get(path, size + 1)

        contents = each(self._backend, get, _paths(version))
        return dict(zip(layout.ADAPTER_FILES, contents, strict=True))

    def _checked(self, version: AdapterVersion, stored: Mapping[str, bytes]) -> dict[str, bytes]:
        files = {}
        for name, data in stored.items():
            published = version.files[name]
            size = len(data) - self._vault.overhead_bytes
            if size != published.size:
                # No more than one byte too many was read.
                shown = f"more than {published.size}" if size > published.size else max(0, size)
                problem = f"has {shown} bytes, published were {published.size}"
                raise self._damaged(version, name, problem)
            try:
                files[name] = self._plain(version, name, data)
            except ValueError as error:
                raise self._damaged(version, name, f"is damaged: {error}") from None
            if hashlib.sha256(files[name]).hexdigest() != published.sha256:
                raise self._damaged(version, name, "is not what was published: its sha256 differs")
        return files

    def _plain(self, version: AdapterVersion, name: str, data: bytes) -> bytes:
        return self._vault.unseal(version.user_key, f"{version.version}/{name}", data)

    def _sealed(self, version: AdapterVersion, name: str, data: bytes, key: str | None) -> bytes:
        if len(data) > self._vault.max_bytes:
            raise InvalidAdapterError(
                f"{name} has {len(data)} bytes, an encrypted store takes up to "
                f"{self._vault.max_bytes}: publish a smaller one"
            )
        return self._vault.seal(version.user_key, key, f"{version.version}/{name}", data)

    def _where(self, version: AdapterVersion, name: str) -> str:
        folder = layout.version_folder(version.user_key, version.version)
        return location(self._backend.url, f"{folder}/{name}")

    def _damaged(self, version: AdapterVersion, name: str, problem: str) -> IntegrityError:
        return IntegrityError(
            f"{self._where(version, name)} {problem}; restore it from a backup, "
            "activate another version, or publish again"
        )


def _paths(version: AdapterVersion) -> list[tuple[str, str]]:
    """Return the name of each of a version's files, and where it lies in the store."""
    folder = layout.version_folder(version.user_key, version.version)
    return [(name, f"{folder}/{name}") for name in layout.ADAPTER_FILES]
