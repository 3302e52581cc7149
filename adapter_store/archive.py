"""A whole user as one tar file: manifest.json first, then each version's two files. Written whole or not at all.

An archive is read as if an enemy had made it: member after member in the order that the manifest announces, plain files
only, nothing is unpacked to a disk, and no more is read at once than the manifest and the store's limits allow.
"""

import contextlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, BinaryIO, Final, cast

from adapter_store import layout
from adapter_store.checks import (
    check_alpha,
    check_base,
    check_facts,
    check_idempotency_key,
    check_tau,
    check_user_id,
)
from adapter_store.entry import MAX_ENTRY_BYTES, check_format, version_from_json, version_to_json
from adapter_store.errors import (
    AdapterStoreError,
    BackendError,
    FormatVersionError,
    InvalidAdapterError,
    UserErasedError,
)
from adapter_store.facts import AdapterVersion, Limits, UserHead
from adapter_store.files import read_adapter
from adapter_store.log import ErasedSinceError
from adapter_store.opened import Opened
from adapter_store.publishing import CollectedError, activated, check_fences, remove_dropped, without_oldest
from adapter_store.text import parse_json_object, shorten, to_json

MANIFEST: Final = "manifest.json"
_PIECE = 1024**2


@dataclass(frozen=True)
class Manifest:
    """What an archive says of its user. `store_id` and `seq`: which store it comes from, and where the log was."""

    store_id: str
    seq: int
    user_id: str
    active: str | None
    versions: tuple[AdapterVersion, ...]


