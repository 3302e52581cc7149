"""Whole users out and in again: one file a user, imported whole or not at all."""

import contextlib
import copy
import json
from datetime import timedelta

import pytest
from archives import changed_manifest, manifest_of, members, rewrite

from adapter_store import (
    AdapterNotFoundError,
    AdapterStore,
    AdapterStoreError,
    BackendError,
    IntegrityError,
    InvalidAdapterError,
    Limits,
    MemoryBackend,
    PublishConflictError,
    UserErasedError,
    layout,
)
from adapter_store.conformance import make_adapter
from adapter_store.operations import importing

BASE = {"weights": "w"}


class TestExport:
    def test_an_archive_is_a_plain_tar_with_peft_folders(self, archive, local):
        names = [member.name for member, _ in members(archive)]
        versions = [version.version for version in local.versions("alice")]
        expected = ["manifest.json"]
        for version in versions:
            expected.append(f"versions/{version}/adapter_model.safetensors")
            expected.append(f"versions/{version}/adapter_config.json")
        assert names == expected
        assert manifest_of(members(archive))["user_id"] == "alice"
        assert archive.stat().st_mode & 0o777 == 0o600

    def test_a_file_that_is_there_is_never_written_over(self, archive, local):
        before = archive.read_bytes()
        with pytest.raises(BackendError, match=r"alice.tar is there already: name a new file"):
            local.export_user("alice", archive)
        assert archive.read_bytes() == before
        assert list(archive.parent.glob(".*")) == []

    def test_an_unknown_user_and_a_damaged_one_export_nothing(self, local, archive, tmp_path):
        with pytest.raises(AdapterNotFoundError, match="user 'bob' has no adapter"):
            local.export_user("bob", tmp_path / "bob.tar")
        next((tmp_path / "store").rglob("adapter_config.json")).write_bytes(b"{}")
        with pytest.raises(AdapterStoreError):
            local.export_user("alice", tmp_path / "again.tar")
        assert not (tmp_path / "bob.tar").exists()
        assert not (tmp_path / "again.tar").exists()

    def test_an_export_that_cannot_be_written_says_where(self, local, tmp_path):
        local.publish("alice", make_adapter(0), base=BASE)
        (tmp_path / "plain").write_bytes(b"")
        with pytest.raises(BackendError, match=r"cannot write an archive to .*alice\.tar"):
            local.export_user("alice", tmp_path / "plain" / "alice.tar")

    def test_a_version_deleted_during_an_export_is_left_out(
        self, local, root, tmp_path, monkeypatch
    ):
        first = local.publish("alice", make_adapter(0), base=BASE)
        second = local.publish("alice", make_adapter(1), base=BASE)
        fetch = local.fetch

        def fetch_late(version):
            if version == second:
                AdapterStore(root).delete_version("alice", second.version)
            return fetch(version)

        monkeypatch.setattr(local, "fetch", fetch_late)
        rows = members(local.export_user("alice", tmp_path / "alice.tar"))
        assert manifest_of(rows)["active"] is None
        assert [member.name.split("/")[1] for member, _ in rows[1:]] == [first.version] * 2

    def test_a_missing_file_stops_an_export(self, local, root, tmp_path):
        version = local.publish("alice", make_adapter(0), base=BASE)
        folder = root / layout.version_folder(version.user_key, version.version)
        (folder / layout.CONFIG).unlink()
        with pytest.raises(IntegrityError, match=r"adapter_config\.json is missing"):
            local.export_user("alice", tmp_path / "alice.tar")
        assert [path.name for path in tmp_path.iterdir() if "alice" in path.name] == []

    def test_an_export_with_versions_that_always_go_says_so(self, local, tmp_path, monkeypatch):
        def fetch_too_late(version):
            raise AdapterNotFoundError

        local.publish("alice", make_adapter(0), base=BASE)
        monkeypatch.setattr(local, "fetch", fetch_too_late)
        said = "deleted each of 10 times that it was exported"
        with pytest.raises(PublishConflictError, match=said):
            local.export_user("alice", tmp_path / "alice.tar")


