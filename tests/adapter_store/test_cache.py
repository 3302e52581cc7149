"""The local cache: it saves the way to the storage, and nothing else changes."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

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

BASE = {"weights": "w"}


class Counting(LocalBackend):
    """Counts what is read of adapters."""

    reads = 0

    def get(self, key, max_bytes):
        self.reads += "/versions/" in key
        return super().get(key, max_bytes)


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
    found = at_once(8, lambda number: stores[number].fetch(stores[number].resolve("alice")))
    assert found == [files(1)] * 8
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


def test_what_is_deleted_or_erased_is_gone_from_here_at_once_and_elsewhere_at_the_next_access(
    backend, tmp_path, files
):
    here = AdapterStore(backend, cache=tmp_path / "here")
    there = AdapterStore(backend, cache=tmp_path / "there")
    first, second = (here.publish("alice", files(n), base=BASE) for n in (1, 2))
    bob = here.publish("bob", files(3), base=BASE)
    for store in (here, there):
        for version in (first, second, bob):
            store.fetch(version)

    def copies(name):
        return {path.parent.name for path in (tmp_path / name).rglob("adapter_model.safetensors")}

    here.delete_version("alice", first.version)
    assert copies("here") == {second.version, bob.version}
    with pytest.raises(AdapterNotFoundError):
        there.fetch(first)
    assert copies("there") == {second.version, bob.version}
    here.erase_user("alice")
    assert copies("here") == {bob.version}
    with pytest.raises(AdapterNotFoundError):
        there.resolve("alice")
    assert copies("there") == {bob.version}


@pytest.mark.parametrize("access", ["resolve", "fetch"])
def test_what_was_erased_is_gone_elsewhere_at_the_next_access_though_the_user_was_published_again(
    backend, tmp_path, files, access
):
    here = AdapterStore(backend, cache=tmp_path / "here")
    there = AdapterStore(backend, cache=tmp_path / "there")
    first = here.publish("alice", files(1), base=BASE)
    there.fetch(first)
    here.erase_user("alice")
    second = here.publish("alice", files(2), base=BASE)
    assert (
        there.resolve("alice") == second if access == "resolve" else there.fetch(second) == files(2)
    )
    assert first.version not in {
        path.parent.name for path in (tmp_path / "there").rglob("*.safetensors")
    }
    assert there.fetch(second) == files(2)
    assert second.version in {
        path.parent.name for path in (tmp_path / "there").rglob("*.safetensors")
    }


def test_a_collection_removes_what_a_killed_process_was_removing(backend, tmp_path, files):
    store = AdapterStore(backend, cache=tmp_path / "cache")
    store.fetch(store.publish("alice", files(1), base=BASE))
    left = tmp_path / "cache" / "tmp" / "gone-0"
    left.mkdir(parents=True, exist_ok=True)
    (left / "adapter_model.safetensors").write_bytes(b"of somebody who was erased")
    store.gc(dry_run=True)
    assert left.exists()
    store.gc()
    assert not left.exists()


class Hooked(MemoryBackend):
    """Calls the first of `act` once, when as many looks at a log are through as there are."""

    def __init__(self, backend):
        self.__dict__.update(backend.__dict__)
        self.act = []

    def list_folder(self, folder):
        found = super().list_folder(folder)
        if folder.endswith("/log") and self.act and (act := self.act.pop()):
            act()
        return found


def test_what_is_published_and_handed_out_while_a_head_is_looked_at_is_not_taken_for_something_old(
    files,
):
    backend = MemoryBackend()
    writer, hooked = AdapterStore(backend), Hooked(backend)
    writer.publish("alice", files(1), base=BASE)
    writer.erase_user("alice")
    writer.publish("alice", files(2), base=BASE)
    reader, folders = AdapterStore(hooked), []
    reader.exists()

    def publish():
        folders.append(writer.fetch_dir(writer.publish("alice", files(3), base=BASE)))

    hooked.act = [publish, None]  # at the second look
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


def test_a_copy_that_cannot_be_removed_keeps_nothing_in_the_storage_and_stops_no_collection(
    tmp_path, files
):
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
    assert [("cannot be removed" in problem) for problem in stuck.gc().problems] == [True]


def test_a_collection_empties_the_cache_of_users_nobody_asked_for_since(backend, tmp_path, files):
    there = AdapterStore(backend, cache=tmp_path / "there")
    there.fetch(there.publish("alice", files(1), base=BASE))
    AdapterStore(backend).erase_user("alice")
    assert there.gc(dry_run=True).cached_versions == 1
    assert there.gc().cached_versions == 1
    assert not list((tmp_path / "there").rglob("adapter_model.safetensors"))


def test_the_longest_unused_go_first_and_the_limit_holds(backend, tmp_path, files):
    writer = AdapterStore(backend)
    versions = [writer.publish(f"user-{n}", files(n, num_values=4000), base=BASE) for n in range(6)]
    size = sum(facts.size for facts in versions[0].files.values())
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
    left = {path.parent.name for path in (tmp_path / "cache").rglob("adapter_model.safetensors")}
    assert versions[0].version in left
    assert versions[5].version in left
    assert versions[1].version not in left


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(backend, files, tmp_path):
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
    for folder in [
        path.parent
        for path in (tmp_path / "cache").rglob("adapter_config.json")
        if "tmp" not in path.parts
    ]:
        assert {path.name for path in folder.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
    for number in range(20):
        assert store.fetch(store.resolve(f"user-{number}")) == files(number, num_values=20_000)
    cache.evict()
    assert cache.num_bytes() <= 400_000
    for path in (
        Path(tmp_path) / "cache" / "tmp"
    ).iterdir():  # what was being written: an hour later it goes
        os.utime(path, (0, 0))
    cache.evict()
    assert list((Path(tmp_path) / "cache" / "tmp").iterdir()) == []
