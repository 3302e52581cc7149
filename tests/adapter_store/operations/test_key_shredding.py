"""Keys shredded with their user, or collected where nothing is sealed with them."""

import base64
import json
import shutil
import threading
from datetime import timedelta

import pytest
from hooked_backend import HookedMemory, once

from adapter_store import (
    AdapterNotFoundError,
    AdapterStore,
    AdapterStoreError,
    IntegrityError,
    KeyMismatchError,
    MemoryBackend,
    UserErasedError,
)

BASE = {"weights": "a fingerprint"}
NO_GRACE = timedelta(0)


@pytest.fixture
def store(root, keys):
    return AdapterStore(root, keys=keys)


class TestErasure:
    def test_a_backup_without_keys_is_worth_nothing_after_an_erasure(
        self, store, root, keys, files
    ):
        version = store.publish("alice", files(1), base=BASE)
        store.publish("bob", files(2), base=BASE)
        backup = shutil.copytree(root / "users", root.parent / "backup")
        store.erase_user("alice")
        assert not list((root / "keys").rglob(f"{version.user_key}/*/*"))
        shutil.rmtree(root / "users")
        shutil.copytree(backup, root / "users")
        restored = AdapterStore(root, keys=keys)
        with pytest.raises(IntegrityError, match="its key is not there"):
            restored.resolve("alice")
        assert restored.fetch(restored.resolve("bob")) == files(2)

    def test_a_user_who_comes_back_has_a_new_key_for_warm_readers(self, root, keys, files):
        writer, warm = AdapterStore(root, keys=keys), AdapterStore(root, keys=keys)
        writer.publish("alice", files(1), base=BASE)
        warm.fetch(warm.resolve("alice"))
        writer.erase_user("alice")
        with pytest.raises(AdapterNotFoundError):
            warm.resolve("alice")
        writer.publish("alice", files(2), base=BASE)
        assert warm.fetch(warm.resolve("alice")) == files(2)

    def test_a_refused_publish_leaves_no_key(self, store, root, files):
        data_seq = store.data_seq("alice")
        store.erase_user("alice")
        with pytest.raises(UserErasedError):
            store.publish("alice", files(1), base=BASE, data_seq=data_seq)
        records = (root / "keys").rglob("*.json")
        assert [path for path in records if "/store/" not in str(path)] == []

    def test_a_collection_finishes_an_erasure_that_was_interrupted(self, store, root, files, keys):
        store.publish("alice", files(1), base=BASE)
        copy = shutil.copytree(root, root.parent / "copy")
        store.erase_user("alice")
        for part in ("keys", "users"):  # as if nothing but the entry had been done
            shutil.copytree(copy / part, root / part, dirs_exist_ok=True)
        half = AdapterStore(root, keys=keys)
        with pytest.raises(AdapterNotFoundError):
            half.resolve("alice")
        assert "left of an erasure" in half.verify().damaged[0].problems[0]
        done = half.gc()
        assert (done.entries, done.versions, done.keys) == (1, 1, 1)
        assert not list(root.rglob("adapter_model.safetensors"))
        assert half.verify().ok


