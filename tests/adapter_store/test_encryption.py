"""Encrypted stores: what lies there says nothing, and keys that do not fit are named."""

import base64
import json
import os
import shutil

import pytest

from adapter_store import (
    AdapterStore,
    BackendError,
    EnvironmentKeys,
    FileKeys,
    IntegrityError,
    KeyMismatchError,
    KmsKeys,
)
from adapter_store.keys import cipher, new_key

BASE = {"weights": "a fingerprint"}
PEPPER = b"a pepper of sixteen bytes or more"


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
        stored = everything(root)
        for secret in (b"alice", b"secret style", b"private", b"a fingerprint", b"lora_A", b"LORA"):
            assert secret not in stored
        assert content["adapter_model.safetensors"][-64:] not in stored
        assert store.fetch(store.resolve("alice@example.org")) == content
        assert [head.user_id for head in store.list_users()[0]] == ["alice@example.org"]
        # The pepper, with which ids could be tried out, is not there either.
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

    def test_what_is_sealed_for_one_purpose_is_refused_for_another(self, store, root, keys, files):
        alice = store.publish("alice", files(1), base=BASE)
        other = store.publish("alice", files(2), base=BASE)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            here, there = (next(root.rglob(f"{v.version}/{name}")) for v in (alice, other))
            content = there.read_bytes()
            there.write_bytes(here.read_bytes())
            said = rf"{name} (is damaged: it does not decrypt|has \d+ bytes)"
            with pytest.raises(IntegrityError, match=said):
                store.fetch(other)
            there.write_bytes(content)
        log = next(root.rglob("log"))
        (log / "000000000003.json").write_bytes((log / "000000000001.json").read_bytes())
        said = r"000000000003.json is damaged: it does not decrypt"
        with pytest.raises(IntegrityError, match=said):
            AdapterStore(root, keys=keys).resolve("alice")

    def test_a_plain_entry_smuggled_in_is_refused(self, store, root, files, tmp_path, keys):
        store.publish("alice", files(1), base=BASE)
        plain = AdapterStore(tmp_path / "plain", pepper=PEPPER)
        user_key = plain.publish("alice", files(2), base=BASE).user_key
        entry = next((tmp_path / "plain").rglob("log/*.json")).read_text()
        log = next(root.rglob("log"))
        entry = entry.replace('"seq": 1', '"seq": 2').replace(user_key, log.parent.name)
        (log / "000000000002.json").write_text(entry)
        said = "is not encrypted, as everything in this store is"
        with pytest.raises(IntegrityError, match=said):
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
        said = r"adapter_config.json is damaged|a file is missing, or its key"
        with pytest.raises(IntegrityError, match=said):
            store.fetch(version)


class TestKeysAtHand:
    def test_without_or_with_other_keys_it_never_looks_empty(self, store, root, files, tmp_path):
        store.publish("alice", files(1), base=BASE)
        other = FileKeys.create(tmp_path / "other")
        third = FileKeys.create(tmp_path / "third", "key-2")
        for keys, said in (
            (None, "is of an encrypted store: pass its keys"),
            (other, "the master key 'key-1' .* is not the one"),
            (third, "wrapped with the master key 'key-1', and .* holds key-2: add that key"),
        ):
            wrong = AdapterStore(root, keys=keys)
            for call in (
                wrong.resolve,
                wrong.versions,
                lambda user, s=wrong: s.publish(user, files(), base=BASE),
                wrong.erase_user,
            ):
                with pytest.raises(KeyMismatchError, match=said):
                    call("alice")

    def test_keys_for_a_plain_store_are_refused_saying_how_to_go_on(self, root, keys, files):
        AdapterStore(root).publish("alice", files(1), base=BASE)
        said = r"without encryption, and keys were given: .*export its users"
        with pytest.raises(KeyMismatchError, match=said):
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
    def test_an_unusable_environment_is_refused_without_showing_it(self, monkeypatch, text, said):
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


class Service:
    """A key service as a vendor's client looks like: the key stays inside."""

    def __init__(self):
        self.keys = {"alias/one": os.urandom(32)}
        self.calls = []

    def encrypt(self, key_id, plaintext, context):
        self.calls.append(("encrypt", key_id, dict(context)))
        nonce, bound_to = os.urandom(12), str(sorted(context.items())).encode()
        return nonce + cipher(self.keys[key_id]).encrypt(nonce, plaintext, bound_to)

    def decrypt(self, key_id, ciphertext, context):
        self.calls.append(("decrypt", key_id, dict(context)))
        nonce, bound_to = ciphertext[:12], str(sorted(context.items())).encode()
        return cipher(self.keys[key_id]).decrypt(nonce, ciphertext[12:], bound_to)


class TestKms:
    def test_a_key_service_is_asked_once_a_user_never_for_adapters(self, root, files):
        service = Service()
        store = AdapterStore(root, keys=KmsKeys(service, "alias/one"))
        for number in range(3):
            store.publish("alice", files(number), base=BASE)
        verbs = [verb for verb, *_ in service.calls]
        assert verbs.count("encrypt") == 2  # the pepper's and the user's
        reader = AdapterStore(root, keys=KmsKeys(service, "alias/one"))
        service.calls.clear()
        for _ in range(3):
            reader.fetch(reader.resolve("alice"))
        assert len(service.calls) == 2
        assert all(context["adapter_store"].count("/") == 2 for _, _, context in service.calls)

    def test_a_service_that_refuses_is_named_with_what_to_do(self, root, files):
        store = AdapterStore(root, keys=KmsKeys(Service(), "alias/none"))
        said = r"the key service did not encrypt with key 'alias/none' .*KeyError"
        with pytest.raises(BackendError, match=said):
            store.publish("alice", files(), base=BASE)

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
