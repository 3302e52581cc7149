"""Log entries: a user's head to JSON and back.

What comes back is checked field by field: the storage is not trusted.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Any, Final, TypeVar

from adapter_store.errors import FormatVersionError
from adapter_store.facts import AdapterVersion, FileFacts, UserHead
from adapter_store.layout import FORMAT
from adapter_store.text import parse_json_object, shorten, to_json

# No real entry comes near it (20 versions with small metrics make 10 kB); a damaged or hostile one
# is read no further.
MAX_ENTRY_BYTES = 32 * 1024**2

_T = TypeVar("_T")

# How an entry of an older format becomes one of the next; applied when it is read, written with the
# next change.
UPGRADES: Final[dict[int, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    1: lambda entry: {**entry, "format": 2},  # names added since then have defaults
}


def encode(head: UserHead) -> bytes:
    """Return the log entry of `head`."""
    return to_json(
        {
            "format": FORMAT,
            "user_id": head.user_id,
            "user_key": head.user_key,
            "seq": head.seq,
            "commit": head.commit,
            "updated_at": head.updated_at.isoformat(),
            "operation": head.operation,
            "operation_version": head.operation_version,
            "active": head.active,
            "versions": [version_to_json(version) for version in head.versions],
            "candidates": [version_to_json(version) for version in head.candidates],
            "reason": head.reason,
            "parent": head.parent,
            "previous": list(head.previous),
            "erased_seq": head.erased_seq,
            "collected_seq": head.collected_seq,
        }
    )


def version_to_json(version: AdapterVersion) -> dict[str, Any]:
    """Return what JSON keeps of a version: all but the user's id and key."""
    return {
        "version": version.version,
        "created_at": version.created_at.isoformat(),
        "files": {
            name: {"sha256": file.sha256, "size": file.size} for name, file in version.files.items()
        },
        "base": version.base,
        "metrics": version.metrics,
        "alpha": version.alpha,
        "tau": version.tau,
        "metadata": version.metadata,
        "idempotency_key": version.idempotency_key,
    }


def parse(data: bytes) -> dict[str, Any]:
    """Return an entry's JSON, its format checked.

    ValueError says what is wrong, FormatVersionError that the format is a newer one.
    """
    if len(data) > MAX_ENTRY_BYTES:
        raise ValueError(f"it is larger than {MAX_ENTRY_BYTES} bytes")
    entry = parse_json_object(data)
    check_format(entry)
    return entry


def decode(entry: dict[str, Any], key: str | None = None) -> UserHead:
    """Return the head that a parsed log entry holds, of any format up to ours.

    `key` is the encryption key that it was sealed with. ValueError says what is wrong.
    """
    while entry["format"] < FORMAT:
        entry = UPGRADES[entry["format"]](entry)
    user_id, user_key = _take(entry, "user_id", str), _take(entry, "user_key", str)
    rows = _take(entry, "versions", list)
    candidates = _take_or(entry, "candidates", list, [])
    previous = _take_or(entry, "previous", list, [])
    if not all(isinstance(version, str) for version in previous):
        raise ValueError("its previous versions are not text")
    head = UserHead(
        user_id=user_id,
        user_key=user_key,
        seq=_take(entry, "seq", int),
        commit=_take(entry, "commit", str),
        updated_at=_take_time(entry, "updated_at"),
        operation=_take(entry, "operation", str),
        operation_version=_take(entry, "operation_version", str),
        active=_take_or_none(entry, "active", str),
        versions=tuple(version_from_json(user_id, user_key, row) for row in rows),
        candidates=tuple(version_from_json(user_id, user_key, row) for row in candidates),
        reason=_take_or(entry, "reason", str, ""),
        parent=_take_or(entry, "parent", str, ""),
        previous=tuple(previous),
        erased_seq=_take_or(entry, "erased_seq", int, 0),
        collected_seq=_take_or(entry, "collected_seq", int, 0),
        key=key,
    )
    if head.is_erased and head.kept:
        raise ValueError("it lists versions of no user")
    if len({version.version for version in head.kept}) != len(head.kept):
        raise ValueError("it lists a version twice")
    if head.active is not None and head.find(head.active) is None:
        raise ValueError(f"its active version {shorten(head.active)} is not among its versions")
    return head


def check_format(content: dict[str, Any]) -> None:
    """Check the `format` of a root file, an entry or a manifest.

    FormatVersionError where it is a later one than ours, ValueError where it cannot be one.
    """
    number = _take(content, "format", int)
    if number > FORMAT:
        raise FormatVersionError(f"it has format {number}, this release reads up to {FORMAT}")
    if number < 1:
        raise ValueError(f"its format is {number}, expected at least 1")


def version_from_json(user_id: str, user_key: str, row: Any) -> AdapterVersion:
    """Return the version that `version_to_json` wrote. ValueError says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"a version is {shorten(row)}, expected an object")
    base = _take(row, "base", dict)
    if not all(isinstance(value, str) for value in base.values()):
        raise ValueError("a version's base does not map text to text")
    return AdapterVersion(
        user_id=user_id,
        user_key=user_key,
        version=_take(row, "version", str),
        created_at=_take_time(row, "created_at"),
        files={name: _file_from_json(file) for name, file in _take(row, "files", dict).items()},
        base=base,
        metrics=_take(row, "metrics", dict),
        alpha=_take_or_none(row, "alpha", float),
        tau=_take_or_none(row, "tau", float),
        metadata=_take(row, "metadata", dict),
        idempotency_key=_take_or_none(row, "idempotency_key", str),
    )


def _file_from_json(row: Any) -> FileFacts:
    if not isinstance(row, dict):
        raise ValueError(f"a file is {shorten(row)}, expected an object")
    return FileFacts(sha256=_take(row, "sha256", str), size=_take(row, "size", int))


def _take(row: dict[str, Any], name: str, kind: type[_T]) -> _T:
    value = row.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"its {name} is {shorten(value)}, expected {kind.__name__}")
    return value


def _take_or_none(row: dict[str, Any], name: str, kind: type[_T]) -> _T | None:
    return None if row.get(name) is None else _take(row, name, kind)


def _take_or(row: dict[str, Any], name: str, kind: type[_T], default: _T) -> _T:
    return default if row.get(name) is None else _take(row, name, kind)


def _take_time(row: dict[str, Any], name: str) -> datetime:
    time = datetime.fromisoformat(_take(row, name, str))
    if time.tzinfo is None:
        raise ValueError(f"its {name} has no time zone")
    return time
