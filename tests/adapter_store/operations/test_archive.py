"""Whole users in and out: archives that are ours, and archives that somebody else made to harm."""

import contextlib
import copy
import gzip
import io
import json
import tarfile
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_store import (
    AdapterNotFoundError,
    AdapterStore,
    AdapterStoreError,
    BackendError,
    FormatVersionError,
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


@pytest.fixture
def archive(local, tmp_path):
    for number in range(2):
        local.publish("alice", make_adapter(number), base=BASE, metrics={"nll": number})
    return local.export_user("alice", tmp_path / "alice.tar")


@pytest.fixture
def other(tmp_path):
    return AdapterStore(tmp_path / "other")


def members(path):
    with tarfile.open(path) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]


def rewrite(path, rows):
    with tarfile.open(path, "w") as tar:
        for member, data in rows:
            if data is not None and member.isreg():
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data or b""))


def changed_manifest(rows, **changes):
    (member, data), *rest = rows
    return [(member, json.dumps({**json.loads(data), **changes}).encode()), *rest]


def changed_version(rows, **changes):
    first, *others = json.loads(rows[0][1])["versions"]
    return changed_manifest(rows, versions=[{**first, **changes}, *others])


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return (member, None)


class TestArchives:
    def test_it_is_a_plain_tar_with_peft_folders(self, archive, tmp_path, local):
        names = [member.name for member, _ in members(archive)]
        versions = [version.version for version in local.versions("alice")]
        assert names == ["manifest.json"] + [
            f"versions/{version}/{name}"
            for version in versions
            for name in ("adapter_model.safetensors", "adapter_config.json")
        ]
        assert json.loads(members(archive)[0][1])["user_id"] == "alice"
        assert archive.stat().st_mode & 0o777 == 0o600

    def test_a_file_that_is_there_is_never_written_over(self, archive, local):
        before = archive.read_bytes()
        with pytest.raises(BackendError, match=r"alice.tar is there already: name a new file"):
            local.export_user("alice", archive)
        assert archive.read_bytes() == before
        assert [path.name for path in archive.parent.iterdir() if path.name.startswith(".")] == []

    def test_a_user_who_is_not_there_and_a_damaged_one_export_nothing(
        self, local, archive, tmp_path
    ):
        with pytest.raises(AdapterNotFoundError, match="user 'bob' has no adapter"):
            local.export_user("bob", tmp_path / "bob.tar")
        next((tmp_path / "store").rglob("adapter_config.json")).write_bytes(b"{}")
        with pytest.raises(AdapterStoreError):
            local.export_user("alice", tmp_path / "again.tar")
        assert not (tmp_path / "bob.tar").exists()
        assert not (tmp_path / "again.tar").exists()

    def test_an_export_tells_a_missing_file_and_a_deleted_version_from_a_place_that_cannot_be_written(
        self, local, tmp_path, monkeypatch
    ):
        first = local.publish("alice", make_adapter(0), base=BASE)
        second = local.publish("alice", make_adapter(1), base=BASE)
        (tmp_path / "plain").write_bytes(b"")
        with pytest.raises(BackendError, match=r"cannot write an archive to .*alice\.tar"):
            local.export_user("alice", tmp_path / "plain" / "alice.tar")
        fetch = local.fetch

        def fetch_late(version):
            if version == second:
                AdapterStore(tmp_path / "store").delete_version("alice", second.version)
            return fetch(version)

        with monkeypatch.context() as patched:
            patched.setattr(local, "fetch", fetch_late)
            local.export_user("alice", tmp_path / "first.tar")
        assert json.loads(members(tmp_path / "first.tar")[0][1])["active"] is None
        assert [member.name.split("/")[1] for member, _ in members(tmp_path / "first.tar")[1:]] == [
            first.version
        ] * 2
        (
            tmp_path
            / "store"
            / layout.version_folder(first.user_key, first.version)
            / layout.CONFIG
        ).unlink()
        with pytest.raises(IntegrityError, match=r"adapter_config\.json is missing"):
            local.export_user("alice", tmp_path / "alice.tar")
        assert [path.name for path in tmp_path.iterdir() if "alice" in path.name] == []

    def test_what_was_deleted_comes_back_before_what_is_there(self, local, archive, files):
        first, second = local.versions("alice")
        local.delete_version("alice", first.version)
        third = local.publish("alice", files(7), base=BASE)
        head = local.import_user(archive)
        assert [version.digest for version in head.versions] == [
            first.digest,
            second.digest,
            third.digest,
        ]
        assert [version.version for version in head.versions[1:]] == [second.version, third.version]
        assert head.active == third.version
        assert head.operation == "import"
        assert local.fetch(head.versions[0]) == make_adapter(0)

    def test_an_archive_of_another_store_does_not_bring_an_erased_user_back(
        self, archive, other, files
    ):
        other.import_user(archive)
        other.erase_user("alice")
        with pytest.raises(
            UserErasedError, match=r"was erased in this store.* nothing was imported"
        ):
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
        assert [version.version for version in head.versions[1:]] == [
            version.version for version in before
        ]
        assert head.versions[0].idempotency_key == "job"
        assert (
            local.publish("alice", files(7), base=BASE, idempotency_key="job") == head.versions[0]
        )
        assert local.import_user(back) == head
        assert other.import_user(local.export_user("alice", tmp_path / "again.tar")).seq == 2

    def test_an_export_whose_versions_always_go_says_so(self, local, tmp_path, monkeypatch):
        def fetch_too_late(version):
            raise AdapterNotFoundError

        local.publish("alice", make_adapter(0), base=BASE)
        monkeypatch.setattr(local, "fetch", fetch_too_late)
        with pytest.raises(
            PublishConflictError, match="deleted each of 10 times that it was exported"
        ):
            local.export_user("alice", tmp_path / "alice.tar")

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
    def test_an_import_while_somebody_removes_the_same_versions_keeps_what_it_brings(
        self, archive, tmp_path, remover, monkeypatch
    ):
        backend = MemoryBackend()
        mine, theirs = AdapterStore(backend), AdapterStore(backend)
        mine.import_user(archive)
        own = mine.export_user("alice", tmp_path / "own.tar")
        first = mine.versions("alice")[0]
        if remover == "gc":  # files that an import left which was killed before its entry
            files = mine.fetch(first)
            mine.delete_version("alice", first.version)
            for name, data in files.items():
                backend.put_if_absent(
                    f"{layout.version_folder(first.user_key, first.version)}/{name}", data
                )
        removed = []
        delete = backend.delete

        def import_first(key):
            if "/versions/" in key and not removed:
                removed.append(key)
                with contextlib.suppress(UserErasedError):
                    mine.import_user(own)
            delete(key)

        monkeypatch.setattr(backend, "delete", import_first)
        {
            "delete": lambda: theirs.delete_version("alice", first.version),
            "gc": lambda: theirs.gc(grace=timedelta(0)),
            "erase": lambda: theirs.erase_user("alice"),
        }[remover]()
        assert removed
        monkeypatch.undo()
        assert mine.verify().ok
        assert len(mine.versions("alice")) == (0 if remover == "erase" else 2)
        for version in mine.versions("alice"):
            assert mine.fetch(version) == make_adapter(int(version.metrics["nll"]))

    def test_no_more_than_the_limit_is_kept(self, archive, tmp_path, local):
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
        monkeypatch.setattr(
            backend, "put_if_absent", lambda key, data: (written.append(key), put(key, data))
        )
        assert store.import_user(archive).versions == (version,)
        assert not [key for key in written if key.startswith("users/")]

    def test_an_import_in_whose_middle_garbage_is_collected_writes_its_files_again(
        self, archive, monkeypatch
    ):
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
        assert [store.fetch(version) for version in head.versions] == [
            make_adapter(0),
            make_adapter(1),
        ]
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
        with pytest.raises(
            InvalidAdapterError, match="was changed while it was read: nothing was imported"
        ):
            other.import_user(archive)
        assert other.versions("alice") == []

    def test_an_import_into_a_store_that_was_restored_is_fenced_by_its_own_log(
        self, tmp_path, monkeypatch
    ):
        """The archive is from further on in the log than the restored one is: an erasure meanwhile still counts."""
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

    def test_a_manifest_that_was_changed_does_not_pass_for_one_of_this_store(self, local, archive):
        local.erase_user("alice")
        rewrite(archive, changed_manifest(members(archive), seq=10**6))
        with pytest.raises(UserErasedError, match="which this store did not write, may be older"):
            local.import_user(archive)

    def test_an_archive_without_a_proof_is_taken_for_one_of_another_store(self, local, archive):
        (member, data), *rest = members(archive)
        content = json.loads(data)
        del content["proof"]
        rewrite(archive, [(member, json.dumps(content).encode()), *rest])
        assert local.import_user(archive).seq == 2  # all of it is there
        local.erase_user("alice")
        local.publish("alice", make_adapter(7), base=BASE)
        with pytest.raises(UserErasedError, match="which this store did not write"):
            local.import_user(archive)

    def test_all_users_out_and_in_and_on_where_it_was_interrupted(self, local, tmp_path, other):
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

    def test_one_user_who_cannot_be_read_stops_nobody_else(self, local, tmp_path, other):
        for number in range(4):
            local.publish(f"user {number}", make_adapter(number), base=BASE)
        user_key = local.resolve("user 1").user_key
        (tmp_path / "store" / layout.entry_key(user_key, 1)).write_bytes(b"damaged")
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

    def test_a_user_who_is_erased_while_others_are_exported_is_no_problem(self, local, tmp_path):
        for number in range(3):
            local.publish(f"user {number}", make_adapter(number), base=BASE)
        last = local.list_users()[0][-1].user_id

        def erase(count):
            AdapterStore(tmp_path / "store").erase_user(last)

        assert local.export_users(tmp_path / "out", on_user=erase) == 2

    def test_a_place_that_cannot_be_written_stops_an_export_at_once(self, local, tmp_path):
        local.publish("alice", make_adapter(1), base=BASE)
        (tmp_path / "file").write_bytes(b"in the way")
        problems = []
        for place in ("file", "file/out"):
            with pytest.raises(BackendError, match=r"is not a folder|cannot write an archive"):
                local.export_users(tmp_path / place, on_problem=problems.append)
        assert problems == []

    def test_a_peft_folder_is_imported_with_what_is_known_of_it(self, local, peft_folder, files):
        version = local.import_peft("alice", peft_folder, base=BASE, alpha=0.2)
        assert local.fetch(version) == files()
        assert (version.alpha, local.history("alice")[0].reason) == (
            0.2,
            "imported from a peft folder",
        )
        with pytest.raises(InvalidAdapterError, match="there is no adapter_model"):
            local.import_peft("alice", peft_folder.parent / "none", base=BASE)


