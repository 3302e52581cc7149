"""Encrypted stores: what lies there says nothing, keys that do not fit are told apart, erasing shreds, keys rotate."""

import base64
import json
import os
import shutil
import threading
from datetime import timedelta

import pytest

from adapter_store import (
    AdapterNotFoundError,
    AdapterStore,
    AdapterStoreError,
    BackendError,
    EnvironmentKeys,
    FileKeys,
    IntegrityError,
    KeyMismatchError,
    KmsKeys,
    MemoryBackend,
    UserErasedError,
)
from adapter_store.conformance import all_keys
from adapter_store.keys import cipher, new_key
from adapter_store.layout import version_folder
from adapter_store.vault import key_of

BASE = {"weights": "a fingerprint"}
PEPPER = b"a pepper of sixteen bytes or more"


@pytest.fixture
def keys(tmp_path):
    return FileKeys.create(tmp_path / "keys")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def store(root, keys):
    return AdapterStore(root, keys=keys)


def everything(root):
    return b"".join(path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file())


class TestAtRest:
    def test_nothing_that_lies_there_says_anything(self, store, root, files):
        content = files(1)
        version = store.publish(
            "alice@example.org",
            content,
            base=BASE,
            metadata={"instruction": "secret style"},
            reason="private",
        )
        store.activate("alice@example.org", version.version)
        lying = everything(root)
        for secret in (b"alice", b"secret style", b"private", b"a fingerprint", b"lora_A", b"LORA"):
            assert secret not in lying
        assert content["adapter_model.safetensors"][-64:] not in lying
        assert store.fetch(store.resolve("alice@example.org")) == content
        assert [head.user_id for head in store.list_users()[0]] == ["alice@example.org"]
        # Nor does anybody find the pepper there, with which ids could be tried out.
        assert json.loads((root / "adapter_store.json").read_text())["pepper"] is None

    def test_the_same_content_lies_there_differently_each_time(self, store, root, files):
        versions = [store.publish(user, files(1), base=BASE) for user in ("alice", "alice", "bob")]
        sealed = {path.read_bytes() for path in root.rglob("adapter_model.safetensors")}
        assert len(sealed) == len(versions)
        assert len({version.digest for version in versions}) == 1

    def test_a_version_is_handed_out_as_a_plain_folder_outside_the_store(self, store, root, files):
        folder = store.fetch_dir(store.publish("alice", files(1), base=BASE))
        assert root not in folder.parents
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files(1)
        store.erase_user("alice")
        assert not folder.exists()

    def test_what_is_sealed_for_one_place_is_refused_at_another(self, store, root, files):
        alice = store.publish("alice", files(1), base=BASE)
        other = store.publish("alice", files(2), base=BASE)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            here, there = (next(root.rglob(f"{v.version}/{name}")) for v in (alice, other))
            kept = there.read_bytes()
            there.write_bytes(here.read_bytes())
            with pytest.raises(
                IntegrityError, match=rf"{name} (is damaged: it does not decrypt|has \d+ bytes)"
            ):
                store.fetch(other)
            there.write_bytes(kept)
        log = next(root.rglob("log"))
        (log / "000000000003.json").write_bytes((log / "000000000001.json").read_bytes())
        with pytest.raises(
            IntegrityError, match=r"000000000003.json is damaged: it does not decrypt"
        ):
            AdapterStore(root, keys=store._opener.keys).resolve("alice")

    def test_a_plain_entry_smuggled_in_is_refused(self, store, root, files, tmp_path, keys):
        store.publish("alice", files(1), base=BASE)
        plain = AdapterStore(tmp_path / "plain", pepper=PEPPER)
        plain.publish("alice", files(2), base=BASE)
        entry = next((tmp_path / "plain").rglob("log/*.json")).read_text()
        log = next(root.rglob("log"))
        entry = entry.replace('"seq": 1', '"seq": 2').replace(
            entry.split('"user_key": "')[1][:64], log.parent.name
        )
        (log / "000000000002.json").write_text(entry)
        with pytest.raises(
            IntegrityError, match="is not encrypted, as everything in this store is"
        ):
            AdapterStore(root, keys=keys).resolve("alice")

    @pytest.mark.parametrize("cut", [0, 3, 20, 39, 41])
    def test_cut_or_changed_files_are_damage(self, store, root, files, cut):
        version = store.publish("alice", files(1), base=BASE)
        path = next(root.rglob("adapter_config.json"))
        data = path.read_bytes()
        path.write_bytes(data[:cut])
        with pytest.raises(IntegrityError, match=r"has \d+ bytes, published were"):
            store.fetch(version)
        path.write_bytes(data[:cut] + bytes([data[cut] ^ 1]) + data[cut + 1 :])
        with pytest.raises(
            IntegrityError, match=r"adapter_config.json is damaged|a file is missing, or its key"
        ):
            store.fetch(version)


