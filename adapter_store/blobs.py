"""The files of published versions: written sealed where the store is encrypted, read through the cache, always checked."""

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
from adapter_store.vault import MAX_SEALED_BYTES, OVERHEAD_BYTES


class Blobs:
    """What versions consist of, in one store."""

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
            name, place = item
            data = files[name] if key is None else self._sealed(version, name, files[name], key)
            try:
                self._backend.put_if_absent(place, data)
            except FileExistsError:
                # The answer to an earlier try of the storage client may have been lost on its way.
                if not self._holds(version, name, place, files[name]):
                    raise BackendError(
                        f"{location(self._backend.url, place)} is taken by other content: run gc, then try again"
                    ) from None

        each(self._backend, put, _places(version))

    def read(self, version: AdapterVersion, check_listed: Callable[[], None]) -> dict[str, bytes]:
        """Return a version's files, size and sha256 checked. FileNotFoundError where one, or its key, is gone.

        `check_listed` is called after a copy was put into the cache: an erasure in between has missed that copy.
        """
        for name in layout.ADAPTER_FILES:
            limit = self._limits.bytes_of(name)
            if version.files[name].size > limit:
                raise InvalidAdapterError(
                    f"{self._where(version, name)} has {version.files[name].size} bytes, more than the {limit} that "
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
        """Check what the storage has, whatever the cache says. Raises as `read` does."""
        self._checked(version, self._stored(version))

    def remove(self, version: AdapterVersion) -> None:
        """Remove a version's files, then this machine's copies. BackendError names what is left."""
        for _, place in _places(version):
            try:
                self._backend.delete(place)
            except BackendError as error:
                raise BackendError(
                    f"version {version.version} of user {shorten(version.user_id)} is no longer listed, "
                    f"but its files are left: {error}, then remove them with gc"
                ) from error
        self.forget(version.user_key, version.version)

    def remove_folder(self, user_key: str, version: str) -> None:
        """Remove whatever lies in the storage's folder of a version that is not listed."""
        folder = layout.version_folder(user_key, version)
        for name in (
            self._backend.list_folder(folder) or layout.ADAPTER_FILES
        ):  # an empty folder goes with its last file
            self._backend.delete(f"{folder}/{name}")

    def forget(self, user_key: str, version: str | None = None) -> None:
        """Remove what this machine's cache and temporary folders hold of a user, or the cache and this process of a version."""
        if version is None:
            remove_scratch_everywhere(self._scratch_name(user_key))
        else:
            remove_scratch(self._scratch_name(user_key, version))
        if self._cache is not None:
            try:
                self._cache.drop(self._store_id, user_key, version)
            except OSError as error:
                raise BackendError(
                    f"a copy in {self._cache} cannot be removed ({error}): mend that, then repeat this"
                ) from error

    def kept_here(self, user_key: str) -> set[str]:
        """Return the versions of a user of which this process, or this machine's cache, has a copy."""
        kept = {name.rpartition("@")[2] for name in scratch_names(self._scratch_name(user_key))}
        return (
            kept
            if self._cache is None
            else kept | set(self._cache.versions(self._store_id, user_key))
        )

    def as_folder(self, version: AdapterVersion, files: Mapping[str, bytes]) -> Path:
        """Return a temporary folder of this process with a version's files. BackendError where it cannot be written."""
        return write_scratch(self._scratch_name(version.user_key, version.version), files)

    def _scratch_name(self, user_key: str, version: str = "") -> str:
        return f"{self._store_id[:16]}-{user_key}@{version}"

    def _holds(self, version: AdapterVersion, name: str, place: str, content: bytes) -> bool:
        try:
            stored = self._backend.get(place, len(content) + self._overhead + 1)
            return self._plain(version, name, stored) == content
        except (FileNotFoundError, ValueError):
            return False

    def _fetched(self, cache: AdapterCache, version: AdapterVersion) -> dict[str, bytes]:
        with cache.fetching(self._store_id, version.user_key, version.version):
            if (
                cached := self._cached(version)
            ) is not None:  # another process fetched it meanwhile
                return cached
            stored = self._stored(version)
            files = self._checked(version, stored)
            cache.write(self._store_id, version.user_key, version.version, stored)
        return files

    def _cached(self, version: AdapterVersion) -> dict[str, bytes] | None:
        if self._cache is None:
            return None
        sizes = {name: facts.size + self._overhead for name, facts in version.files.items()}
        stored = self._cache.read(self._store_id, version.user_key, version.version, sizes)
        if stored is None:
            return None
        with contextlib.suppress(IntegrityError):
            return self._checked(version, stored)
        self.forget(version.user_key, version.version)
        return None

    @property
    def _overhead(self) -> int:
        return 0 if self._vault is None else OVERHEAD_BYTES

    def _stored(self, version: AdapterVersion) -> dict[str, bytes]:

        def got(item: tuple[str, str]) -> bytes:
            name, place = item
            return self._backend.get(place, version.files[name].size + self._overhead + 1)

        return dict(
            zip(layout.ADAPTER_FILES, each(self._backend, got, _places(version)), strict=True)
        )

    def _checked(self, version: AdapterVersion, stored: Mapping[str, bytes]) -> dict[str, bytes]:
        files = {}
        for name, data in stored.items():
            facts = version.files[name]
            if len(data) != facts.size + self._overhead:
                found = len(data) - self._overhead
                size = f"more than {facts.size}" if found > facts.size else str(max(0, found))
                raise self._damaged(version, name, f"has {size} bytes, published were {facts.size}")
            try:
                files[name] = self._plain(version, name, data)
            except ValueError as error:
                raise self._damaged(version, name, f"is damaged: {error}") from None
            if hashlib.sha256(files[name]).hexdigest() != facts.sha256:
                raise self._damaged(version, name, "is not what was published: its sha256 differs")
        return files

    def _plain(self, version: AdapterVersion, name: str, data: bytes) -> bytes:
        if self._vault is None:
            return data
        return self._vault.unseal(version.user_key, f"{version.version}/{name}", data)

    def _sealed(self, version: AdapterVersion, name: str, data: bytes, key: str) -> bytes:
        if self._vault is None:
            raise ValueError("a store without a vault seals nothing")
        if len(data) > MAX_SEALED_BYTES:
            raise InvalidAdapterError(
                f"{name} has {len(data)} bytes, an encrypted store takes up to {MAX_SEALED_BYTES}: publish a smaller one"
            )
        return self._vault.seal(version.user_key, key, f"{version.version}/{name}", data)

    def _where(self, version: AdapterVersion, name: str) -> str:
        return location(
            self._backend.url, f"{layout.version_folder(version.user_key, version.version)}/{name}"
        )

    def _damaged(self, version: AdapterVersion, name: str, what: str) -> IntegrityError:
        return IntegrityError(
            f"{self._where(version, name)} {what}; restore it from a backup, activate another version, or publish again"
        )


def _places(version: AdapterVersion) -> list[tuple[str, str]]:
    folder = layout.version_folder(version.user_key, version.version)
    return [(name, f"{folder}/{name}") for name in layout.ADAPTER_FILES]