class TestImport:
    def test_what_was_deleted_comes_back_before_what_is_there(self, local, archive, files):
        first, second = local.versions("alice")
        local.delete_version("alice", first.version)
        third = local.publish("alice", files(7), base=BASE)
        head = local.import_user(archive)
        expected = (first, second, third)
        assert [v.digest for v in head.versions] == [v.digest for v in expected]
        assert [v.version for v in head.versions[1:]] == [second.version, third.version]
        assert head.active == third.version
        assert head.operation == "import"
        assert local.fetch(head.versions[0]) == make_adapter(0)

    def test_another_stores_archive_does_not_bring_an_erased_user_back(self, archive, other, files):
        other.import_user(archive)
        other.erase_user("alice")
        said = r"was erased in this store.* nothing was imported"
        with pytest.raises(UserErasedError, match=said):
            other.import_user(archive)
        assert other.active("alice") is None
        assert list(other.history("alice"))[-1].operation == "erase"
        since = other.publish("alice", files(7), base=BASE)
        with pytest.raises(UserErasedError):
            other.import_user(archive)
        assert other.versions("alice") == [since]

    def test_a_version_that_went_round_by_another_store_is_known_again(
        self, local, archive, other, tmp_path, files
    ):
        other.import_user(archive)
        other.publish("alice", files(7), base=BASE, idempotency_key="job")
        back = other.export_user("alice", tmp_path / "back.tar")
        before = local.versions("alice")
        head = local.import_user(back)
        assert [v.version for v in head.versions[1:]] == [v.version for v in before]
        assert head.versions[0].idempotency_key == "job"
        repeated = local.publish("alice", files(7), base=BASE, idempotency_key="job")
        assert repeated == head.versions[0]
        assert local.import_user(back) == head
        assert other.import_user(local.export_user("alice", tmp_path / "again.tar")).seq == 2

    def test_an_import_that_fails_leaves_no_file(self, archive, monkeypatch):
        backend = MemoryBackend()
        put = backend.put_if_absent

        def failing(key, data):
            if "/log/" in key:
                raise KeyboardInterrupt
            put(key, data)

        store = AdapterStore(backend)
        monkeypatch.setattr(backend, "put_if_absent", failing)
        with pytest.raises(KeyboardInterrupt):
            store.import_user(archive)
        assert store.verify().orphans == 2  # the entry may land yet, and would need them
        monkeypatch.undo()
        store.gc(grace=timedelta(0))
        assert store.verify().orphans == 0
        assert len(store.import_user(archive).versions) == 2

    @pytest.mark.parametrize("remover", ["delete", "gc", "erase"])
    def test_an_import_beside_a_removal_keeps_what_it_brings(
        self, archive, tmp_path, remover, monkeypatch
    ):
        backend = MemoryBackend()
        mine, theirs = AdapterStore(backend), AdapterStore(backend)
        mine.import_user(archive)
        own = mine.export_user("alice", tmp_path / "own.tar")
        first = mine.versions("alice")[0]
        if remover == "gc":  # files of an import that was killed before its entry
            files = mine.fetch(first)
            mine.delete_version("alice", first.version)
            folder = layout.version_folder(first.user_key, first.version)
            for name, data in files.items():
                backend.put_if_absent(f"{folder}/{name}", data)
        removed = []
        delete = backend.delete

        def import_first(key):
            if "/versions/" in key and not removed:
                removed.append(key)
                with contextlib.suppress(UserErasedError):
                    mine.import_user(own)
            delete(key)

        remove = {
            "delete": lambda: theirs.delete_version("alice", first.version),
            "gc": lambda: theirs.gc(grace=timedelta(0)),
            "erase": lambda: theirs.erase_user("alice"),
        }[remover]
        with monkeypatch.context() as patched:
            patched.setattr(backend, "delete", import_first)
            remove()
        assert removed
        assert mine.verify().ok
        assert len(mine.versions("alice")) == (0 if remover == "erase" else 2)
        for version in mine.versions("alice"):
            assert mine.fetch(version) == make_adapter(int(version.metrics["nll"]))

    def test_no_more_versions_than_the_limit_are_kept(self, archive, tmp_path, local):
        small = AdapterStore(tmp_path / "small", limits=Limits(live_versions=1))
        head = small.import_user(archive)
        assert [version.digest for version in head.versions] == [local.versions("alice")[1].digest]
        assert len(list((tmp_path / "small").rglob("*.safetensors"))) == 1
        assert small.import_user(archive) == head

    def test_what_is_beyond_the_limit_is_not_even_written(self, archive, monkeypatch):
        backend = MemoryBackend()
        store = AdapterStore(backend, limits=Limits(live_versions=1))
        version = store.publish("alice", make_adapter(7), base=BASE)
        put, written = backend.put_if_absent, []

        def note(key, data):
            written.append(key)
            put(key, data)

        monkeypatch.setattr(backend, "put_if_absent", note)
        assert store.import_user(archive).versions == (version,)
        assert not [key for key in written if key.startswith("users/")]

    def test_an_import_writes_its_files_again_where_they_are_collected(self, archive, monkeypatch):
        backend = MemoryBackend()
        store, put, times = AdapterStore(backend), backend.put_if_absent, []

        def collected(key, data):
            if "/log/" in key and len(times) < 2:
                times.append(key)
                AdapterStore(backend).gc(grace=timedelta(0))
            put(key, data)

        monkeypatch.setattr(backend, "put_if_absent", collected)
        head = store.import_user(archive)
        assert len(times) == 2
        fetched = [store.fetch(version) for version in head.versions]
        assert fetched == [make_adapter(0), make_adapter(1)]
        assert store.verify().orphans == 0

    def test_a_file_that_is_written_anew_while_it_is_read_is_refused(
        self, archive, other, tmp_path, monkeypatch
    ):
        source = AdapterStore(tmp_path / "source")
        source.publish("alice", make_adapter(9), base=BASE)
        another = source.export_user("alice", tmp_path / "another.tar").read_bytes()
        read = importing.read_archive

        def written_anew(*arguments):
            with archive.open("r+b") as file:
                file.write(another)
            return read(*arguments)

        monkeypatch.setattr(importing, "read_archive", written_anew)
        said = "was changed while it was read: nothing was imported"
        with pytest.raises(InvalidAdapterError, match=said):
            other.import_user(archive)
        assert other.versions("alice") == []

    def test_an_import_into_a_restored_store_is_fenced_by_its_log(self, tmp_path, monkeypatch):
        """The archive is from further on in the log than the restored one is.

        An erasure meanwhile still counts.
        """
        backend = MemoryBackend()
        store = AdapterStore(backend)
        store.publish("alice", make_adapter(1), base=BASE)
        backup = copy.deepcopy(backend._tree)
        for number in range(2, 8):
            store.publish("alice", make_adapter(number), base=BASE)
        archive = store.export_user("alice", tmp_path / "alice.tar")
        backend._tree = backup
        put, erased = backend.put_if_absent, []

        def erase_first(key, data):
            if "/log/" in key and not erased:
                erased.append(key)
                AdapterStore(backend).erase_user("alice")
            put(key, data)

        monkeypatch.setattr(backend, "put_if_absent", erase_first)
        with pytest.raises(UserErasedError):
            AdapterStore(backend).import_user(archive)
        assert AdapterStore(backend).versions("alice") == []
        assert AdapterStore(backend).verify().ok

    def test_a_changed_manifest_does_not_pass_for_this_stores(self, local, archive):
        local.erase_user("alice")
        rewrite(archive, changed_manifest(members(archive), seq=10**6))
        with pytest.raises(UserErasedError, match="which this store did not write, may be older"):
            local.import_user(archive)

    def test_an_archive_without_a_proof_is_taken_for_one_of_another_store(self, local, archive):
        rows = members(archive)
        content = manifest_of(rows)
        del content["proof"]
        rewrite(archive, [(rows[0][0], json.dumps(content).encode()), *rows[1:]])
        assert local.import_user(archive).seq == 2  # all of it is there
        local.erase_user("alice")
        local.publish("alice", make_adapter(7), base=BASE)
        with pytest.raises(UserErasedError, match="which this store did not write"):
            local.import_user(archive)


