"""The store's values: what a version is, what a user's head is, how large things may be."""

import hashlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from enum import Enum
from typing import Any, Final, NamedTuple

from adapter_store import layout
from adapter_store.text import shorten

# Recorded for people and not compared: the same base may be loaded under another name or quantized.
UNCOMPARED_PARTS: Final = frozenset({"model", "quantization"})


class Unset(Enum):
    """The type of `UNSET`."""

    UNSET = "unset"


UNSET: Final = Unset.UNSET
"""Stands for an argument that was not given, where None has a meaning of its own."""


@dataclass(frozen=True)
class Limits:
    """How much a store accepts; what is larger is refused with InvalidAdapterError."""

    weights_bytes: int = 2 * 1024**3  # adapter_model.safetensors
    config_bytes: int = 1024**2  # adapter_config.json
    facts_bytes: int = 256 * 1024  # a version's base, metrics and metadata, each, as JSON
    user_id_characters: int = 1024
    reason_characters: int = 1000  # why a change was made
    live_versions: int = 20  # of one user; a publish beyond it drops the oldest that is not active

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"Limits.{limit.name} is {shorten(value)}, "
                    "expected a whole number of at least 1"
                )

    def bytes_of(self, name: str) -> int:
        """Return how many bytes the adapter file `name` may have."""
        return self.weights_bytes if name == layout.WEIGHTS else self.config_bytes


class StoredFile(NamedTuple):
    """What the storage knows of a file.

    `size` in bytes, `modified` in seconds since 1970 by the storage's clock, and `mark`, which
    identifies this writing: the same key written anew has another one.
    """

    size: int
    modified: float
    mark: Hashable


@dataclass(frozen=True)
class FileFacts:
    """What is known of a published file: the hex sha256 of its content and its size in bytes."""

    sha256: str
    size: int

    def __post_init__(self) -> None:
        if not layout.is_sha256(self.sha256):
            raise ValueError(f"sha256 is {shorten(self.sha256)}, expected 64 hex digits")
        if self.size < 0:
            raise ValueError(f"size is {self.size}, expected at least 0")

    @classmethod
    def of(cls, data: bytes) -> "FileFacts":
        """Return what is known of a file with that content."""
        return cls(hashlib.sha256(data).hexdigest(), len(data))


@dataclass(frozen=True)
class AdapterVersion:
    """One published, immutable version of a user's adapter, without its bytes.

    `AdapterStore.fetch` brings those. `base` is the fingerprint of the base model it was trained
    on, part by part; `alpha` and `tau` are what it recommends for decoding, None where it
    recommends nothing. ValueError where a part could not be a stored one.
    """

    user_id: str
    user_key: str
    version: str
    created_at: datetime
    files: dict[str, FileFacts] = field(hash=False)
    base: dict[str, str] = field(hash=False)
    metrics: dict[str, Any] = field(default_factory=dict, hash=False)
    alpha: float | None = None
    tau: float | None = None
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)
    idempotency_key: str | None = None

    def __post_init__(self) -> None:
        # Names become paths: only our own forms may pass, wherever this object was built.
        if not layout.is_sha256(self.user_key):
            raise ValueError(f"user key is {shorten(self.user_key)}, expected 64 hex digits")
        if not layout.is_version(self.version):
            raise ValueError(
                f"version is {shorten(self.version)}, "
                "expected the form 20260131T235959Z-0123456789ab"
            )
        if set(self.files) != set(layout.ADAPTER_FILES):
            raise ValueError(
                f"files are {shorten(sorted(self.files))}, "
                f"expected {' and '.join(layout.ADAPTER_FILES)}"
            )

    @property
    def name(self) -> str:
        """`user_key@version`, the name for caches and engines: the user alone changes meaning."""
        return f"{self.user_key}@{self.version}"

    @property
    def digest(self) -> str:
        """Hex sha256 over the files' names and sha256s, in the order of the names."""
        lines = "".join(f"{name} {self.files[name].sha256}\n" for name in sorted(self.files))
        return hashlib.sha256(lines.encode()).hexdigest()


@dataclass(frozen=True)
class UserHead:
    """A user as the newest log entry has it: live versions, the active one, and the last change.

    Attributes:
        versions: The live versions, oldest first.
        candidates: Published to wait for a verdict: nobody's versions until they are accepted.
        active: The id of the active version, None where none is active.
        previous: A stack of earlier active versions, the latest last, which a rollback goes back
            through.
        seq: The number of the entry; a user's entries count from 1.
        commit: The call that wrote this entry; `parent` is that of the entry before.
        operation: "publish", "activate", "rollback", "delete", "import", "erase", "collect",
            "propose", "accept" or "withdraw".
        operation_version: The version that it was done to, "" where it was done to none.
        updated_at: When it was done; `reason` says why.
        erased_seq: What began before this entry of an erasure may not be committed any more.
        collected_seq: The same for the latest garbage collection.
        key: The encryption key of the entry, None where it has none.

    Of an erased user nothing but the numbers is left.
    """

    user_id: str
    user_key: str
    seq: int
    commit: str
    updated_at: datetime
    operation: str
    operation_version: str
    active: str | None
    versions: tuple[AdapterVersion, ...]
    candidates: tuple[AdapterVersion, ...] = ()
    reason: str = ""
    parent: str = ""
    previous: tuple[str, ...] = ()
    erased_seq: int = 0
    collected_seq: int = 0
    key: str | None = None

    @property
    def is_erased(self) -> bool:
        """Whether the entry names no user: the user was erased, or has published nothing yet."""
        return not self.user_id

    def find(self, version: str | None) -> AdapterVersion | None:
        """Return the live version of that id, or None."""
        return next((live for live in self.versions if live.version == version), None)

    @property
    def kept(self) -> tuple[AdapterVersion, ...]:
        """Everything whose files are kept: live versions and candidates."""
        return (*self.versions, *self.candidates)

    def keeps(self, version: str) -> bool:
        """Return whether the files of that id are kept."""
        return any(kept.version == version for kept in self.kept)


@dataclass(frozen=True)
class HistoryEntry:
    """One change of a user: what was done when and why, and what was active from then on.

    `metrics` are those of `version`, the one that it was done to; empty where it was done to none,
    or that one has none.
    """

    seq: int
    at: datetime
    operation: str
    version: str
    active: str | None
    reason: str
    metrics: dict[str, Any] = field(hash=False)


def base_differences(
    trained_on: Mapping[str, str], asked_for: Mapping[str, str]
) -> dict[str, tuple[str | None, str | None]]:
    """Return the parts of two base fingerprints that differ, sorted by name, with both values.

    A value is None where a fingerprint lacks the part.
    """
    differences = {}
    for part in sorted((set(trained_on) | set(asked_for)) - UNCOMPARED_PARTS):
        trained, asked = trained_on.get(part), asked_for.get(part)
        if trained != asked:
            differences[part] = (trained, asked)
    return differences
