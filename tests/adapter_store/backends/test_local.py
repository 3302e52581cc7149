"""What a local folder adds: what lies where, damage, the pepper, and disks that refuse."""

import contextlib
import json
import os
import resource
import shutil
import stat

import pytest

from adapter_store import (
    AdapterNotFoundError,
    AdapterStore,
    BackendError,
    FormatVersionError,
    IntegrityError,
    KeyMismatchError,
    MemoryBackend,
)

BASE = {"weights": "w"}
PEPPER = b"a pepper of sixteen bytes or more"


def user_folder(root, version):
    return root / "users" / version.user_key[:2] / version.user_key[2:4] / version.user_key


def newest_entry(root, version):
    return sorted((user_folder(root, version) / "log").iterdir())[-1]


def all_files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def with_version(entry, **changes):
    return entry | {"versions": [entry["versions"][0] | changes]}


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestLayout:
    def test_what_lies_where_and_who_may_read_it(self, local, root, files):
        version = local.publish("alice", files(), base=BASE)
        user = user_folder(root, version)
        assert set(all_files(root)) == {
            root / "adapter_store.json",
            user / "log" / "000000000001.json",
            user / "versions" / version.version / "adapter_model.safetensors",
            user / "versions" / version.version / "adapter_config.json",
        }
        for path in [root, *root.rglob("*")]:
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path

    def test_an_entry_is_a_whole_head_that_a_person_can_read(self, local, root, files):
        first = local.publish("ålice 😀", files(1), base=BASE)
        second = local.publish(
            "ålice 😀", files(2), base=BASE, metrics={"nll": 2.5}, activate=False
        )
        text = newest_entry(root, first).read_text(encoding="utf-8")
        entry = json.loads(text)
        assert '"user_id": "ålice 😀"' in text
        assert list(entry) == sorted(entry)
        assert (entry["seq"], entry["active"], entry["operation"]) == (2, first.version, "publish")
        assert [row["version"] for row in entry["versions"]] == [first.version, second.version]
        assert entry["versions"][1]["metrics"] == {"nll": 2.5}

    def test_names_that_a_later_release_adds_are_ignored(self, local, root, files):
        version = local.publish("alice", files(), base=BASE)
        path = newest_entry(root, version)
        entry = json.loads(path.read_text())
        entry["reason"] = "new"
        entry["versions"][0]["more"] = 1
        path.write_text(json.dumps(entry))
        assert local.resolve("alice") == version

    @pytest.mark.parametrize("make", [False, True])
    def test_reading_makes_nothing(self, local, root, make):
        if make:
            root.mkdir()
        with pytest.raises(AdapterNotFoundError):
            local.resolve("alice")
        assert local.list_users() == ([], None)
        assert local.versions("alice") == []
        with pytest.raises(AdapterNotFoundError):
            local.activate("alice", "x")
        assert root.exists() == make
        assert list(root.rglob("*")) == []

    def test_fetch_dir_is_the_stores_own_folder_and_checked(self, local, root, files):
        version = local.publish("alice", files(), base=BASE)
        folder = local.fetch_dir(version)
        assert folder == user_folder(root, version) / "versions" / version.version
        (folder / "adapter_config.json").write_bytes(b"{}")
        with pytest.raises(IntegrityError, match=r"adapter_config.json has 2 bytes"):
            local.fetch_dir(version)