class TestUnusedKeys:
    @pytest.fixture
    def backend(self):
        return MemoryBackend()

    @pytest.fixture
    def slow(self, backend):
        """The same storage, on which a test acts before a put."""
        return HookedMemory(backend)

    @pytest.mark.parametrize("at", ["adapter_model", "adapter_config", "/log/"])
    def test_a_publish_makes_another_key_where_its_own_is_collected(
        self, backend, slow, keys, files, at
    ):
        other = AdapterStore(backend, keys=keys)
        other.prepare("alice")
        slow.before = once(lambda: other.gc(grace=NO_GRACE), at)
        AdapterStore(slow, keys=keys).publish("alice", files(1), base=BASE)
        fresh = AdapterStore(backend, keys=keys)
        assert fresh.fetch(fresh.resolve("alice")) == files(1)
        assert fresh.gc(grace=NO_GRACE).keys == 0

    def test_the_key_of_a_publisher_killed_before_its_first_file_goes(self, store, root):
        store.prepare("alice")
        inside = store._opener.open()
        inside.key_for(inside.log.head_or_new(inside.log.user_key("alice")))
        assert store.gc().keys == 0  # young
        assert store.gc(grace=NO_GRACE, dry_run=True).keys == 1
        assert store.gc(grace=NO_GRACE).keys == 1
        assert len(list((root / "keys").rglob("*.json"))) == 1  # the store's own

    def test_a_key_used_between_a_collections_look_and_entry_is_kept(self, backend, keys, files):
        AdapterStore(backend, keys=keys).prepare("alice")
        looked, has_key = threading.Event(), threading.Event()

        def wait_for_the_look(key):
            if "/versions/" in key:
                has_key.set()
                assert looked.wait(30)

        waiting = AdapterStore(HookedMemory(backend, wait_for_the_look), keys=keys)
        publisher = threading.Thread(
            target=waiting.publish, args=("alice", files(1)), kwargs={"base": BASE}
        )

        def let_it_publish():
            looked.set()
            publisher.join(30)

        publisher.start()
        assert has_key.wait(30)
        collecting = HookedMemory(backend, once(let_it_publish))
        assert AdapterStore(collecting, keys=keys).gc(grace=NO_GRACE).keys == 0
        fresh = AdapterStore(backend, keys=keys)
        assert fresh.fetch(fresh.resolve("alice")) == files(1)

    def test_a_dry_run_counts_the_keys_of_an_interrupted_erasure_once(
        self, backend, slow, keys, files
    ):
        AdapterStore(backend, keys=keys).publish("alice", files(1), base=BASE)

        def delete(key):
            if key.startswith("keys/"):
                raise KeyboardInterrupt
            backend.delete(key)

        slow.delete = delete
        with pytest.raises(KeyboardInterrupt):
            AdapterStore(slow, keys=keys).erase_user("alice")
        store = AdapterStore(backend, keys=keys)
        planned, done = store.gc(dry_run=True), store.gc()
        assert planned == done
        assert done.keys == 1

    def test_a_key_that_only_files_are_sealed_with_is_kept(self, backend, slow, keys, files):
        """Two first publishes at once each make a key; the entries have that of the faster one."""
        other = AdapterStore(backend, keys=keys)
        slow.before = once(lambda: other.publish("alice", files(1), base=BASE))
        AdapterStore(slow, keys=keys).publish("alice", files(2), base=BASE)
        other.gc(grace=NO_GRACE)
        fresh = AdapterStore(backend, keys=keys)
        assert [fresh.fetch(version) for version in fresh.versions("alice")] == [files(1), files(2)]
        slower = fresh.versions("alice")[1]
        fresh.delete_version("alice", slower.version)
        assert fresh.gc(grace=NO_GRACE, dry_run=True).keys == 1
        assert fresh.gc(grace=NO_GRACE).keys == 1
        fresh = AdapterStore(backend, keys=keys)
        assert fresh.fetch(fresh.versions("alice")[0]) == files(1)

    def test_an_import_that_lost_a_race_and_its_answer_keeps_its_key(
        self, backend, slow, keys, files, tmp_path
    ):
        """Its files are listed under the key of the faster publish, which had the entry before."""
        source = AdapterStore(tmp_path / "source")
        source.publish("alice", files(2), base=BASE)
        archive = source.export_user("alice", tmp_path / "alice.tar")
        other = AdapterStore(backend, keys=keys)
        slow.before = once(lambda: other.publish("alice", files(1), base=BASE))

        def put_without_answer(key, data):
            backend.put_if_absent(key, data)
            if key.endswith("000000000002.json"):
                raise OSError("connection lost")

        slow.put = put_without_answer
        with pytest.raises((OSError, AdapterStoreError)):
            AdapterStore(slow, keys=keys).import_user(archive)
        fresh = AdapterStore(backend, keys=keys)
        assert [fresh.fetch(version) for version in fresh.versions("alice")] == [files(2), files(1)]

    def test_a_user_with_a_damaged_key_stops_no_other(self, store, root, keys, files):
        for user in ("alice", "bob"):
            store.publish(user, files(1), base=BASE)
        user_key = store.resolve("alice").user_key
        record = next((root / "keys").rglob(f"{user_key}/*/*.json"))
        content = json.loads(record.read_text())
        wrapped = bytearray(base64.b64decode(content["wrapped"]))
        wrapped[-1] ^= 1
        content["wrapped"] = base64.b64encode(wrapped).decode()
        record.write_text(json.dumps(content))
        fresh, problems = AdapterStore(root, keys=keys), []
        heads, _ = fresh.list_users(on_problem=problems.append)
        assert [head.user_id for head in heads] == ["bob"]
        assert [type(problem) for problem in problems] == [KeyMismatchError]
        assert [report.user_key for report in fresh.verify().damaged] == [user_key]
        assert len(fresh.gc().problems) == 1
