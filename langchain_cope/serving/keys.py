"""API keys: 256 random bits each, of which the key file holds a SHA-256.

A key reads `cope_ID_SECRETCHECK`: ID finds its record, SECRET proves it, CHECK (a CRC-32) tells a
mistyped key before anything is looked up. So many random bits need no slow hash. The file is
readable by its owner alone, and looked at again when it changes.
"""

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import threading
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from langchain_cope.atomic_files import write_json
from langchain_cope.errors import InputError
from langchain_cope.serving.principals import NO_LIMITS, SCOPES, Limits, Principal, Scope, Users

FORMAT = 1
CHECK_SECONDS = 0.5  # between two looks at the key file: a revoked key is refused within a second
_KEY = re.compile(r"cope_([0-9a-f]{12})_([A-Za-z0-9_-]{43})([0-9a-f]{8})")


@dataclass(frozen=True)
class Key:
    """A key's record, without its secret."""

    id: str
    sha256: str
    """Hexadecimal, of the secret."""
    name: str
    """What it is for, in the operator's words."""
    scopes: tuple[Scope, ...]
    users: Users
    created: str
    """ISO 8601, UTC."""
    expires: str | None = None
    revoked: str | None = None
    trusted_header: bool = False
    limits: Limits = NO_LIMITS

    def is_valid(self, now: datetime) -> bool:
        """Tell whether it is neither revoked nor expired."""
        return self.revoked is None and (
            self.expires is None or now < datetime.fromisoformat(self.expires)
        )

    @property
    def principal(self) -> Principal:
        """Whom it stands for."""
        return Principal(
            self.id, frozenset(self.scopes), self.users, self.trusted_header, self.limits
        )


def new_key(
    name: str,
    scopes: frozenset[Scope],
    users: Users,
    *,
    expires: datetime | None = None,
    trusted_header: bool = False,
    limits: Limits = NO_LIMITS,
) -> tuple[str, Key]:
    """Return (the key itself, which is kept nowhere, its record)."""
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    text = f"cope_{key_id}_{secret}"
    key = Key(
        id=key_id,
        sha256=_digest(secret),
        name=name,
        scopes=tuple(scope for scope in SCOPES if scope in scopes),
        users=users,
        created=_iso(datetime.now(UTC)),
        expires=None if expires is None else _iso(expires),
        trusted_header=trusted_header,
        limits=limits,
    )
    return text + _check(text), key


class KeyFile:
    """The keys that a file holds. Any thread may ask."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises InputError where it is missing, readable by others, or no such."""
        self._path = path
        self._lock = threading.Lock()
        self._checked = 0.0
        self._stamp: tuple[int, ...] = ()
        self._keys: Mapping[str, Key] = {}
        self._days: dict[str, str] = {}
        self._unwritten: dict[str, str] = {}
        self._is_writing = False
        self._reload()

    def principal_of(self, text: str) -> Principal | None:
        """Return whom a key stands for; None for what is no key, revoked or expired."""
        self._look_again()
        match = _KEY.fullmatch(text)
        if match is None or _check(text[:-8]) != match[3]:
            return None
        key = self._keys.get(match[1])
        digest = _digest(match[2])
        if key is None or not hmac.compare_digest(digest, key.sha256):
            return None
        if not key.is_valid(datetime.now(UTC)):
            return None
        self._note_use(key.id)
        return key.principal

    def _look_again(self) -> None:
        """Read the file anew where it changed; where it cannot be read, no key is good."""
        now = time.monotonic()
        with self._lock:
            if now - self._checked < CHECK_SECONDS:
                return
            self._checked = now
            try:
                if _stamp(self._path) != self._stamp:
                    self._reload()
            except InputError:
                self._keys, self._stamp = {}, ()

    def _reload(self) -> None:
        stamp = _stamp(self._path)
        self._keys = {key.id: key for key in read_keys(self._path)}
        self._stamp = stamp

    def _note_use(self, key_id: str) -> None:
        """Note, to the day, that a key was used; a thread writes it to a file beside.

        The lock may be another process's, and a disk slow: who asks does not wait for them.
        """
        today = date.today().isoformat()
        if self._days.get(key_id) == today:
            return
        with self._lock:
            self._days[key_id] = self._unwritten[key_id] = today
            if self._is_writing:
                return
            self._is_writing = True
        threading.Thread(target=self._write_uses, name="cope-keys", daemon=True).start()

    def _write_uses(self) -> None:
        """Write what was noted until nothing is left; where it cannot be written it is dropped."""
        while True:
            with self._lock:
                days, self._unwritten = self._unwritten, {}
                if not days:
                    self._is_writing = False
                    return
            with contextlib.suppress(OSError), FileLock(_lock_path(self._path)):
                write_json(_uses_path(self._path), {**last_uses(self._path), **days})