class TestDamage:
    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            (lambda data: data[:-1], "bytes, published were"),
            (lambda data: data + b"x", "has more than"),
            (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "sha256 differs"),
            (lambda data: b"", "has 0 bytes"),
        ],
    )
    @pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
    def test_a_damaged_file_is_never_handed_out(self, local, files, tmp_path, name, damage, said):
        version = local.publish("alice", files(), base=BASE)
        path = local.fetch_dir(version) / name
        path.write_bytes(damage(path.read_bytes()))
        for call in (
            lambda: local.fetch(version),
            lambda: local.fetch_dir(version),
            lambda: local.export_peft("alice", tmp_path / "out"),
        ):
            with pytest.raises(IntegrityError, match=f"{path} .*{said}"):
                call()
        assert not (tmp_path / "out").exists()

    def test_a_huge_file_in_place_of_a_small_one_is_not_read(self, local, files):
        version = local.publish("alice", files(), base=BASE)
        path = local.fetch_dir(version) / "adapter_model.safetensors"
        os.truncate(path, 10**12)  # sparse
        with pytest.raises(IntegrityError, match="has more than"):
            local.fetch(version)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda entry: b"",
            lambda entry: b"[]",
            lambda entry: json.dumps(entry).encode()[:-20],
            lambda entry: b"\xff" + json.dumps(entry).encode(),
            lambda entry: b'{"a":' * 100_000,
            lambda entry: entry | {"versions": None},
            lambda entry: entry | {"versions": [1]},
            lambda entry: entry | {"versions": entry["versions"] * 2},
            lambda entry: entry | {"active": "20260101T000000Z-000000000000"},
            lambda entry: entry | {"active": 1},
            lambda entry: entry | {"seq": 7},
            lambda entry: entry | {"seq": True},
            lambda entry: entry | {"user_id": "bob"},
            lambda entry: entry | {"user_id": "\ud800"},
            lambda entry: entry | {"user_key": "0" * 64},
            lambda entry: entry | {"updated_at": "yesterday"},
            lambda entry: entry | {"updated_at": "2026-01-01T00:00:00"},
            lambda entry: entry | {"format": 0},
            lambda entry: entry | {"format": None},
            lambda entry: with_version(entry, version="../../../x"),
            lambda entry: with_version(entry, files={"../x": {"sha256": "0", "size": 1}}),
            lambda entry: with_version(entry, files={"a": 1}),
            lambda entry: with_version(entry, base={"weights": 1}),
            lambda entry: with_version(entry, alpha="0.1"),
        ],
    )
    def test_a_damaged_entry_is_an_integrity_error_with_its_path(self, local, root, files, damage):
        version = local.publish("alice", files(), base=BASE)
        path = newest_entry(root, version)
        damaged = damage(json.loads(path.read_text()))
        path.write_bytes(damaged if isinstance(damaged, bytes) else json.dumps(damaged).encode())
        calls = [
            lambda store: store.resolve("alice"),
            lambda store: store.versions("alice"),
            lambda store: store.list_users(),
            lambda store: store.publish("alice", files(2), base=BASE),
            lambda store: store.delete_version("alice", version.version),
        ]
        for call in calls:
            said = f"{path} is damaged: .*; restore it from a backup"
            with pytest.raises(IntegrityError, match=said):
                call(AdapterStore(root))
        assert len(list((user_folder(root, version) / "versions").iterdir())) == 1

    def test_an_entry_that_cannot_be_written_again_stops_the_writer(self, local, root, files):
        version = local.publish("alice", files(), base=BASE)
        path = newest_entry(root, version)
        path.write_text(path.read_text().replace('"metrics": {}', '"metrics": {"nll": 1e999}'))
        with pytest.raises(IntegrityError, match=f"{path} is damaged: it cannot be written again"):
            AdapterStore(root).publish("alice", files(2), base=BASE)

    @pytest.mark.parametrize(
        "content", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "check": 1}', '{"format": "1"}']
    )
    def test_a_damaged_root_file_is_an_integrity_error_with_its_path(
        self, local, root, files, content
    ):
        local.publish("alice", files(), base=BASE)
        (root / "adapter_store.json").write_text(content)
        said = f"{root}/adapter_store.json is not the root file .*restore it"
        for call in (
            local.resolve,
            local.versions,
            lambda user: local.publish(user, files(), base=BASE),
        ):
            with pytest.raises(IntegrityError, match=said):
                call("alice")

    def test_a_changed_pepper_in_the_root_file_is_noticed(self, local, root, files):
        local.publish("alice", files(), base=BASE)
        change_json(root / "adapter_store.json", pepper="00" * 32)
        with pytest.raises(IntegrityError, match="its pepper and its check value differ"):
            local.resolve("alice")

    def test_a_lost_root_file_is_never_replaced_by_a_new_one(self, local, root, files):
        local.publish("alice", files(), base=BASE)
        (root / "adapter_store.json").unlink()
        said = f"{root}/adapter_store.json is missing, but the store has users"
        for call in (local.resolve, lambda user: local.publish(user, files(), base=BASE)):
            with pytest.raises(IntegrityError, match=said):
                call("alice")
        assert not (root / "adapter_store.json").exists()

    def test_a_store_removed_and_made_anew_is_a_new_store(self, local, root, files):
        old = local.publish("alice", files(), base=BASE)
        shutil.rmtree(root)
        with pytest.raises(AdapterNotFoundError):
            local.fetch(old)
        assert local.publish("alice", files(), base=BASE).user_key != old.user_key
        assert AdapterStore(root).resolve("alice") == local.resolve("alice")

    def test_newer_formats_are_refused_by_file(self, local, root, files):
        version = local.publish("alice", files(), base=BASE)
        for path in (newest_entry(root, version), root / "adapter_store.json"):
            change_json(path, format=3)
            said = f"{path}: it has format 3, this release reads up to 2; upgrade"
            with pytest.raises(FormatVersionError, match=said):
                AdapterStore(root).resolve("alice")

    def test_a_store_of_the_first_format_goes_on_in_the_present_one(self, local, root, files):
        first = local.publish("alice", files(1), base=BASE)
        second = local.publish("alice", files(2), base=BASE)
        root_file = root / "adapter_store.json"
        content = json.loads(root_file.read_text())
        root_file.write_text(
            json.dumps({"format": 1, "check": content["check"], "pepper": content["pepper"]})
        )
        added = {"reason", "parent", "previous", "erased_seq", "collected_seq"}
        for path in (user_folder(root, first) / "log").iterdir():
            entry = json.loads(path.read_text()) | {"format": 1}
            path.write_text(json.dumps({name: entry[name] for name in entry.keys() - added}))
        store = AdapterStore(root)
        assert store.fetch(store.resolve("alice")) == files(2)
        assert [change.operation for change in store.history("alice")] == ["publish", "publish"]
        # Those the first format did not keep.
        with pytest.raises(AdapterNotFoundError, match="no earlier active version"):
            store.rollback("alice")
        store.activate("alice", first.version)
        assert json.loads(newest_entry(root, first).read_text())["format"] == 2
        assert store.rollback("alice") == second
        newest_entry(root, first).write_text(json.dumps({"format": 0}))
        with pytest.raises(IntegrityError, match="format is 0"):
            AdapterStore(root).resolve("alice")

    def test_an_entry_with_no_user_lists_no_versions(self, local, root, files):
        version = local.publish("alice", files(), base=BASE)
        change_json(newest_entry(root, version), user_id="")
        with pytest.raises(IntegrityError, match="it lists versions of no user"):
            AdapterStore(root).resolve("alice")