HOSTILE = {
    "a symbolic link": lambda rows: [
        rows[0],
        special(rows[1][0].name, tarfile.SYMTYPE, "/etc/passwd"),
        *rows[2:],
    ],
    "a hard link": lambda rows: [
        rows[0],
        special(rows[1][0].name, tarfile.LNKTYPE, "manifest.json"),
        *rows[2:],
    ],
    "a device": lambda rows: [rows[0], special(rows[1][0].name, tarfile.CHRTYPE), *rows[2:]],
    "a pipe": lambda rows: [rows[0], special(rows[1][0].name, tarfile.FIFOTYPE), *rows[2:]],
    "a folder": lambda rows: [rows[0], special(rows[1][0].name, tarfile.DIRTYPE), *rows[2:]],
    "an absolute path": lambda rows: [*rows, (tarfile.TarInfo("/tmp/evil"), b"x")],
    "a path upwards": lambda rows: [rows[0], (tarfile.TarInfo("../evil"), b"x"), *rows[1:]],
    "something more": lambda rows: [*rows, (tarfile.TarInfo("more.json"), b"x")],
    "something twice": lambda rows: [*rows, rows[1]],
    "something missing": lambda rows: rows[:-1],
    "another order": lambda rows: [rows[0], rows[2], rows[1], *rows[3:]],
    "no manifest": lambda rows: rows[1:],
    "a manifest that is a list": lambda rows: [(rows[0][0], b"[]"), *rows[1:]],
    "a manifest cut short": lambda rows: [(rows[0][0], rows[0][1][:-9]), *rows[1:]],
    "a user that cannot be": lambda rows: changed_manifest(rows, user_id="a\0b"),
    "no user": lambda rows: changed_manifest(rows, user_id=None),
    "no place in the log": lambda rows: changed_manifest(rows, seq="1"),
    "versions of another kind": lambda rows: changed_manifest(rows, versions=[1]),
    "a version twice": lambda rows: changed_manifest(
        rows, versions=json.loads(rows[0][1])["versions"] * 2
    ),
    "a version that leads out": lambda rows: changed_manifest(
        rows, versions=[{**json.loads(rows[0][1])["versions"][0], "version": "../../x"}]
    ),
    "metadata beyond the limit": lambda rows: changed_version(
        rows, metadata={"x": "a" * 1_000_000}
    ),
    "a base beyond the limit": lambda rows: changed_version(rows, base={"x": "a" * 1_000_000}),
    "an alpha below zero": lambda rows: changed_version(rows, alpha=-5.0),
    "a tau above one": lambda rows: changed_version(rows, tau=7.0),
    "an empty idempotency key": lambda rows: changed_version(rows, idempotency_key=""),
    "a long idempotency key": lambda rows: changed_version(rows, idempotency_key="k" * 1000),
    "a long name of its store": lambda rows: changed_manifest(rows, store="s" * 1000),
    "metrics without bounds": lambda rows: [
        (rows[0][0], rows[0][1].replace(b'"nll": 0', b'"nll": 1e999')),
        *rows[1:],
    ],
    "other bytes than announced": lambda rows: [
        rows[0],
        (rows[1][0], rows[1][1][:-1] + b"!"),
        *rows[2:],
    ],
    "fewer bytes than announced": lambda rows: [rows[0], (rows[1][0], rows[1][1][:-1]), *rows[2:]],
    "weights that are a pickle": lambda rows: [
        rows[0],
        (rows[1][0], b"\x80\x04" + rows[1][1][2:]),
        *rows[2:],
    ],
}


