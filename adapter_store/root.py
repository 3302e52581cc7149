"""The root file: the store's format, and its pepper, from which user keys are made.

The pepper keeps user keys from being guessed from user ids. Without one given, a store makes its own at random and
keeps it in the root file (mode 0600 in a local store); a given one is never written. Either way the check value there
tells another pepper from the right one, because the wrong one would silently find nobody.
"""

import contextlib
import hashlib
import hmac
import os
from typing import TYPE_CHECKING, Any

from adapter_store.entry import check_format
from adapter_store.errors import FormatVersionError, IntegrityError, KeyMismatchError
from adapter_store.layout import FORMAT, ROOT_FILE, USERS
from adapter_store.text import location, parse_json_object, to_json

if TYPE_CHECKING:
    from adapter_store.backend import Backend

_MAX_ROOT_BYTES = 64 * 1024
# No user key is ever equal to it: user ids hold no NUL.
_CHECKED_TEXT = "\0adapter_store check value"


def keyed_hash(pepper: bytes, text: str) -> str:
    """Return HMAC-SHA256(pepper, text as UTF-8) in hex: the user key, where `text` is a user id."""
    return hmac.new(pepper, text.encode(), hashlib.sha256).hexdigest()


def open_root(backend: "Backend", given: bytes | None) -> bytes | None:
    """Return the pepper of the store, None where there is no store yet.

    KeyMismatchError where `given` is not its pepper, IntegrityError where the root file is damaged or lost,
    FormatVersionError where it is newer.
    """
    data = _read(backend)
    if data is None and backend.list_folder(USERS):
        # Users come after the root file, so it is there by now, or somebody removed it.
        data = _read(backend)
        if data is None:
            raise IntegrityError(
                f"{location(backend.url, ROOT_FILE)} is missing, but the store has users: "
                "without it nobody can be found; restore it from a backup"
            )
    return None if data is None else _pepper(data, given, location(backend.url, ROOT_FILE))


def make_root(backend: "Backend", given: bytes | None) -> bytes:
    """Return the pepper of the store, which is made where there is none. Raises what `open_root` raises."""
    pepper = open_root(backend, given)
    while pepper is None:
        made = given or os.urandom(32)
        content = {
            "format": FORMAT,
            "check": keyed_hash(made, _CHECKED_TEXT),
            "pepper": None if given else made.hex(),
        }
        # Where another first publisher was faster, its pepper counts.
        with contextlib.suppress(FileExistsError):
            backend.put_if_absent(ROOT_FILE, to_json(content))
        pepper = open_root(backend, given)
    return pepper


def _read(backend: "Backend") -> bytes | None:
    try:
        return backend.get(ROOT_FILE, _MAX_ROOT_BYTES)
    except FileNotFoundError:
        return None


def _pepper(data: bytes, given: bytes | None, where: str) -> bytes:
    try:
        content = parse_json_object(data)
        check_format(content)
        check, stored = _texts(content)
    except FormatVersionError as error:
        raise FormatVersionError(f"cannot open {where}: {error}; upgrade the package that opens it") from None
    except ValueError as error:
        raise IntegrityError(f"{where} is no root file of a store: {error}; restore it from a backup") from None
    if given is None and stored is None:
        raise KeyMismatchError(f"{where} was made with a pepper of its owner: pass that one as pepper=")
    if given is not None and not hmac.compare_digest(keyed_hash(given, _CHECKED_TEXT), check):
        raise KeyMismatchError(
            f"{where} was made with another pepper than the one given: pass the one it was made with"
            + (", or none, since it keeps its own" if stored else "")
        )
    if stored is not None and keyed_hash(stored, _CHECKED_TEXT) != check:
        raise IntegrityError(f"{where} is damaged: its pepper and its check value differ; restore it from a backup")
    return given or stored or b""


def _texts(content: dict[str, Any]) -> tuple[str, bytes | None]:
    check, pepper = content.get("check"), content.get("pepper")
    if not isinstance(check, str) or not check.isascii():
        raise ValueError("it has no check value")
    if pepper is not None and not isinstance(pepper, str):
        raise ValueError("its pepper is not text")
    return check, None if pepper is None else bytes.fromhex(pepper)
