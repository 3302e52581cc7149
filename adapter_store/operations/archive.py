"""A whole user as one tar file: manifest.json first, then each version's two files.

It is written whole or not at all. It is read as if an enemy had made it: member after member in the
order that the manifest announces, plain files only, nothing is unpacked to a disk, and no more is
read at once than the manifest and the store's limits allow.
"""

import contextlib
import hashlib
import hmac
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import IO, Any, BinaryIO, Final, cast

from adapter_store import layout
from adapter_store.checks import (
    check_alpha,
    check_base,
    check_idempotency_key,
    check_tau,
    check_user_id,
    check_values,
)
from adapter_store.entry import MAX_ENTRY_BYTES, check_format, version_from_json, version_to_json
from adapter_store.errors import BackendError, FormatVersionError, InvalidAdapterError
from adapter_store.facts import AdapterVersion, FileFacts, Limits, UserHead
from adapter_store.files import read_adapter
from adapter_store.open_store import OpenStore
from adapter_store.root import Root, keyed_hash
from adapter_store.text import parse_json_object, shorten, to_json

MANIFEST: Final = "manifest.json"
_PIECE = 1024**2
# What the library raises for files that are not whole tar files.
_UNREADABLE_TAR = (
    tarfile.TarError,
    ValueError,
    EOFError,
    LookupError,
    OverflowError,
    RecursionError,
    OSError,
)

Origin = tuple[str, str]
"""What identifies a version in every store that it came to: its idempotency key and its digest."""


@dataclass(frozen=True)
class Manifest:
    """What an archive says of its user.

    `store_id` and `seq` say which store it comes from, and where the log was. Anyone can write
    that; `proof` is what only that store can make of all the rest, `proven`.
    """

    store_id: str
    seq: int
    user_id: str
    active: str | None
    versions: tuple[AdapterVersion, ...]
    proven: str
    proof: str

    def comes_from(self, root: Root) -> bool:
        """Return whether that store wrote it, and it is unchanged since."""
        return self.store_id == root.store_id and hmac.compare_digest(
            self.proof, keyed_hash(root.pepper, self.proven)
        )

    def origin(self, version: AdapterVersion) -> Origin:
        """Return what identifies one of its versions."""
        return origin_of(self.store_id, version)


def origin_of(store_id: str, version: AdapterVersion) -> Origin:
    """Return what identifies a version of that store everywhere.

    Without an idempotency key of its own, its first store and id stand for one.
    """
    key = version.idempotency_key
    if key is None:
        key = f"import {store_id} {version.version}"
    return key, version.digest


