"""Rotation: keys are wrapped with the newest master key, whatever else happens meanwhile."""

import shutil
from datetime import timedelta

import pytest
from hooked_backend import HookedMemory, once

from adapter_store import (
    AdapterStore,
    EnvironmentKeys,
    FileKeys,
    IntegrityError,
    KeyMismatchError,
    MemoryBackend,
)
from adapter_store.conformance import all_keys
from adapter_store.keys import new_key
from adapter_store.layout import version_folder
from adapter_store.vault import key_of

BASE = {"weights": "a fingerprint"}


@pytest.fixture
def store(root, keys):
    return AdapterStore(root, keys=keys)


def contents(root):
    return b"".join(path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file())


def keep_only_newest(path):
    path.write_text(path.read_text().splitlines()[0] + "\n")


def test_after_a_rotation_the_old_master_key_is_not_needed(store, root, keys, files, tmp_path):
    for user in ("alice", "bob"):
        store.publish(user, files(1), base=BASE)
    # It learns the new key from the file, when it meets it.
    warm = AdapterStore(root, keys=FileKeys(tmp_path / "keys"))
    assert store.rotate_keys() == 0
    keys.add("key-2")
    users = []
    assert store.rotate_keys(on_user=users.append) == 3  # two users' keys and the pepper
    assert users == [1, 2]
    assert store.rotate_keys() == 0
    assert warm.fetch(warm.resolve("bob")) == files(1)
    keep_only_newest(tmp_path / "keys")
    assert (tmp_path / "keys").read_text().startswith("key-2 ")
    alone = AdapterStore(root, keys=FileKeys(tmp_path / "keys"))
    assert alone.fetch(alone.resolve("alice")) == files(1)
    assert b'"master": "key-1"' not in contents(root)


@pytest.mark.parametrize("call", ["rotate", "gc"])
def test_a_damaged_key_that_something_is_sealed_with_stays(files, keys, call):
    backend = MemoryBackend()
    store = AdapterStore(backend, keys=keys)
    store.publish("alice", files(1), base=BASE)
    store.erase_user("alice")
    slow = HookedMemory(backend, once(lambda: store.publish("alice", files(2), base=BASE)))
    second = AdapterStore(slow, keys=keys).publish("alice", files(3), base=BASE)
    folder = version_folder(second.user_key, second.version)
    weights = backend.get(f"{folder}/adapter_model.safetensors", 100)
    key = key_of(weights + bytes(100))
    record = next(path for path in all_keys(backend, "keys") if key in path)
    content = backend.get(record, 10**6)
    backend.delete(record)
    backend.put_if_absent(record, content[:-5])
    keys.add("key-2")
    fresh = AdapterStore(backend, keys=keys)
    if call == "rotate":
        with pytest.raises(IntegrityError, match="1 could not be read and stay as they are"):
            fresh.rotate_keys()
    else:
        fresh.gc(grace=timedelta(0))
    assert backend.stat(record) is not None
    fresh.erase_user("alice")
    assert backend.stat(record) is None


def test_of_two_rotations_at_once_each_counts_only_its_own(files, monkeypatch):
    one, two, three = (f"{name}:{new_key()}" for name in ("one", "two", "three"))

    def holding(*pairs):
        monkeypatch.setenv("COPE_STORE_KEYS", ",".join(pairs))
        return EnvironmentKeys()

    backend, counts = MemoryBackend(), []
    AdapterStore(backend, keys=holding(one)).publish("alice", files(1), base=BASE)
    faster = AdapterStore(backend, keys=holding(two, one))
    slow = HookedMemory(backend, once(lambda: counts.append(faster.rotate_keys()), "keys/"))
    assert AdapterStore(slow, keys=holding(three, two, one)).rotate_keys() == 2
    assert counts == [2]
    alone = AdapterStore(backend, keys=holding(three))
    assert alone.fetch(alone.resolve("alice")) == files(1)


def test_the_key_of_a_running_first_publish_is_wrapped_too(keys, files, tmp_path):
    """It has made its key, and nothing that lies under users/ yet."""
    backend, counts = MemoryBackend(), []
    AdapterStore(backend, keys=keys).publish("bob", files(2), base=BASE)

    def rotate():
        keys.add("key-2")
        counts.append(AdapterStore(backend, keys=keys).rotate_keys())

    slow = HookedMemory(backend, once(rotate, "/versions/"))
    AdapterStore(slow, keys=keys).publish("alice", files(1), base=BASE)
    assert counts == [3]
    keep_only_newest(tmp_path / "keys")
    alone = AdapterStore(backend, keys=FileKeys(tmp_path / "keys"))
    assert alone.fetch(alone.resolve("alice")) == files(1)


def test_a_key_wrapped_during_an_erasure_does_not_come_back(store, root, keys, files):
    """The rotation has read the key, the erasure removes it, the rotation writes it."""
    version = store.publish("alice", files(1), base=BASE)
    keys.add("key-2")
    record = next((root / "keys").rglob(f"{version.user_key}/*/*.json"))
    wrapped = record.read_bytes()
    store.erase_user("alice")
    assert not record.exists()
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_bytes(wrapped)
    assert store.rotate_keys() == 2
    assert not list((root / "keys").rglob(f"{version.user_key}/*/*"))


def test_a_key_that_does_not_unwrap_is_reported_and_stops_no_other(store, root, keys, files):
    versions = [store.publish(user, files(1), base=BASE) for user in ("alice", "bob", "carol")]
    damaged, moved, _ = sorted(version.user_key for version in versions)
    record = next((root / "keys").rglob(f"{damaged}/*/*.json"))
    content = record.read_bytes()
    record.write_bytes(b"not a key")
    other = next((root / "keys").rglob(f"{moved}/*/*.json"))
    other_content = other.read_bytes()
    other.write_bytes(content)
    keys.add("key-2")
    users = []
    said = r"2 keys were wrapped anew, 2 could not be read"
    with pytest.raises(IntegrityError, match=said) as caught:
        store.rotate_keys(on_user=users.append)
    assert str(record) in str(caught.value)
    assert users == [1, 2, 3]
    record.write_bytes(content)
    said = r"1 keys were wrapped anew, 1 could not be read"
    with pytest.raises(KeyMismatchError, match=said) as caught:
        store.rotate_keys()
    assert str(other.parent) in str(caught.value)
    other.write_bytes(other_content)
    assert store.rotate_keys() == 1
    assert b'"master": "key-1"' not in contents(root)


def test_what_a_killed_maker_of_the_store_left_is_ignored(store, root, keys, files):
    """The first put its pepper and was killed before the root file: its store's id is lost."""
    AdapterStore(root.with_name("killed"), keys=keys).prepare("alice")
    shutil.copytree(root.with_name("killed") / "keys" / "st", root / "keys" / "st")
    version = store.publish("alice", files(1), base=BASE)
    keys.add("key-2")
    assert store.rotate_keys() == 2
    assert store.rotate_keys() == 0
    assert store.fetch(version) == files(1)


def test_a_plain_store_has_nothing_to_rotate(root, files):
    store = AdapterStore(root)
    assert store.rotate_keys() == 0  # no store exists yet
    store.publish("alice", files(1), base=BASE)
    with pytest.raises(KeyMismatchError, match="no keys to rotate"):
        store.rotate_keys()