class TestKeysAtHand:
    def test_without_or_with_other_keys_it_never_just_finds_nobody(
        self, store, root, files, tmp_path
    ):
        store.publish("alice", files(1), base=BASE)
        others = {
            "is of an encrypted store: pass its keys": None,
            "the master key 'key-1' .* is not the one": FileKeys.create(tmp_path / "other"),
            "wrapped with the master key 'key-1', and .* holds key-2: add that key": FileKeys.create(
                tmp_path / "third", "key-2"
            ),
        }
        for said, keys in others.items():
            wrong = AdapterStore(root, keys=keys)
            for call in (
                wrong.resolve,
                wrong.versions,
                lambda user, s=wrong: s.publish(user, files(), base=BASE),
                wrong.erase_user,
            ):
                with pytest.raises(KeyMismatchError, match=said):
                    call("alice")

    def test_keys_given_to_a_plain_store_are_refused_saying_how_to_go_on(self, root, keys, files):
        AdapterStore(root).publish("alice", files(1), base=BASE)
        with pytest.raises(
            KeyMismatchError, match=r"without encryption, and keys were given: .*export its users"
        ):
            AdapterStore(root, keys=keys).resolve("alice")

    def test_a_given_pepper_and_keys_work_together(self, root, keys, files):
        AdapterStore(root, pepper=PEPPER, keys=keys).publish("alice", files(1), base=BASE)
        assert AdapterStore(root, pepper=PEPPER, keys=keys).active("alice")
        with pytest.raises(KeyMismatchError, match="with a pepper of its owner"):
            AdapterStore(root, keys=keys).resolve("alice")
        with pytest.raises(KeyMismatchError, match="with another pepper"):
            AdapterStore(root, keys=keys, pepper=PEPPER[::-1]).resolve("alice")

    def test_a_lost_key_is_damage_that_is_named(self, store, root, keys, files):
        version = store.publish("alice", files(1), base=BASE)
        shutil.rmtree(root / "keys" / version.user_key[:2])
        fresh = AdapterStore(root, keys=keys)
        with pytest.raises(IntegrityError, match="is listed, but it or its key is not there"):
            fresh.resolve("alice")
        [report] = fresh.verify().damaged
        assert "its key is not there" in report.problems[0]

    def test_the_environment_holds_keys(self, root, files, monkeypatch):
        monkeypatch.setenv("MY_KEYS", f"new:{new_key()}, old:{new_key()}")
        keys = EnvironmentKeys("MY_KEYS")
        assert keys.key_id == "new"
        AdapterStore(root, keys=keys).publish("alice", files(1), base=BASE)
        assert AdapterStore(root, keys=EnvironmentKeys("MY_KEYS")).active("alice")
        assert os.environ["MY_KEYS"][4:20] not in repr(keys)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "MY_KEYS is not set: set it to name:base64"),
            ("justakey", "key number 1 of .* is not a name and 32 bytes in base64"),
            (
                "name:c2hvcnQ=",
                "key number 1 of the environment's MY_KEYS is not a name and 32 bytes in base64",
            ),
            ("c2VjcmV0IHNlY3JldCBzZWNyZXQgc2VjcmV0IHNlY3I=", "has no name"),
            (f"a:{'A' * 43}=,a:{'B' * 42}A=", "has the key a twice"),
        ],
    )
    def test_an_environment_that_holds_none_is_refused_without_showing_it(
        self, monkeypatch, text, said
    ):
        monkeypatch.setenv("MY_KEYS", text)
        with pytest.raises(KeyMismatchError, match=said) as caught:
            EnvironmentKeys("MY_KEYS")
        assert "c2" not in str(caught.value)

    def test_a_key_file_is_for_its_owner_only(self, tmp_path):
        path = tmp_path / "deep" / "keys"
        keys = FileKeys.create(path)
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(FileExistsError):
            FileKeys.create(path)
        with pytest.raises(ValueError, match="has a key key-1 already"):
            keys.add("key-1")
        path.chmod(0o640)
        with pytest.raises(KeyMismatchError, match=r"can be read by others .*chmod 600"):
            FileKeys(path)
        path.chmod(0o600)
        for content, said in (
            ("one two three\n", "a line that is not: name base64"),
            ("# only this\n", "holds no key"),
        ):
            path.write_text(content)
            with pytest.raises(KeyMismatchError, match=said):
                FileKeys(path)
        with pytest.raises(KeyMismatchError, match="cannot read the key file"):
            FileKeys(tmp_path / "none")

    def test_something_else_than_keys_is_a_type_error(self, root):
        with pytest.raises(TypeError, match="expected a KeyProvider"):
            AdapterStore(root, keys=b"x" * 32)