def write_archive(
    store: OpenStore,
    head: UserHead,
    path: Path,
    fetch: Callable[[AdapterVersion], dict[str, bytes]],
) -> None:
    """Write a user's versions as a new file.

    BackendError where it exists already or cannot be written; raises what `fetch` raises.
    """
    staged = path.with_name(f".{path.name[:100]}.{os.urandom(6).hex()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
                manifest = to_json(_manifest_json(store, head))
                _add(archive, MANIFEST, manifest, head.updated_at)
                for version in head.versions:
                    for name, data in fetch(version).items():
                        _add(archive, _member(version, name), data, version.created_at)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(staged, path)  # never over a file that is there
        except FileExistsError:
            raise BackendError(f"{path} is there already: name a new file") from None
    except OSError as error:
        raise BackendError(
            f"cannot write an archive to {path} ({error.strerror or error}): "
            "name a new file where this user may write"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # its parent may be a file
            staged.unlink()


def read_archive(
    file: BinaryIO, limits: Limits, where: str, user_key: str = "0" * 64
) -> tuple[Manifest, Iterator[tuple[AdapterVersion, dict[str, bytes]]]]:
    """Return an archive's manifest, and its versions one by one, checked.

    InvalidAdapterError where the file is not such an archive.
    """
    members = _members(_Careful(file), where)
    data = _expect(members, MANIFEST, None, MAX_ENTRY_BYTES, where)
    try:
        manifest = _manifest(data, limits, user_key)
    except FormatVersionError as error:
        raise FormatVersionError(
            f"cannot import {where}: {error}; upgrade the package that reads it"
        ) from None
    except ValueError as error:
        raise InvalidAdapterError(
            f"{where} has no usable manifest: {error}; export the user again"
        ) from None
    return manifest, _versions(members, manifest, limits, where)


def check_archive(file: BinaryIO, limits: Limits, where: str) -> Manifest:
    """Read an archive to its end and return its manifest.

    InvalidAdapterError where anything in it is wrong.
    """
    manifest, versions = read_archive(file, limits, where)
    for _ in versions:
        pass
    return manifest


def _manifest_json(store: OpenStore, head: UserHead) -> dict[str, Any]:
    content = {
        "format": layout.FORMAT,
        "store": store.root.store_id,
        "seq": head.seq,
        "user_id": head.user_id,
        "active": head.active,
        "versions": [version_to_json(version) for version in head.versions],
    }
    return {**content, "proof": keyed_hash(store.root.pepper, _proven(content))}


def _proven(content: Mapping[str, Any]) -> str:
    # No user key is ever equal to what is made of it: user ids hold no NUL.
    return f"\0archive {hashlib.sha256(to_json(content)).hexdigest()}"


def _manifest(data: bytes, limits: Limits, user_key: str) -> Manifest:
    content = parse_json_object(data)
    check_format(content)
    proof = content.pop("proof", "")  # older archives have none
    store_id, seq, active = content.get("store"), content.get("seq"), content.get("active")
    user_id, rows = content.get("user_id"), content.get("versions")
    if not isinstance(store_id, str) or type(seq) is not int or not isinstance(rows, list):
        raise ValueError("it lacks the store, its number in the log or the versions")
    if not isinstance(user_id, str) or not (active is None or isinstance(active, str)):
        raise ValueError("it lacks the user, or what was active")
    if not isinstance(proof, str) or not proof.isascii():
        raise ValueError("its proof is not text")
    try:
        check_user_id(user_id, limits)
        versions = tuple(
            _checked(version_from_json(user_id, user_key, row), store_id, limits) for row in rows
        )
    except InvalidAdapterError as error:
        raise ValueError(str(error)) from None
    if len({version.version for version in versions}) != len(versions):
        raise ValueError("it lists a version twice")
    return Manifest(store_id, seq, user_id, active, versions, _proven(content), proof)


def _checked(version: AdapterVersion, store_id: str, limits: Limits) -> AdapterVersion:
    """Return a version with values that a publish would accept, or raise what that raises."""
    check_idempotency_key(origin_of(store_id, version)[0])
    return replace(
        version,
        base=check_base(version.base, limits),
        metrics=check_values(version.metrics, "metrics", limits),
        alpha=check_alpha(version.alpha),
        tau=check_tau(version.tau),
        metadata=check_values(version.metadata, "metadata", limits),
    )


def _versions(
    members: Iterator[tuple[tarfile.TarInfo, IO[bytes]]],
    manifest: Manifest,
    limits: Limits,
    where: str,
) -> Iterator[tuple[AdapterVersion, dict[str, bytes]]]:
    for version in manifest.versions:
        files = {}
        for name in layout.ADAPTER_FILES:
            size, max_bytes = version.files[name].size, limits.bytes_of(name)
            files[name] = _expect(members, _member(version, name), size, max_bytes, where)
        files = read_adapter(files, limits)
        if version.files != {name: FileFacts.of(data) for name, data in files.items()}:
            raise InvalidAdapterError(
                f"version {version.version} in {where} is not what its manifest says: "
                "its sha256 differs; export the user again"
            )
        yield version, files
    more = next(members, None)
    if more is not None:
        raise InvalidAdapterError(
            f"{where} holds {shorten(more[0].name)}, which its manifest does not announce: "
            "nothing was imported"
        )


def _expect(
    members: Iterator[tuple[tarfile.TarInfo, IO[bytes]]],
    name: str,
    size: int | None,
    max_bytes: int,
    where: str,
) -> bytes:
    """Return the content of the next member: a plain file of this name and size, and no larger."""
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
            f"{name} in {where} has {member.size} bytes, expected are "
            f"{max_bytes if size is None else size} and at most {max_bytes}: nothing was imported"
        )
    pieces = []
    try:
        while piece := content.read(_PIECE):
            pieces.append(piece)
    except (tarfile.TarError, OSError) as error:
        raise InvalidAdapterError(
            f"{where} breaks off within {name} ({error}): export the user again"
        ) from None
    return b"".join(pieces)


def _members(file: "_Careful", where: str) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """Yield the members of a tar file in their order.

    InvalidAdapterError for whatever the library cannot read.
    """
    try:
        with tarfile.open(fileobj=cast(BinaryIO, file), mode="r:") as archive:
            for member in archive:
                content = None
                if member.isreg() and not member.issparse():
                    content = archive.extractfile(member)
                yield member, content or io.BytesIO()
    except (InvalidAdapterError, FormatVersionError):
        raise
    except _UNREADABLE_TAR as error:
        raise InvalidAdapterError(
            f"{where} is not a tar file that export_user wrote ({error}): give one that it wrote"
        ) from None


def _member(version: AdapterVersion, name: str) -> str:
    return f"versions/{version.version}/{name}"


def _add(archive: tarfile.TarFile, name: str, data: bytes, time: datetime) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = len(data), int(time.timestamp()), 0o600
    archive.addfile(member, io.BytesIO(data))


class _Careful(io.RawIOBase):
    """A file that is never read more than a few pieces at once: a header may claim any length."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= 2 * _PIECE:
            raise InvalidAdapterError(
                "the archive has a header of an impossible length: nothing was imported"
            )
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
