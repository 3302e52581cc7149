"""The store's values: what a version is, what a user's head is, how large things may be."""

import hashlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from enum import Enum
from typing import Any, Final, NamedTuple

from adapter_store import layout
from adapter_store.text import shorten

# Recorded for people, and no reason to refuse: the same base may be loaded under another name or quantized.
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
                    f"Limits.{limit.name} is {shorten(value)}, expected a whole number of at least 1"
                )

    def bytes_of(self, name: str) -> int:
        """Return how many bytes the adapter file `name` may have."""
        return self.weights_bytes if name == layout.WEIGHTS else self.config_bytes


class StoredFile(NamedTuple):
    """What the storage knows of a file: bytes, seconds since 1970 by the storage's clock, and a mark of this writing.

    The same key written anew has another `mark`.
    """

    size: int
    modified: float
    mark: Hashable


@dataclass(frozen=True)
class FileFacts:
    """What is known of a stored file: the hex sha256 of its content and its size in bytes."""

    sha256: str
    size: int

    def __post_init__(self) -> None:
        if not layout.is_sha256(self.sha256):
            raise ValueError(f"sha256 is {shorten(self.sha256)}, expected 64 hex digits")
        if self.size < 0:
            raise ValueError(f"size is {self.size}, expected at least 0")

    @classmethod
    def of(cls, data: bytes) -> "FileFacts":
        """Return the facts of a file with that content."""
        return cls(hashlib.sha256(data).hexdigest(), len(data))


@dataclass(frozen=True)
class AdapterVersion:
    """One published, immutable version of a user's adapter: its facts, not its bytes (`AdapterStore.fetch` brings them).

    `base` is the fingerprint of the base model it was trained on, part by part; `alpha` and `tau` are what it
    recommends for decoding, None where it recommends nothing. ValueError where a part could not be a stored one.
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
        # Names become paths: nothing but our own forms may pass, whoever built this object.
        if not layout.is_sha256(self.user_key):
            raise ValueError(f"user key is {shorten(self.user_key)}, expected 64 hex digits")
        if not layout.is_version(self.version):
            raise ValueError(
                f"version is {shorten(self.version)}, expected the form 20260131T235959Z-0123456789ab"
            )
        if set(self.files) != set(layout.ADAPTER_FILES):
            raise ValueError(
                f"files are {shorten(sorted(self.files))}, expected {' and '.join(layout.ADAPTER_FILES)}"
            )

    @property
    def name(self) -> str:
        """`user_key@version`: what caches and engines name, because the user alone changes its meaning."""
        return f"{self.user_key}@{self.version}"

    @property
    def digest(self) -> str:
        """Hex sha256 over the files' names and sha256s, in the order of the names."""
        lines = "".join(f"{name} {self.files[name].sha256}\n" for name in sorted(self.files))
        return hashlib.sha256(lines.encode()).hexdigest()


@dataclass(frozen=True)
class UserHead:
    """A user as the newest log entry has it: live versions (oldest first), the active one, and the last change.

    `seq` counts the user's entries from 1; `commit` names the call that wrote this one and `parent` the one before;
    `operation` is "publish", "activate", "rollback", "delete", "import", "erase" or "collect", done to
    `operation_version` (or to none, "") at `updated_at` for `reason`. `previous` are the versions that were active
    before, the latest last: the way back of a rollback. What began before entry `erased_seq` or `collected_seq` may not
    be committed any more. `key` names the encryption key of the entry, None where there is none. Of an erased user
    nothing but the numbers is left.
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


@dataclass(frozen=True)
class HistoryEntry:
    """One change of a user, as its log entry tells it: what was done when and why, and what was active from then on.

    `metrics` are those of `version`, the one that it was done to; empty where there is none, or none were given.
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
    """Return the parts of two base fingerprints that differ, sorted by name, with both values (None where absent)."""
    parts = sorted((set(trained_on) | set(asked_for)) - UNCOMPARED_PARTS)
    pairs = {part: (trained_on.get(part), asked_for.get(part)) for part in parts}
    return {part: pair for part, pair in pairs.items() if pair[0] != pair[1]}