def write_archive(
    opened: Opened, head: UserHead, path: Path, fetch: Callable[[AdapterVersion], dict[str, bytes]]
) -> None:
    """Write a user's versions as a new file. BackendError where it is there or cannot be written, and what `fetch` raises."""
    made = path.with_name(f".{path.name[:100]}.{os.urandom(6).hex()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
                _add(archive, MANIFEST, to_json(_manifest_json(opened, head)), head.updated_at.timestamp())
                for version in head.versions:
                    for name, data in fetch(version).items():
                        _add(archive, _member(version, name), data, version.created_at.timestamp())
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(made, path)  # never over a file that is there
        except FileExistsError:
            raise BackendError(f"{path} is there already: name a new file") from None
    except OSError as error:
        raise BackendError(
            f"cannot write an archive to {path} ({error.strerror or error}): name a new file in a place that can be written"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # a parent that is no folder
            made.unlink()


def read_archive(
    file: BinaryIO, limits: Limits, where: str, user_key: str = "0" * 64
) -> tuple[Manifest, Iterator[tuple[AdapterVersion, dict[str, bytes]]]]:
    """Return an archive's manifest, and its versions one by one, checked. InvalidAdapterError where it is none."""
    members = _members(_Careful(file), where)
    data = _expect(members, MANIFEST, None, MAX_ENTRY_BYTES, where)
    try:
        manifest = _manifest(data, limits, user_key)
    except FormatVersionError as error:
        raise FormatVersionError(f"cannot import {where}: {error}; upgrade the package that reads it") from None
    except ValueError as error:
        raise InvalidAdapterError(f"{where} has no usable manifest: {error}; export the user again") from None
    return manifest, _versions(members, manifest, limits, where)


def import_archive(opened: Opened, file: BinaryIO, limits: Limits, where: str) -> UserHead:
    """Put an archive's versions into the store, in one commit, and return the user's head.

    Versions get new ids: files under the old ones may be somebody's to remove. Those that are there already, told by
    their content and by their idempotency key, or by the place that they were first exported from, are left as they
    are. The archive's active version becomes the active one where the user has none. UserErasedError where the user
    was erased in this store after the archive was written, or ever where it comes from another store: nothing tells
    then which of the two came first.
    """
    # Read to its end first: of a bad archive nothing is stored.
    manifest, versions = read_archive(file, limits, where)
    for _ in versions:
        pass
    file.seek(0)
    user_key = opened.log.user_key(manifest.user_id)
    began = opened.log.head_or_new(user_key, manifest.user_id)
    data_seq = _data_seq(opened, manifest, began, where)
    key = opened.key_for(began)
    written: list[AdapterVersion] = []

    def imported(head: UserHead) -> UserHead | None:
        check_fences(head, manifest.user_id, data_seq, began.seq)
        there = _by_origin(opened, head)
        new = [version for version in written if _origin(manifest.store_id, version) not in there]
        there |= {_origin(manifest.store_id, version): version for version in new}
        active = next((v for v in manifest.versions if v.version == manifest.active), None)
        here = None if active is None else there.get(_origin(manifest.store_id, active))
        return _with_imported(head, new, here, key, limits.live_versions) if new else None

    try:
        there = _by_origin(opened, began)
        for version, files in read_archive(file, limits, where, user_key)[1]:
            origin = _origin(manifest.store_id, version)
            if origin not in there:
                new_id = layout.other_version(version.version)
                written.append(replace(version, version=new_id, idempotency_key=origin[0]))
                opened.blobs.write(written[-1], files, key)
        before, after = opened.log.commit(user_key, imported)
    except (ErasedSinceError, FileNotFoundError):  # or the key is gone, of a user erased since
        _discard(opened, written, began, key)
        raise UserErasedError(
            f"user {shorten(manifest.user_id)} was erased meanwhile: nothing of it is kept; destroy {where}"
        ) from None
    except CollectedError:
        _discard(opened, written, began, key)
        raise BackendError(
            f"a garbage collection of user {shorten(manifest.user_id)} came in between: nothing was imported; repeat it"
        ) from None
    except BaseException:  # Ctrl-C too leaves nothing behind
        _discard(opened, written, began, key)
        raise
    remove_dropped(opened, before, after)
    listed = {version.version for version in (*before.versions, *after.versions)}
    for version in written:
        if version.version not in listed:  # beyond the number that is kept, or imported by another process meanwhile
            opened.blobs.remove(version)
    return after


def _data_seq(opened: Opened, manifest: Manifest, began: UserHead, where: str) -> int:
    """Return where this store's log was when the archive was written, or now for one of another store."""
    if manifest.store_id != opened.root.store_id:
        if began.erased_seq > 0:
            raise UserErasedError(
                f"user {shorten(manifest.user_id)} was erased in this store, and {where}, of another store, may be "
                "older: nothing was imported; destroy it, and publish what the user has now"
            )
        return began.seq
    if manifest.seq < began.erased_seq:
        raise UserErasedError(
            f"user {shorten(manifest.user_id)} was erased after {where} was written: nothing was imported; destroy it"
        )
    return manifest.seq


_Origin = tuple[str, str]
"""What tells a version in every store that it was brought to: its idempotency key, and its digest."""


def _origin(store_id: str, version: AdapterVersion) -> _Origin:
    key = version.idempotency_key
    return f"import {store_id} {version.version}" if key is None else key, version.digest


def _by_origin(opened: Opened, head: UserHead) -> dict[_Origin, AdapterVersion]:
    return {_origin(opened.root.store_id, version): version for version in head.versions}


def _discard(opened: Opened, written: Sequence[AdapterVersion], began: UserHead, key: str | None) -> None:
    """Remove what was not committed. In doubt it stays: a listed version must have its files."""
    with contextlib.suppress(AdapterStoreError):
        head = opened.log.head_or_new(began.user_key)
        for version in written:
            if head.find(version.version) is None:
                opened.blobs.remove(version)
        if head.key != key:
            opened.drop_unused_key(began, key)


def _with_imported(
    head: UserHead, new: Sequence[AdapterVersion], active: AdapterVersion | None, key: str | None, live_versions: int
) -> UserHead:
    # Older than what is there, so they stand before it.
    changed = replace(
        head,
        user_id=new[0].user_id,
        key=head.key or key,
        operation="import",
        operation_version=new[-1].version,
        reason="",
        versions=(*new, *head.versions),
    )
    if changed.active is None and active is not None:
        changed = activated(changed, active.version)
    return without_oldest(changed, live_versions, ())


def _manifest_json(opened: Opened, head: UserHead) -> dict[str, Any]:
    return {
        "format": layout.FORMAT,
        "store": opened.root.store_id,
        "seq": head.seq,
        "user_id": head.user_id,
        "active": head.active,
        "versions": [version_to_json(version) for version in head.versions],
    }


def _manifest(data: bytes, limits: Limits, user_key: str) -> Manifest:
    content = parse_json_object(data)
    check_format(content)
    store_id, seq, active = content.get("store"), content.get("seq"), content.get("active")
    user_id, rows = content.get("user_id"), content.get("versions")
    if not isinstance(store_id, str) or type(seq) is not int or not isinstance(rows, list):
        raise ValueError("it lacks the store, the place in the log or the versions")
    if not isinstance(user_id, str) or not (active is None or isinstance(active, str)):
        raise ValueError("it lacks the user, or what was active")
    try:
        check_user_id(user_id, limits)
        versions = tuple(_checked(version_from_json(user_id, user_key, row), store_id, limits) for row in rows)
    except InvalidAdapterError as error:
        raise ValueError(str(error)) from None
    if len({version.version for version in versions}) != len(versions):
        raise ValueError("it lists a version twice")
    return Manifest(store_id, seq, user_id, active, versions)


def _checked(version: AdapterVersion, store_id: str, limits: Limits) -> AdapterVersion:
    """Return a version whose facts a publish would accept, or raise what that raises."""
    check_idempotency_key(_origin(store_id, version)[0])
    return replace(
        version,
        base=check_base(version.base, limits),
        metrics=check_facts(version.metrics, "metrics", limits),
        alpha=check_alpha(version.alpha),
        tau=check_tau(version.tau),
        metadata=check_facts(version.metadata, "metadata", limits),
    )


def _versions(
    members: Iterator[tuple[tarfile.TarInfo, IO[bytes]]], manifest: Manifest, limits: Limits, where: str
) -> Iterator[tuple[AdapterVersion, dict[str, bytes]]]:
    for version in manifest.versions:
        files = {
            name: _expect(members, _member(version, name), version.files[name].size, limits.bytes_of(name), where)
            for name in layout.ADAPTER_FILES
        }
        files = read_adapter(files, limits)
        if any(version.files[name] != type(version.files[name]).of(data) for name, data in files.items()):
            raise InvalidAdapterError(
                f"version {version.version} in {where} is not what its manifest says: its sha256 differs; "
                "export the user again"
            )
        yield version, files
    if (more := next(members, None)) is not None:
        raise InvalidAdapterError(
            f"{where} holds {shorten(more[0].name)}, which its manifest does not announce: nothing was imported"
        )


def _expect(
    members: Iterator[tuple[tarfile.TarInfo, IO[bytes]]], name: str, size: int | None, max_bytes: int, where: str
) -> bytes:
    """Return the content of the next member, which must have this name, be a plain file, and be no larger."""
    member, content = next(members, (None, io.BytesIO()))
    if member is None:
        raise InvalidAdapterError(f"{where} ends where {name} should come: export the user again")
    if member.name != name or not member.isreg() or member.issparse():
        raise InvalidAdapterError(
            f"{where} holds {shorten(member.name)} where the plain file {name} should come: "
            "only what export_user writes is imported"
        )
    if member.size > max_bytes or (size is not None and member.size != size):
        raise InvalidAdapterError(
            f"{name} in {where} has {member.size} bytes, expected are {max_bytes if size is None else size} "
            f"and at most {max_bytes}: nothing was imported"
        )
    pieces = []
    try:
        while piece := content.read(_PIECE):
            pieces.append(piece)
    except (tarfile.TarError, OSError) as error:
        raise InvalidAdapterError(f"{where} breaks off within {name} ({error}): export the user again") from None
    return b"".join(pieces)


def _members(file: "_Careful", where: str) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """Yield the members of a tar file in their order; whatever the library cannot digest is an InvalidAdapterError."""
    try:
        with tarfile.open(fileobj=cast(BinaryIO, file), mode="r:") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isreg() and not member.issparse() else None
                yield member, content or io.BytesIO()
    except (InvalidAdapterError, FormatVersionError):
        raise
    except (tarfile.TarError, ValueError, EOFError, LookupError, OverflowError, RecursionError, OSError) as error:
        raise InvalidAdapterError(
            f"{where} is no tar file that export_user wrote ({error}): give one that it did"
        ) from None


def _member(version: AdapterVersion, name: str) -> str:
    return f"versions/{version.version}/{name}"


def _add(archive: tarfile.TarFile, name: str, data: bytes, time: float) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = len(data), int(time), 0o600
    archive.addfile(member, io.BytesIO(data))


class _Careful(io.RawIOBase):
    """A file of which never more than a few pieces are read at once: a header may claim any length."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= 2 * _PIECE:
            raise InvalidAdapterError("the archive has a header of an impossible length: nothing was imported")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
