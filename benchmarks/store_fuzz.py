"""Damaged and hostile input: entries, root files, weights, user ids and archives.

Only the store's own errors may come out, nothing outside the store may be touched, memory stays
bounded. `store_torture.py fuzz` runs it.
"""

import json
import os
import random
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from adapter_store import AdapterStore, AdapterStoreError, MemoryBackend, layout
from adapter_store.conformance import make_adapter

BASE = {"weights": "w"}


def fuzz(minutes: float, seed: int = 0) -> dict[str, Any]:
    """Damage what lies in a store, pass hostile arguments, and look what comes out."""
    before = _peak_megabytes()
    chance = random.Random(seed)
    counts: dict[str, int] = {}
    deadline = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        outside = snapshot(folder, "store")
        good = AdapterStore(folder / "store")
        for number in range(3):
            good.publish(
                "alice",
                make_adapter(number, 256),
                base=BASE,
                metrics={"dpo": {"nll": 1.5}},
                reason="why",
            )
        archive = good.export_user("alice", folder / "alice.tar").read_bytes()
        outside = snapshot(folder, "store")
        kinds = [fuzz_entry, fuzz_root, fuzz_weights, fuzz_user_id, fuzz_archive]
        while time.monotonic() < deadline:
            kind = chance.choice(kinds)
            try:
                kind(folder, chance, archive)
            except AdapterStoreError:
                outcome = f"{kind.__name__} refused"
            else:
                outcome = f"{kind.__name__} taken"
            counts[outcome] = counts.get(outcome, 0) + 1
        assert snapshot(folder, "store", "fuzzed.tar") == outside, (
            "something outside the store was touched"
        )
    megabytes = _peak_megabytes()
    assert megabytes - before < 500, f"{before:.0f} → {megabytes:.0f} MB"
    return {
        "seconds": 60 * minutes,
        "seed": seed,
        "cases": sum(counts.values()),
        "peak_mb": round(megabytes),
        **counts,
    }


def _peak_megabytes() -> float:
    """Return the most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def snapshot(folder: Path, *left_out: str) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] not in left_out
    }


NUMBERS = [True, -1, 0, 2**70, 1e308]
TEXTS = ["", "x", "../../../x", "/etc/passwd", "\0", "\ud800", "a" * 5000, "0" * 64]
TIMES = ["20260101T000000Z-000000000000", "2026-01-01T00:00:00+00:00"]
VALUES: list[Any] = [None, *NUMBERS, *TEXTS, *TIMES, [], {}, [[]], {"x": None}]
LETTERS = ["a", "/", "..", "\\", "\0", "\n", "é", "😀", "\ud800", "%2e", "~", " ", ".", "\u202e"]


def damaged_json(content: Any, chance: random.Random) -> bytes:
    """Return JSON with a value changed somewhere, or bytes changed, or cut."""
    holder, key = content, None
    while isinstance(holder, dict | list) and holder:
        key = chance.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if not isinstance(holder[key], dict | list) or not holder[key] or chance.random() < 0.3:
            break
        holder = holder[key]
    if key is not None and chance.random() < 0.8:
        if isinstance(holder, dict) and chance.random() < 0.2:
            del holder[key]
        else:
            holder[key] = chance.choice(VALUES)
    data = bytearray(json.dumps(content).encode("utf-8", "surrogatepass"))
    return damaged_bytes(bytes(data), chance) if chance.random() < 0.3 else bytes(data)


def damaged_bytes(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        if not changed:
            break
        position = chance.randrange(len(changed))
        match chance.randrange(4):
            case 0:
                changed[position] ^= 1 << chance.randrange(8)
            case 1:
                del changed[position : position + chance.randrange(1, 600)]
            case 2:
                changed[position:position] = os.urandom(chance.randrange(1, 16))
            case _:
                changed[position : position + 8] = (2 ** chance.randrange(64)).to_bytes(8, "little")
    return bytes(changed)


def fuzz_entry(folder: Path, chance: random.Random, _: bytes) -> None:
    log = next((folder / "store").rglob("log"))
    path = sorted(log.iterdir())[-1]
    content = path.read_bytes()
    path.write_bytes(damaged_json(json.loads(content), chance))
    try:
        store = AdapterStore(folder / "store")
        for version in store.versions("alice"):
            store.fetch(version)
        store.verify()
        store.list_users()
        store.history("alice")
    finally:
        path.write_bytes(content)


def fuzz_root(folder: Path, chance: random.Random, _: bytes) -> None:
    path = folder / "store" / layout.ROOT_FILE
    content = path.read_bytes()
    path.write_bytes(damaged_json(json.loads(content), chance))
    try:
        AdapterStore(folder / "store").versions("alice")
    finally:
        path.write_bytes(content)


def fuzz_weights(folder: Path, chance: random.Random, _: bytes) -> None:
    files = make_adapter(chance.randrange(100), chance.randrange(1, 500))
    if chance.random() < 0.5:
        files[layout.WEIGHTS] = damaged_bytes(files[layout.WEIGHTS], chance)
    else:
        size = int.from_bytes(files[layout.WEIGHTS][:8], "little")
        header = damaged_json(json.loads(files[layout.WEIGHTS][8 : 8 + size]), chance)
        files[layout.WEIGHTS] = (
            len(header).to_bytes(8, "little") + header + files[layout.WEIGHTS][8 + size :]
        )
    if chance.random() < 0.2:
        files[layout.CONFIG] = damaged_bytes(files[layout.CONFIG], chance)
    store = AdapterStore(MemoryBackend())
    assert store.fetch(store.publish("alice", files, base=BASE)) == files


def fuzz_user_id(folder: Path, chance: random.Random, _: bytes) -> None:
    alphabet = [*LETTERS, "CON", "a" * 300]
    user_id = "".join(chance.choices(alphabet, k=chance.randrange(0, 8)))
    store = AdapterStore(folder / "store")
    version = store.publish(user_id, make_adapter(1, 64), base=BASE)
    assert store.resolve(user_id) == version
    assert [head.user_id for head in store.list_users()[0]].count(user_id) == 1
    store.erase_user(user_id)
    shutil.rmtree(folder / "store" / layout.user_folder(version.user_key))


def fuzz_archive(folder: Path, chance: random.Random, archive: bytes) -> None:
    path = folder / "fuzzed.tar"
    path.write_bytes(damaged_bytes(archive, chance))
    store = AdapterStore(MemoryBackend())
    for version in store.import_user(path).versions:
        store.fetch(version)