class TestAllUsers:
    def test_all_users_go_out_and_in_and_on_after_an_interruption(self, local, tmp_path, other):
        for number in range(5):
            local.publish(f"user/{number}", make_adapter(number), base=BASE)

        def stop(count):
            if count == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            local.export_users(tmp_path / "out", on_user=stop)
        assert len(list((tmp_path / "out").iterdir())) == 2
        assert local.export_users(tmp_path / "out") == 3
        counts = []
        assert other.import_users(tmp_path / "out", on_user=counts.append) == 5
        assert counts == [1, 2, 3, 4, 5]
        assert other.import_users(tmp_path / "out") == 5
        for number in range(5):
            assert other.fetch(other.resolve(f"user/{number}")) == make_adapter(number)
            assert len(other.versions(f"user/{number}")) == 1

    def test_a_user_who_cannot_be_read_stops_no_other(self, local, root, tmp_path, other):
        for number in range(4):
            local.publish(f"user {number}", make_adapter(number), base=BASE)
        user_key = local.resolve("user 1").user_key
        (root / layout.entry_key(user_key, 1)).write_bytes(b"damaged")
        for call in (local.list_users, lambda: local.export_users(tmp_path / "out")):
            with pytest.raises(IntegrityError, match=user_key):
                call()
        problems = []
        heads, _ = local.list_users(on_problem=problems.append)
        assert sorted(head.user_id for head in heads) == ["user 0", "user 2", "user 3"]
        assert len(problems) == 1
        local.export_users(tmp_path / "out", on_problem=problems.append)
        assert len(list((tmp_path / "out").iterdir())) == 3
        assert [type(problem) for problem in problems] == [IntegrityError, IntegrityError]
        other.erase_user("user 0")
        (tmp_path / "out" / "0.tar").write_bytes(b"no archive")
        problems.clear()
        assert other.import_users(tmp_path / "out", on_problem=problems.append) == 2
        assert {type(problem) for problem in problems} == {InvalidAdapterError, UserErasedError}
        with pytest.raises(InvalidAdapterError):
            other.import_users(tmp_path / "out")

    def test_a_user_erased_while_others_are_exported_is_not_a_problem(self, local, tmp_path):
        for number in range(3):
            local.publish(f"user {number}", make_adapter(number), base=BASE)
        last = local.list_users()[0][-1].user_id

        def erase(count):
            AdapterStore(tmp_path / "store").erase_user(last)

        assert local.export_users(tmp_path / "out", on_user=erase) == 2

    def test_a_folder_that_cannot_be_written_stops_an_export_at_once(self, local, tmp_path):
        local.publish("alice", make_adapter(1), base=BASE)
        (tmp_path / "file").write_bytes(b"in the way")
        problems = []
        for name in ("file", "file/out"):
            with pytest.raises(BackendError, match=r"is not a folder|cannot write an archive"):
                local.export_users(tmp_path / name, on_problem=problems.append)
        assert problems == []


def test_a_peft_folder_is_imported_with_what_is_known_of_it(local, peft_folder, files):
    version = local.import_peft("alice", peft_folder, base=BASE, alpha=0.2)
    assert local.fetch(version) == files()
    assert version.alpha == 0.2
    assert local.history("alice")[0].reason == "imported from a peft folder"
    with pytest.raises(InvalidAdapterError, match="there is no adapter_model"):
        local.import_peft("alice", peft_folder.parent / "none", base=BASE)