class TestErasure:
    def test_erasing_shreds_the_key_so_that_a_backup_of_the_users_is_worth_nothing(
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

    def test_who_comes_back_gets_a_new_key_that_warm_readers_learn(self, root, keys, files):
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
        assert [
            path for path in (root / "keys").rglob("*.json") if "/store/" not in str(path)
        ] == []

    def test_a_collection_finishes_an_erasure_that_was_interrupted(self, store, root, files, keys):
        store.publish("alice", files(1), base=BASE)
        kept = shutil.copytree(root, root.parent / "kept")
        store.erase_user("alice")
        for part in ("keys", "users"):  # as if nothing but the entry had been done
            shutil.copytree(kept / part, root / part, dirs_exist_ok=True)
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
        """The same storage, on which a test acts before the first put whose key holds `slow.at`."""
        found = MemoryBackend()
        found.__dict__.update(backend.__dict__)
        done = []

        def put(key, data):
            if found.at in key and not done:
                done.append(key)
                found.act()
            backend.put_if_absent(key, data)

        found.put_if_absent = put
        return found

    @pytest.mark.parametrize("at", ["adapter_model", "adapter_config", "/log/"])
    def test_a_publish_whose_key_is_collected_in_its_middle_makes_another(
        self, backend, slow, keys, files, at
    ):
        other = AdapterStore(backend, keys=keys)
        other.prepare("alice")
        slow.at, slow.act = at, lambda: other.gc(grace=timedelta(0))
        AdapterStore(slow, keys=keys).publish("alice", files(1), base=BASE)
        fresh = AdapterStore(backend, keys=keys)
        assert fresh.fetch(fresh.resolve("alice")) == files(1)
        assert fresh.gc(grace=timedelta(0)).keys == 0

    def test_a_key_is_collected_whose_publisher_was_killed_before_its_first_file(self, store, root):
        store.prepare("alice")
        inside = store._opener.open()
        inside.key_for(inside.log.head_or_new(inside.log.user_key("alice")))
        assert store.gc().keys == 0  # young
        assert store.gc(grace=timedelta(0), dry_run=True).keys == 1
        assert store.gc(grace=timedelta(0)).keys == 1
        assert len(list((root / "keys").rglob("*.json"))) == 1  # the store's own

    def test_a_key_that_is_used_between_a_collection_s_look_and_its_entry_is_kept(
        self, backend, slow, keys, files
    ):
        AdapterStore(backend, keys=keys).prepare("alice")
        looked, has_key = threading.Event(), threading.Event()
        put = backend.put_if_absent

        def wait_for_the_look(key, data):
            if "/versions/" in key:
                has_key.set()
                assert looked.wait(30)
            put(key, data)

        backend.put_if_absent = wait_for_the_look
        publisher = threading.Thread(
            target=lambda: AdapterStore(backend, keys=keys).publish("alice", files(1), base=BASE)
        )

        def let_it_publish():
            looked.set()
            publisher.join(30)

        publisher.start()
        assert has_key.wait(30)
        slow.at, slow.act = "/log/", let_it_publish
        assert AdapterStore(slow, keys=keys).gc(grace=timedelta(0)).keys == 0
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

        slow.at, slow.delete = "nowhere", delete
        with pytest.raises(KeyboardInterrupt):
            AdapterStore(slow, keys=keys).erase_user("alice")
        store = AdapterStore(backend, keys=keys)
        planned, done = store.gc(dry_run=True), store.gc()
        assert planned == done
        assert done.keys == 1

    def test_a_key_that_only_files_are_sealed_with_is_kept(self, backend, slow, keys, files):
        """Two first publishes at once each make a key; the entries have that of the faster one."""
        other = AdapterStore(backend, keys=keys)
        slow.at, slow.act = "/log/", lambda: other.publish("alice", files(1), base=BASE)
        AdapterStore(slow, keys=keys).publish("alice", files(2), base=BASE)
        other.gc(grace=timedelta(0))
        fresh = AdapterStore(backend, keys=keys)
        assert [fresh.fetch(version) for version in fresh.versions("alice")] == [files(1), files(2)]
        slower = fresh.versions("alice")[1]
        fresh.delete_version("alice", slower.version)
        assert fresh.gc(grace=timedelta(0), dry_run=True).keys == 1
        assert fresh.gc(grace=timedelta(0)).keys == 1
        fresh = AdapterStore(backend, keys=keys)
        assert fresh.fetch(fresh.versions("alice")[0]) == files(1)

    def test_an_import_that_lost_a_race_and_its_answer_keeps_its_key(
        self, backend, slow, keys, files, tmp_path
    ):
        """Its files are listed under the key of the faster publish, whose entry it extended."""
        source = AdapterStore(tmp_path / "source")
        source.publish("alice", files(2), base=BASE)
        archive = source.export_user("alice", tmp_path / "alice.tar")
        other = AdapterStore(backend, keys=keys)
        slow.at, slow.act = "/log/", lambda: other.publish("alice", files(1), base=BASE)
        put = slow.put_if_absent

        def unanswered(key, data):
            put(key, data)
            if key.endswith("000000000002.json"):
                raise OSError("connection lost")

        slow.put_if_absent = unanswered
        with pytest.raises((OSError, AdapterStoreError)):
            AdapterStore(slow, keys=keys).import_user(archive)
        fresh = AdapterStore(backend, keys=keys)
        assert [fresh.fetch(version) for version in fresh.versions("alice")] == [files(2), files(1)]

    def test_a_user_whose_key_is_damaged_stops_nobody_else(self, store, root, keys, files):
        for user in ("alice", "bob"):
            store.publish(user, files(1), base=BASE)
        user_key = store.resolve("alice").user_key
        record = next((root / "keys").rglob(f"{user_key}/*/*.json"))
        content = json.loads(record.read_text())
        wrapped = bytearray(base64.b64decode(content["wrapped"]))
        wrapped[-1] ^= 1
        record.write_text(json.dumps({**content, "wrapped": base64.b64encode(wrapped).decode()}))
        fresh, problems = AdapterStore(root, keys=keys), []
        assert [head.user_id for head in fresh.list_users(on_problem=problems.append)[0]] == ["bob"]
        assert [type(problem) for problem in problems] == [KeyMismatchError]
        assert [report.user_key for report in fresh.verify().damaged] == [user_key]
        assert len(fresh.gc().problems) == 1


class TestRotation:
    def test_after_a_rotation_the_old_master_key_is_needed_no_more(
        self, store, root, keys, files, tmp_path
    ):
        for user in ("alice", "bob"):
            store.publish(user, files(1), base=BASE)
        warm = AdapterStore(
            root, keys=FileKeys(tmp_path / "keys")
        )  # learns the new key from the file, when it meets it
        assert store.rotate_keys() == 0
        keys.add("key-2")
        users = []
        assert store.rotate_keys(on_user=users.append) == 3  # two users' keys and the pepper
        assert users == [1, 2]
        assert store.rotate_keys() == 0
        assert warm.fetch(warm.resolve("bob")) == files(1)
        newest = (tmp_path / "keys").read_text().splitlines()[0]
        assert newest.startswith("key-2 ")
        (tmp_path / "keys").write_text(newest + "\n")
        alone = AdapterStore(root, keys=FileKeys(tmp_path / "keys"))
        assert alone.fetch(alone.resolve("alice")) == files(1)
        assert b'"master": "key-1"' not in everything(root)

    @pytest.mark.parametrize("call", ["rotate", "gc"])
    def test_a_damaged_key_that_something_is_sealed_with_stays(self, files, tmp_path, keys, call):
        backend = MemoryBackend()
        store, slow = AdapterStore(backend, keys=keys), MemoryBackend()
        store.publish("alice", files(1), base=BASE)
        store.erase_user("alice")
        slow.__dict__.update(backend.__dict__)
        raced = []

        def put(key, data):
            if "/log/" in key and not raced:
                raced.append(store.publish("alice", files(2), base=BASE))
            backend.put_if_absent(key, data)

        slow.put_if_absent = put
        second = AdapterStore(slow, keys=keys).publish("alice", files(3), base=BASE)
        weights = backend.get(
            f"{version_folder(second.user_key, second.version)}/adapter_model.safetensors", 100
        )
        record = next(
            key for key in all_keys(backend, "keys") if key_of(weights + bytes(100)) in key
        )
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

    def test_of_two_rotations_at_once_none_says_that_it_wrapped_what_the_other_did(
        self, files, monkeypatch
    ):
        one, two, three = (f"{name}:{new_key()}" for name in ("one", "two", "three"))

        def holding(*pairs):
            monkeypatch.setenv("COPE_STORE_KEYS", ",".join(pairs))
            return EnvironmentKeys()

        backend, slow, raced = MemoryBackend(), MemoryBackend(), []
        AdapterStore(backend, keys=holding(one)).publish("alice", files(1), base=BASE)
        slow.__dict__.update(backend.__dict__)
        faster = AdapterStore(backend, keys=holding(two, one))

        def put(key, data):
            if key.startswith("keys/") and not raced:
                raced.append(faster.rotate_keys())
            backend.put_if_absent(key, data)

        slow.put_if_absent = put
        assert AdapterStore(slow, keys=holding(three, two, one)).rotate_keys() == 2
        assert raced == [2]
        alone = AdapterStore(backend, keys=holding(three))
        assert alone.fetch(alone.resolve("alice")) == files(1)

    def test_a_key_of_a_first_publish_under_way_is_wrapped_anew_too(self, keys, files, tmp_path):
        """It has made its key, and nothing that lies under users/ yet."""
        backend = MemoryBackend()
        AdapterStore(backend, keys=keys).publish("bob", files(2), base=BASE)
        put, rotated = backend.put_if_absent, []

        def rotate(key, data):
            if "/versions/" in key and not rotated:
                keys.add("key-2")
                rotated.append(AdapterStore(backend, keys=keys).rotate_keys())
            put(key, data)

        slow = MemoryBackend()
        slow.__dict__.update(backend.__dict__)
        slow.put_if_absent = rotate
        AdapterStore(slow, keys=keys).publish("alice", files(1), base=BASE)
        assert rotated == [3]
        (tmp_path / "keys").write_text((tmp_path / "keys").read_text().splitlines()[0] + "\n")
        alone = AdapterStore(backend, keys=FileKeys(tmp_path / "keys"))
        assert alone.fetch(alone.resolve("alice")) == files(1)

    def test_a_key_wrapped_anew_while_its_user_is_erased_does_not_come_back(
        self, store, root, keys, files
    ):
        """The rotation has read the key, the erasure removes it, the rotation writes it."""
        version = store.publish("alice", files(1), base=BASE)
        keys.add("key-2")
        place = next((root / "keys").rglob(f"{version.user_key}/*/*.json"))
        wrapped = place.read_bytes()
        store.erase_user("alice")
        assert not place.exists()
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(wrapped)
        assert store.rotate_keys() == 2
        assert not list((root / "keys").rglob(f"{version.user_key}/*/*"))

    def test_a_key_that_does_not_unwrap_is_reported_and_stops_no_other(
        self, store, root, keys, files
    ):
        damaged, moved, *_ = sorted(
            (store.publish(user, files(1), base=BASE) for user in ("alice", "bob", "carol")),
            key=lambda v: v.user_key,
        )
        place = next((root / "keys").rglob(f"{damaged.user_key}/*/*.json"))
        kept = place.read_bytes()
        place.write_bytes(b"not a key")
        other = next((root / "keys").rglob(f"{moved.user_key}/*/*.json"))
        kept_other = other.read_bytes()
        other.write_bytes(kept)
        keys.add("key-2")
        users = []
        with pytest.raises(
            IntegrityError, match=r"2 keys were wrapped anew, 2 could not be read"
        ) as caught:
            store.rotate_keys(on_user=users.append)
        assert str(place) in str(caught.value)
        assert users == [1, 2, 3]
        place.write_bytes(kept)
        with pytest.raises(
            KeyMismatchError, match=r"1 keys were wrapped anew, 1 could not be read"
        ) as caught:
            store.rotate_keys()
        assert str(other.parent) in str(caught.value)
        other.write_bytes(kept_other)
        assert store.rotate_keys() == 1
        assert b'"master": "key-1"' not in everything(root)

    def test_what_a_killed_maker_of_the_store_left_is_in_nobodys_way(
        self, store, root, keys, files
    ):
        """The first put its pepper and was killed before the root file: its store's id is known to nobody."""
        AdapterStore(root.with_name("killed"), keys=keys).prepare("alice")
        shutil.copytree(root.with_name("killed") / "keys" / "st", root / "keys" / "st")
        version = store.publish("alice", files(1), base=BASE)
        keys.add("key-2")
        assert store.rotate_keys() == 2
        assert store.rotate_keys() == 0
        assert store.fetch(version) == files(1)

    def test_a_plain_store_has_nothing_to_rotate(self, root, files):
        store = AdapterStore(root)
        assert store.rotate_keys() == 0  # there is no store yet
        store.publish("alice", files(1), base=BASE)
        with pytest.raises(KeyMismatchError, match="no keys to rotate"):
            store.rotate_keys()


class Service:
    """A key service as a vendor's client looks like: the key stays inside."""

    def __init__(self):
        self.keys = {"alias/one": os.urandom(32)}
        self.calls = []

    def encrypt(self, key_id, plaintext, context):
        self.calls.append(("encrypt", key_id, dict(context)))
        nonce = os.urandom(12)
        return nonce + cipher(self.keys[key_id]).encrypt(
            nonce, plaintext, str(sorted(context.items())).encode()
        )

    def decrypt(self, key_id, ciphertext, context):
        self.calls.append(("decrypt", key_id, dict(context)))
        return cipher(self.keys[key_id]).decrypt(
            ciphertext[:12], ciphertext[12:], str(sorted(context.items())).encode()
        )


class TestKms:
    def test_a_key_service_is_asked_once_a_user_and_never_for_an_adapter(self, root, files):
        service = Service()
        store = AdapterStore(root, keys=KmsKeys(service, "alias/one"))
        for number in range(3):
            store.publish("alice", files(number), base=BASE)
        assert [verb for verb, *_ in service.calls].count(
            "encrypt"
        ) == 2  # the pepper's and the user's
        reader = AdapterStore(root, keys=KmsKeys(service, "alias/one"))
        service.calls.clear()
        for _ in range(3):
            reader.fetch(reader.resolve("alice"))
        assert len(service.calls) == 2
        assert all(context["adapter_store"].count("/") == 2 for _, _, context in service.calls)

    def test_a_service_that_refuses_is_named_with_what_to_do(self, root, files):
        with pytest.raises(
            BackendError, match=r"the key service did not encrypt with key 'alias/none' .*KeyError"
        ):
            AdapterStore(root, keys=KmsKeys(Service(), "alias/none")).publish(
                "alice", files(), base=BASE
            )

    def test_rotation_to_another_key_of_the_service(self, root, files):
        service = Service()
        AdapterStore(root, keys=KmsKeys(service, "alias/one")).publish("alice", files(1), base=BASE)
        service.keys["alias/two"] = os.urandom(32)
        assert AdapterStore(root, keys=KmsKeys(service, "alias/two")).rotate_keys() == 2
        del service.keys["alias/one"]
        store = AdapterStore(root, keys=KmsKeys(service, "alias/two"))
        assert store.fetch(store.resolve("alice")) == files(1)


def test_a_new_key_is_thirty_two_random_bytes():
    assert len(base64.b64decode(new_key())) == 32
    assert new_key() != new_key()