def read_keys(path: Path) -> list[Key]:
    """Return the keys in a file, oldest first.

    Raises:
        InputError: there is no such file, others may read it, or it holds something else.
    """
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"the key file {path} cannot be read ({error.strerror}): "
            f"make it with `cope-lc keys new --keys {path}`"
        ) from error
    if stat.S_IMODE(mode) & 0o077:
        raise InputError(
            f"the key file {path} may be read by others (mode {stat.S_IMODE(mode):04o}): "
            f"chmod 600 {path}"
        )
    try:
        value = json.loads(text)
        if value["format"] != FORMAT:
            raise ValueError(f"it has the format {value['format']!r}")
        return [_from_json(entry) for entry in value["keys"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is no key file of this release ({type(error).__name__}: {error}): "
            "`cope-lc keys new` makes one"
        ) from error


def add_key(path: Path, key: Key) -> None:
    """Add a key to a file, which is made where there is none. Raises InputError as `read_keys`."""
    with FileLock(_lock_path(path)):
        _write(path, [*(read_keys(path) if path.exists() else []), key])


def revoke_key(path: Path, key_id: str) -> Key:
    """Revoke a key and return it. Raises InputError where the file has none of that id."""
    with FileLock(_lock_path(path)):
        keys = read_keys(path)
        if key_id not in {key.id for key in keys}:
            raise InputError(f"{path} has no key {key_id!r:.40}: `cope-lc keys list` shows them")
        now = _iso(datetime.now(UTC))
        keys = [
            replace(key, revoked=key.revoked or now) if key.id == key_id else key for key in keys
        ]
        _write(path, keys)
    return next(key for key in keys if key.id == key_id)


def last_uses(path: Path) -> dict[str, str]:
    """Return the day of each key's last use, as far as it was noted."""
    try:
        days = json.loads(_uses_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return days if isinstance(days, dict) else {}


def _write(path: Path, keys: list[Key]) -> None:
    mask = os.umask(0o077)
    try:
        write_json(path, {"format": FORMAT, "keys": [_to_json(key) for key in keys]})
    finally:
        os.umask(mask)


def _to_json(key: Key) -> dict[str, Any]:
    users: Any = list(key.users.listed)
    if key.users.prefix is not None:
        users = {"prefix": key.users.prefix}
    written = {**vars(key), "scopes": list(key.scopes), "users": users, "limits": vars(key.limits)}
    return {name: value for name, value in written.items() if value is not None}


def _from_json(entry: dict[str, Any]) -> Key:
    users = entry["users"]
    listed = Users(tuple(users)) if isinstance(users, list) else Users(prefix=users["prefix"])
    unknown = set(entry["scopes"]) - set(SCOPES)
    if unknown:
        raise ValueError(f"unknown scope {min(unknown)!r}")
    return Key(
        **{
            **entry,
            "scopes": tuple(entry["scopes"]),
            "users": listed,
            "limits": Limits(**entry["limits"]),
        }
    )


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _check(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def _stamp(path: Path) -> tuple[int, ...]:
    """Return what changes with a file; nothing where it cannot be looked at."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode)


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _uses_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.used")
