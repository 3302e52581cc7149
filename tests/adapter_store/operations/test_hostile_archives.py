"""Archives that were made to harm, or damaged: refused, and nothing is stored."""

import gzip
import tarfile
import tempfile
from pathlib import Path

import pytest
from archives import changed_manifest, manifest_of, members, rewrite
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_store import (
    AdapterStore,
    AdapterStoreError,
    FormatVersionError,
    InvalidAdapterError,
    Limits,
)
from adapter_store.conformance import make_adapter

BASE = {"weights": "w"}


def changed_version(rows, **changes):
    first, *others = manifest_of(rows)["versions"]
    return changed_manifest(rows, versions=[{**first, **changes}, *others])


def special(kind, target=""):
    """Return a change of the first version's weights into a member of another kind."""

    def change(rows):
        member = tarfile.TarInfo(rows[1][0].name)
        member.type, member.linkname = kind, target
        return [rows[0], (member, None), *rows[2:]]

    return change


def weights(change):
    """Return a change of the content of the first version's weights."""
    return lambda rows: [rows[0], (rows[1][0], change(rows[1][1])), *rows[2:]]


def manifest(change):
    """Return a change of the manifest's bytes."""
    return lambda rows: [(rows[0][0], change(rows[0][1])), *rows[1:]]


def added(name):
    """Return the addition of a member at the end."""
    return lambda rows: [*rows, (tarfile.TarInfo(name), b"x")]


HOSTILE = {
    "a symbolic link": special(tarfile.SYMTYPE, "/etc/passwd"),
    "a hard link": special(tarfile.LNKTYPE, "manifest.json"),
    "a device": special(tarfile.CHRTYPE),
    "a pipe": special(tarfile.FIFOTYPE),
    "a folder": special(tarfile.DIRTYPE),
    "an absolute path": added("/tmp/evil"),
    "a path upwards": lambda rows: [rows[0], (tarfile.TarInfo("../evil"), b"x"), *rows[1:]],
    "something more": added("more.json"),
    "something twice": lambda rows: [*rows, rows[1]],
    "something missing": lambda rows: rows[:-1],
    "another order": lambda rows: [rows[0], rows[2], rows[1], *rows[3:]],
    "no manifest": lambda rows: rows[1:],
    "a manifest that is a list": manifest(lambda data: b"[]"),
    "a manifest cut short": manifest(lambda data: data[:-9]),
    "an impossible user": lambda rows: changed_manifest(rows, user_id="a\0b"),
    "no user": lambda rows: changed_manifest(rows, user_id=None),
    "no number in the log": lambda rows: changed_manifest(rows, seq="1"),
    "versions of another kind": lambda rows: changed_manifest(rows, versions=[1]),
    "a version twice": lambda rows: changed_manifest(
        rows, versions=manifest_of(rows)["versions"] * 2
    ),
    "a version that leads out": lambda rows: changed_manifest(
        rows, versions=[{**manifest_of(rows)["versions"][0], "version": "../../x"}]
    ),
    "metadata beyond the limit": lambda rows: changed_version(rows, metadata={"x": "a" * 10**6}),
    "a base beyond the limit": lambda rows: changed_version(rows, base={"x": "a" * 10**6}),
    "an alpha below zero": lambda rows: changed_version(rows, alpha=-5.0),
    "a tau above one": lambda rows: changed_version(rows, tau=7.0),
    "an empty idempotency key": lambda rows: changed_version(rows, idempotency_key=""),
    "a long idempotency key": lambda rows: changed_version(rows, idempotency_key="k" * 1000),
    "a long name of its store": lambda rows: changed_manifest(rows, store="s" * 1000),
    "metrics without bounds": manifest(lambda data: data.replace(b'"nll": 0', b'"nll": 1e999')),
    "other bytes than announced": weights(lambda data: data[:-1] + b"!"),
    "fewer bytes than announced": weights(lambda data: data[:-1]),
    "weights that are a pickle": weights(lambda data: b"\x80\x04" + data[2:]),
}


class TestHostileArchives:
    @pytest.mark.parametrize("kind", HOSTILE)
    def test_it_is_refused_and_nothing_is_stored_or_unpacked(self, archive, other, tmp_path, kind):
        rewrite(archive, HOSTILE[kind](members(archive)))
        before = set(tmp_path.rglob("*"))
        with pytest.raises(InvalidAdapterError, match=r"alice\.tar|adapter_model") as caught:
            other.import_user(archive)
        assert len(str(caught.value)) < 700
        assert other.versions("alice") == []
        written = {path for path in tmp_path.rglob("*") if path.is_file()} - before
        assert {path.name for path in written} <= {"adapter_store.json"}

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
        said = r"cannot import .*alice.tar: it has format 99"
        with pytest.raises(FormatVersionError, match=said):
            other.import_user(archive)

    def test_what_is_not_a_tar_is_refused(self, archive, other, tmp_path):
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


POSITIONS = st.integers(0, len(GOOD) - 1)
CHANGES = st.lists(st.tuples(POSITIONS, st.binary(min_size=1, max_size=12)), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(CHANGES, st.integers(0, 3 * 512))
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