class TestPepper:
    def test_a_given_pepper_opens_the_store_and_is_not_written(self, root, files):
        version = AdapterStore(root, pepper=PEPPER).publish("alice", files(), base=BASE)
        assert AdapterStore(root, pepper=PEPPER).resolve("alice") == version
        for path in root.rglob("*.json"):
            assert PEPPER not in path.read_bytes()
            assert PEPPER.hex() not in path.read_text()

    def test_another_pepper_or_none_is_an_error_and_never_an_empty_store(self, root, files):
        AdapterStore(root, pepper=PEPPER).publish("alice", files(), base=BASE)
        for pepper, said in (
            (PEPPER[::-1], "with another pepper than the one given"),
            (None, "pass that one as pepper="),
        ):
            store = AdapterStore(root, pepper=pepper)
            for call in (
                store.resolve,
                store.versions,
                store.active,
                lambda user, s=store: s.publish(user, files(), base=BASE),
            ):
                message = f"{root}/adapter_store.json was made .*{said}"
                with pytest.raises(KeyMismatchError, match=message):
                    call("alice")
            with pytest.raises(KeyMismatchError):
                store.list_users()

    def test_a_pepper_given_to_a_store_that_has_its_own_is_refused(self, local, root, files):
        local.publish("alice", files(), base=BASE)
        with pytest.raises(KeyMismatchError, match="or none, since it keeps its own"):
            AdapterStore(root, pepper=PEPPER).resolve("alice")

    def test_two_stores_name_one_user_differently(self, tmp_path, files):
        keys = {
            AdapterStore(tmp_path / name).publish("alice", files(), base=BASE).user_key
            for name in "ab"
        }
        assert len(keys) == 2


