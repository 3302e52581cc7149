"""The local cache: it saves the way to the storage, and nothing else changes."""

import os
import random
import subprocess
import sys
import time

import pytest

from adapter_store import (
    AdapterCache,
    AdapterNotFoundError,
    AdapterStore,
    BackendError,
    IntegrityError,
    LocalBackend,
    MemoryBackend,
)
from adapter_store.conformance import all_keys, at_once
from adapter_store.layout import ADAPTER_FILES

BASE = {"weights": "w"}


class Counting(LocalBackend):
    """Counts what is read of adapters."""

    reads = 0

    def get(self, key, max_bytes):
        if "/versions/" in key:
            self.reads += 1
        return super().get(key, max_bytes)


def copies(folder):
    """Return the versions that a cache has."""
    return {path.parent.name for path in folder.rglob("adapter_model.safetensors")}


@pytest.fixture
def backend(tmp_path):
    return Counting(tmp_path / "store")


@pytest.fixture
def store(backend, tmp_path):
    return AdapterStore(backend, cache=tmp_path / "cache")


def test_a_version_is_read_from_the_storage_once_by_all_processes(store, backend, tmp_path, files):
    version = store.publish("alice", files(1), base=BASE)
    for reader in (store, store, AdapterStore(backend, cache=AdapterCache(tmp_path / "cache"))):
        assert reader.fetch(version) == files(1)
    assert backend.reads == 2


def test_many_that_fetch_at_once_read_once(backend, tmp_path, files):
    AdapterStore(backend).publish("alice", files(1), base=BASE)
    stores = [AdapterStore(backend, cache=tmp_path / "cache") for _ in range(8)]
    fetched = at_once(8, lambda number: stores[number].fetch(stores[number].resolve("alice")))
    assert fetched == [files(1)] * 8
    assert backend.reads == 2


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:-1] + b"!", lambda data: b""]
)
def test_a_damaged_copy_costs_a_read_and_is_replaced(store, backend, tmp_path, files, damage):
    version = store.publish("alice", files(1), base=BASE)
    store.fetch(version)
    copy = next((tmp_path / "cache").rglob("adapter_model.safetensors"))
    copy.write_bytes(damage(copy.read_bytes()))
    assert store.fetch(version) == files(1)
    assert backend.reads == 4
    assert store.fetch(version) == files(1)
    assert backend.reads == 4