class TestHostileArchives:
    @pytest.mark.parametrize("kind", HOSTILE)
    def test_it_is_refused_and_nothing_is_stored_or_unpacked(self, archive, other, tmp_path, kind):
        rewrite(archive, HOSTILE[kind](members(archive)))
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InvalidAdapterError, match=r"alice\.tar|adapter_model") as caught:
            other.import_user(archive)
        assert len(str(caught.value)) < 700
        assert other.versions("alice") == []
        written = {path.name for path in tmp_path.rglob("*") if path.is_file()} - {
            path.name for path in before
        }
        assert written <= {"adapter_store.json"}

    def test_an_archive_that_was_cut_anywhere_is_refused(self, archive, other):
        data = archive.read_bytes()
        end = len(data.rstrip(b"\0"))
        for size in [*range(0, end, 211), end - 1]:
            archive.write_bytes(data[:size])
            with pytest.raises(InvalidAdapterError, match=r"alice\.tar"):
                other.import_user(archive)
        assert other.versions("alice") == []

    def test_a_newer_archive_is_refused_saying_so(self, archive, other):
        rewrite(archive, changed_manifest(members(archive), format=99))
        with pytest.raises(
            FormatVersionError, match=r"cannot import .*alice.tar: it has format 99"
        ):
            other.import_user(archive)

    def test_what_is_no_tar_is_refused(self, archive, other, tmp_path):
        gzipped = tmp_path / "alice.tar.gz"
        gzipped.write_bytes(gzip.compress(archive.read_bytes()))
        (tmp_path / "empty").write_bytes(b"")
        (tmp_path / "text").write_text("hello " * 1000)
        for path in (gzipped, tmp_path / "empty", tmp_path / "text", tmp_path / "none", tmp_path):
            with pytest.raises(InvalidAdapterError):
                other.import_user(path)

    @pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
    def test_a_header_that_claims_to_be_huge_is_not_read(self, other, tmp_path, kind):
        header = tarfile.TarInfo("././@LongLink")
        header.type, header.size = kind, 6 * 1024**3
        path = tmp_path / "alice.tar"
        with path.open("wb") as file:
            file.write(header.tobuf(tarfile.GNU_FORMAT))
            file.truncate(7 * 1024**3)  # sparse
        with pytest.raises(InvalidAdapterError, match=r"alice\.tar|impossible length"):
            other.import_user(path)

    def test_a_thousand_headers_of_headers_are_no_crash(self, other, tmp_path):
        header = tarfile.TarInfo("././@LongLink")
        header.type, header.size = tarfile.GNUTYPE_LONGNAME, 4
        path = tmp_path / "alice.tar"
        path.write_bytes((header.tobuf(tarfile.GNU_FORMAT) + b"name".ljust(512, b"\0")) * 5000)
        with pytest.raises(InvalidAdapterError):
            other.import_user(path)

    def test_files_beyond_the_limits_are_refused(self, archive, tmp_path):
        small = AdapterStore(tmp_path / "small", limits=Limits(weights_bytes=50))
        with pytest.raises(InvalidAdapterError, match=r"expected are .* and at most 50"):
            small.import_user(archive)


def _archive_bytes():
    with tempfile.TemporaryDirectory() as folder:
        store = AdapterStore("memory://fuzz")
        store.publish("alice", make_adapter(1, 64), base=BASE)
        return store.export_user("alice", Path(folder) / "alice.tar").read_bytes()


GOOD = _archive_bytes()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=12)),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 3 * 512),
)
def test_a_changed_archive_is_refused_or_imported_whole(changes, num_cut):
    data = bytearray(GOOD)
    for position, content in changes:
        data[position : position + len(content)] = content
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "archive.tar"
        path.write_bytes(bytes(data[: len(data) - num_cut]))
        store = AdapterStore(f"memory://{folder}")
        try:
            head = store.import_user(path)
        except AdapterStoreError:
            assert store.list_users() == ([], None)
            return
        for version in head.versions:
            store.fetch(version)