class TestRefusingDisks:
    def test_a_file_in_place_of_the_store_is_named(self, tmp_path, files):
        (tmp_path / "store").write_text("a file")
        for folder in (tmp_path / "store", tmp_path / "store" / "below"):
            store = AdapterStore(folder)
            said = f"cannot .* {folder}.*: a file stands where a folder is needed"
            for call in (
                store.resolve,
                store.versions,
                lambda user, s=store: s.publish(user, files(), base=BASE),
            ):
                with pytest.raises(BackendError, match=said):
                    call("alice")
        assert (tmp_path / "store").read_text() == "a file"

    def test_without_permission_the_store_stays_readable_and_intact(self, unprivileged, files):
        with unprivileged() as folder:
            store = AdapterStore(folder / "store")
            older = store.publish("alice", files(0), base=BASE)
            version = store.publish("alice", files(1), base=BASE)
            before = all_files(folder)
            closed = [path for path in folder.rglob("*") if path.is_dir()]
            for path in closed:
                path.chmod(0o500)
            said = f"cannot write {folder}/store/.*: permission denied: give this user"
            with pytest.raises(BackendError, match=said):
                store.publish("alice", files(2), base=BASE)
            with pytest.raises(BackendError, match="permission denied"):
                store.activate("alice", older.version)
            assert store.fetch(store.resolve("alice")) == files(1)
            with pytest.raises(BackendError, match="permission denied"):
                store.delete_version("alice", version.version)
            for path in closed:
                path.chmod(0o700)
            assert all_files(folder) == before
            store.publish("alice", files(2), base=BASE)

    def test_without_permission_to_make_or_read_a_store_it_says_where(self, unprivileged, files):
        with unprivileged() as folder:
            folder.chmod(0o500)
            for call in (
                AdapterStore.prepare,
                lambda store, user: store.publish(user, files(), base=BASE),
            ):
                said = f"cannot write {folder}/new/.*permission denied"
                with pytest.raises(BackendError, match=said):
                    call(AdapterStore(folder / "new"), "alice")
            store = AdapterStore(MemoryBackend())
            store.publish("alice", files(), base=BASE)
            said = f"cannot write an adapter to {folder}/out .*Permission denied"
            with pytest.raises(BackendError, match=said):
                store.export_peft("alice", folder / "out")
            folder.chmod(0o000)
            with pytest.raises(BackendError, match=f"cannot read {folder}/new/.*permission denied"):
                AdapterStore(folder / "new").resolve("alice")
            folder.chmod(0o700)

    def test_a_version_with_files_that_cannot_be_removed_is_named(self, unprivileged, files):
        with unprivileged() as folder:
            store = AdapterStore(folder / "store")
            version = store.publish("alice", files(), base=BASE)
            store.fetch_dir(version).chmod(0o500)
            said = f"{version.version} of user 'alice' is no longer listed, but its files"
            with pytest.raises(BackendError, match=said):
                store.delete_version("alice", version.version)
            assert store.versions("alice") == []

    def test_a_full_disk_in_mid_publish_leaves_the_store_as_it_was(self, local, root, files):
        version = local.publish("alice", files(1), base=BASE)
        before = all_files(root)
        with (
            files_at_most(20_000),
            pytest.raises(BackendError, match=f"cannot write {root}/.*raise the limit"),
        ):
            local.publish("alice", files(2, num_values=100_000), base=BASE)
        # The data fits, the entry does not: the last step fails.
        with files_at_most(20_000), pytest.raises(BackendError, match=r"log/000000000002\.json: "):
            local.publish("alice", files(2), base=BASE, metadata={"long": "x" * 30_000})
        assert all_files(root) == before
        assert local.versions("alice") == [version]
        local.publish("alice", files(2, num_values=100_000), base=BASE)


@contextlib.contextmanager
def files_at_most(num_bytes):
    """Let writes beyond that size fail half-way, as they do on a full disk, for root too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