def test_damage_in_the_storage_is_never_kept(store, backend, tmp_path, files):
    version = store.publish("alice", files(1), base=BASE)
    path = next((tmp_path / "store").rglob("adapter_model.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(IntegrityError):
        store.fetch(version)
    assert not list((tmp_path / "cache").rglob("adapter_model.safetensors"))


def test_what_is_deleted_is_gone_elsewhere_at_the_next_access(backend, tmp_path, files):
    here = AdapterStore(backend, cache=tmp_path / "here")
    there = AdapterStore(backend, cache=tmp_path / "there")
    first, second = (here.publish("alice", files(n), base=BASE) for n in (1, 2))
    bob = here.publish("bob", files(3), base=BASE)
    for store in (here, there):
        for version in (first, second, bob):
            store.fetch(version)

    here.delete_version("alice", first.version)
    assert copies(tmp_path / "here") == {second.version, bob.version}
    with pytest.raises(AdapterNotFoundError):
        there.fetch(first)
    assert copies(tmp_path / "there") == {second.version, bob.version}
    here.erase_user("alice")
    assert copies(tmp_path / "here") == {bob.version}
    with pytest.raises(AdapterNotFoundError):
        there.resolve("alice")
    assert copies(tmp_path / "there") == {bob.version}


@pytest.mark.parametrize("access", ["resolve", "fetch"])
def test_what_was_erased_is_gone_elsewhere_after_another_publish(backend, tmp_path, files, access):
    here = AdapterStore(backend, cache=tmp_path / "here")
    there = AdapterStore(backend, cache=tmp_path / "there")
    first = here.publish("alice", files(1), base=BASE)
    there.fetch(first)
    here.erase_user("alice")
    second = here.publish("alice", files(2), base=BASE)
    if access == "resolve":
        assert there.resolve("alice") == second
    else:
        assert there.fetch(second) == files(2)
    assert first.version not in copies(tmp_path / "there")
    assert there.fetch(second) == files(2)
    assert second.version in copies(tmp_path / "there")


def test_a_collection_removes_what_a_killed_process_was_removing(backend, tmp_path, files):
    store = AdapterStore(backend, cache=tmp_path / "cache")
    store.fetch(store.publish("alice", files(1), base=BASE))
    left = tmp_path / "cache" / "tmp" / "gone-0"
    left.mkdir(parents=True, exist_ok=True)
    (left / "adapter_model.safetensors").write_bytes(b"of a user who was erased")
    store.gc(dry_run=True)
    assert left.exists()
    store.gc()
    assert not left.exists()


class Hooked(MemoryBackend):
    """Acts after looks at a log: each takes the last of `acts`, and calls it if it is one."""

    def __init__(self, backend):
        self.__dict__.update(backend.__dict__)
        self.acts = []

    def list_folder(self, folder):
        names = super().list_folder(folder)
        if folder.endswith("/log") and self.acts:
            act = self.acts.pop()
            if act is not None:
                act()
        return names


def test_a_folder_made_while_a_head_is_read_stays(files):
    """It belongs to a newer version than the head lists."""
    backend = MemoryBackend()
    writer, hooked = AdapterStore(backend), Hooked(backend)
    writer.publish("alice", files(1), base=BASE)
    writer.erase_user("alice")
    writer.publish("alice", files(2), base=BASE)
    reader, folders = AdapterStore(hooked), []
    reader.exists()

    def publish():
        folders.append(writer.fetch_dir(writer.publish("alice", files(3), base=BASE)))

    hooked.acts = [publish, None]  # at the second look
    reader.resolve("alice")
    assert len(folders) == 1
    assert folders[0].is_dir()


def test_stores_with_one_pepper_leave_each_others_folders_alone(files):
    pepper = b"the same pepper for both of them"
    one, other = (AdapterStore(MemoryBackend(), pepper=pepper) for _ in range(2))
    one.publish("alice", files(1), base=BASE)
    folder = other.fetch_dir(other.publish("alice", files(2), base=BASE))
    one.erase_user("alice")
    assert one.versions("alice") == []
    assert folder.is_dir()


def test_a_copy_that_cannot_be_removed_stops_no_erasure_and_no_collection(tmp_path, files):
    class Stuck(AdapterCache):
        def drop(self, *names):
            raise PermissionError("read-only")

    backend = MemoryBackend()
    store = AdapterStore(backend, cache=tmp_path / "cache")
    version = store.publish("alice", files(1), base=BASE)
    store.fetch(version)
    stuck = AdapterStore(backend, cache=Stuck(tmp_path / "cache"))
    with pytest.raises(BackendError, match=r"a copy in .* cannot be removed"):
        stuck.erase_user("alice")
    assert [key for key in all_keys(backend, "users") if "/versions/" in key] == []
    assert len(all_keys(backend, "users")) == 1
    [problem] = stuck.gc().problems
    assert "cannot be removed" in problem


def test_a_collection_empties_the_cache_of_users_not_asked_for_since(backend, tmp_path, files):
    there = AdapterStore(backend, cache=tmp_path / "there")
    there.fetch(there.publish("alice", files(1), base=BASE))
    AdapterStore(backend).erase_user("alice")
    assert there.gc(dry_run=True).cached_versions == 1
    assert there.gc().cached_versions == 1
    assert not list((tmp_path / "there").rglob("adapter_model.safetensors"))


def test_the_longest_unused_go_first_and_the_limit_holds(backend, tmp_path, files):
    writer = AdapterStore(backend)
    versions = [writer.publish(f"user-{n}", files(n, num_values=4000), base=BASE) for n in range(6)]
    size = sum(file.size for file in versions[0].files.values())
    cache = AdapterCache(tmp_path / "cache", max_bytes=4 * size)
    store = AdapterStore(backend, cache=cache)
    for number, version in enumerate(versions[:4]):
        store.fetch(version)
        folder = next((tmp_path / "cache").rglob(version.version))
        os.utime(folder, (number, number))
    store.fetch(versions[0])  # used again, so the second is the oldest now
    for version in versions[4:]:
        store.fetch(version)
        assert cache.num_bytes() <= 4 * size
    left = copies(tmp_path / "cache")
    assert versions[0].version in left
    assert versions[5].version in left
    assert versions[1].version not in left


def test_a_cache_that_cannot_be_written_fails_nothing(backend, files, tmp_path):
    (tmp_path / "file").write_text("in the way")
    store = AdapterStore(backend, cache=tmp_path / "file" / "cache")
    version = store.publish("alice", files(1), base=BASE)
    assert store.fetch(version) == files(1)


def test_a_cache_of_no_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_bytes is 0, expected a whole number"):
        AdapterCache(tmp_path, max_bytes=0)


def test_two_stores_share_a_folder_and_never_each_others_copies(tmp_path, files):
    pepper = b"the same pepper for both of them"
    stores = [
        AdapterStore(tmp_path / name, pepper=pepper, cache=tmp_path / "cache") for name in "ab"
    ]
    for number, store in enumerate(stores):
        store.publish("alice", files(number), base=BASE)
    for number, store in enumerate(stores):
        assert store.fetch(store.resolve("alice")) == files(number)


def test_readers_killed_at_any_moment_leave_nothing_half(backend, tmp_path, files):
    writer = AdapterStore(backend)
    for number in range(20):
        writer.publish(f"user-{number}", files(number, num_values=20_000), base=BASE)
    code = """
import sys
from adapter_store import AdapterCache, AdapterStore
store = AdapterStore(sys.argv[1], cache=AdapterCache(sys.argv[2], max_bytes=400_000))
print("ready", flush=True)
while True:
    for number in range(20):
        store.fetch(store.resolve(f"user-{number}"))
"""
    moments = random.Random(0)
    for _ in range(4):
        readers = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(tmp_path / "store"), str(tmp_path / "cache")],
                stdout=subprocess.PIPE,
            )
            for _ in range(2)
        ]
        for reader in readers:
            reader.stdout.readline()
        time.sleep(moments.uniform(0, 0.1))
        for reader in readers:
            assert reader.poll() is None, "a reader failed"
            reader.kill()
            reader.communicate()
    cache = AdapterCache(tmp_path / "cache", max_bytes=400_000)
    store = AdapterStore(backend, cache=cache)
    for path in (tmp_path / "cache").rglob("adapter_config.json"):
        if "tmp" not in path.parts:
            assert {file.name for file in path.parent.iterdir()} == set(ADAPTER_FILES)
    for number in range(20):
        assert store.fetch(store.resolve(f"user-{number}")) == files(number, num_values=20_000)
    cache.evict()
    assert cache.num_bytes() <= 400_000
    temporary = tmp_path / "cache" / "tmp"
    for path in temporary.iterdir():  # what was being written: an hour later it goes
        os.utime(path, (0, 0))
    cache.evict()
    assert list(temporary.iterdir()) == []
