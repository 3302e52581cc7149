"""What lies where in a store, the same on every backend.

Keys are relative, with slashes, and safe as paths:

    adapter_store.json                              root file: format, store id, pepper or its check
    users/<aa>/<bb>/<user key>/log/<seq>.json       the truth: each entry holds a user's whole head
    users/<aa>/<bb>/<user key>/versions/<version>/  adapter_model.safetensors, adapter_config.json
    keys/<aa>/<bb>/<user key>/<key>/<n>.json        encryption keys, wrapped; the highest <n> counts
    probes/                                         small files that a writer puts and removes
    staging/                                        a local store's unfinished files; never read

<aa><bb> are the first four hex digits of the user key, so that no folder grows large. The entry
with the highest <seq> is the user's head; sequence numbers only grow. A version's files never
change. Files that no entry names do not count: they belong to a publish that is running, or to one
that was killed; `AdapterStore.gc` removes those. Old entries and keys are removed in ascending
order of their numbers, so that a reader who sees one gone knows that the ones before are gone too.
Readers ignore JSON names that they do not know; whatever an older *writer* must not drop or
misread comes with a higher format number, in the root file or in the entry. A backup that leaves
out keys/ loses what is erased, as the store does.
"""

import os
import re
from datetime import datetime
from typing import Final

FORMAT: Final = 2
ROOT_FILE: Final = "adapter_store.json"
USERS: Final = "users"
KEYS: Final = "keys"
PROBES: Final = "probes"
PROBE: Final = "probe"
STAGING: Final = "staging"
WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
ADAPTER_FILES: Final = (WEIGHTS, CONFIG)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{12}")
_KEY_ID = re.compile(r"[0-9a-f]{16}")
_SHARD = re.compile(r"[0-9a-f]{2}")
_PROBE = re.compile(r"[0-9a-f]{32}")
_NUMBERED = re.compile(r"([0-9]{12})\.json")


def is_sha256(text: str) -> bool:
    """Return whether `text` is 64 lower-case hex digits, as user keys and digests are."""
    return _SHA256.fullmatch(text) is not None


def is_version(text: str) -> bool:
    """Return whether `text` has the form of a version id, such as 20260131T235959Z-0123456789ab."""
    return _VERSION.fullmatch(text) is not None


def is_shard(text: str) -> bool:
    """Return whether `text` is two lower-case hex digits, as the folders above users' are."""
    return _SHARD.fullmatch(text) is not None


def new_probe() -> str:
    """Return the key of a new file that a writer puts and removes, in a folder of its own."""
    return f"{PROBES}/{os.urandom(16).hex()}/{PROBE}"


def is_probe(text: str) -> bool:
    """Return whether `text` has the form of the name of such a folder."""
    return _PROBE.fullmatch(text) is not None


def new_version(time: datetime) -> str:
    """Return a new version id: the time, for people, and 48 random bits.

    The order of versions comes from the log, not from ids.
    """
    return f"{time:%Y%m%dT%H%M%SZ}-{os.urandom(6).hex()}"


def other_version(version: str) -> str:
    """Return a new version id with the time of another one."""
    return f"{version.partition('-')[0]}-{os.urandom(6).hex()}"


def user_folder(user_key: str) -> str:
    """Return the folder of everything that belongs to one user."""
    return f"{USERS}/{user_key[:2]}/{user_key[2:4]}/{user_key}"


def keys_folder(user_key: str) -> str:
    """Return the folder of a user's encryption keys."""
    return f"{KEYS}/{user_key[:2]}/{user_key[2:4]}/{user_key}"


def is_key_id(text: str) -> bool:
    """Return whether `text` has the form of an encryption key's id: 16 lower-case hex digits."""
    return _KEY_ID.fullmatch(text) is not None


def log_folder(user_key: str) -> str:
    """Return the folder of a user's log entries."""
    return f"{user_folder(user_key)}/log"


def entry_key(user_key: str, seq: int) -> str:
    """Return the key of a user's log entry number `seq`."""
    return f"{log_folder(user_key)}/{numbered(seq)}"


def numbered(number: int) -> str:
    """Return the file name of number `number` of a series."""
    return f"{number:012d}.json"


def number_of(name: str) -> int | None:
    """Return the number of such a file name, None for any other name."""
    match = _NUMBERED.fullmatch(name)
    return int(match[1]) if match else None


def numbers_of(names: list[str]) -> list[int]:
    """Return the numbers of such file names in the order given; other names are left out."""
    numbers = (number_of(name) for name in names)
    return [number for number in numbers if number is not None]


def versions_folder(user_key: str) -> str:
    """Return the folder of all versions of a user."""
    return f"{user_folder(user_key)}/versions"


def version_folder(user_key: str, version: str) -> str:
    """Return the folder of one version's files."""
    return f"{versions_folder(user_key)}/{version}"
