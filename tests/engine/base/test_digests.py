"""Cached digests: as good as computed ones, whatever happens to the files."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from langchain_cope.engine.base import digests, user_cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(digests, "WORTH_BYTES", 1)
    monkeypatch.setattr(digests, "_computed", {})
    monkeypatch.setattr(digests, "_SETTLED_SECONDS", -1.0)
    monkeypatch.setattr(user_cache, "user_cache_path", lambda *_, **__: tmp_path / "cache")
    return tmp_path / "cache" / "digests"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "one", tmp_path / "other"]
    for path in paths:
        path.write_bytes(b"12345678")
    return paths


def start_another_process() -> None:
    """Forget what this one remembers."""
    digests._computed.clear()


class Computing:
    """Makes a digest of the files' content, and counts."""

    def __init__(self, files: list[Path]) -> None:
        self.files, self.times = files, 0

    def __call__(self) -> str:
        self.times += 1
        content = b"".join(path.read_bytes() for path in self.files)
        return hashlib.sha256(content).hexdigest()


def test_unchanged_files_are_not_read_again(cache: Path, files: list[Path]) -> None:
    compute = Computing(files)
    digest = digests.cached_digest(files, compute)
    start_another_process()
    assert digests.cached_digest(files, compute) == digest
    assert compute.times == 1
    assert len(list(cache.iterdir())) == 1


CHANGES = ["content", "content with its old time", "another file in its place", "another path"]


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_is_noticed(cache: Path, files: list[Path], change: str, tmp_path: Path) -> None:
    compute = Computing(files)
    before = digests.cached_digest(files, compute)
    stat = files[0].stat()
    time.sleep(0.02)  # the tick of the file system's clock
    if change == "another path":
        files[0] = files[0].rename(tmp_path / "moved")
        assert digests.cached_digest(files, compute) == before
        assert compute.times == 2
        return
    if change == "another file in its place":
        (tmp_path / "new").write_bytes(b"abcdefgh")
        (tmp_path / "new").replace(files[0])
    else:
        with files[0].open("r+b") as file:
            file.write(b"abcdefgh")
    if change != "content":
        os.utime(files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digests.cached_digest(files, compute) != before
    assert compute.times == 2


def test_a_digest_of_a_file_written_just_now_is_not_cached(
    cache: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_SETTLED_SECONDS", 60.0)
    compute = Computing(files)
    digests.cached_digest(files, compute)
    digests.cached_digest(files, compute)
    assert compute.times == 2
    assert not cache.exists()


def test_a_digest_of_a_file_that_changes_meanwhile_is_not_cached(
    cache: Path, files: list[Path]
) -> None:
    compute = Computing(files)

    def slow() -> str:
        digest = compute()
        files[0].write_bytes(b"changed in the middle")
        return digest

    digests.cached_digest(files, slow)
    assert not cache.exists()


@pytest.mark.parametrize("content", ["", "short", "é" * 64, "0" * 63 + "\n" + "1" * 9])
def test_a_damaged_cache_entry_is_made_anew(cache: Path, files: list[Path], content: str) -> None:
    compute = Computing(files)
    digest = digests.cached_digest(files, compute)
    next(cache.iterdir()).write_text(content, encoding="utf-8")
    for _ in range(2):
        start_another_process()
        assert digests.cached_digest(files, compute) == digest
    assert compute.times == 2


def test_a_cache_that_cannot_be_written_costs_time_only(cache: Path, files: list[Path]) -> None:
    cache.parent.write_text("a file in its place")
    compute = Computing(files)
    digest = digests.cached_digest(files, compute)
    assert digests.cached_digest(files, compute) == digest
    assert compute.times == 1, "once a process"
    start_another_process()
    assert digests.cached_digest(files, compute) == digest
    assert compute.times == 2


def test_digests_of_small_files_are_remembered_in_memory_alone(
    cache: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "WORTH_BYTES", 1000)
    compute = Computing(files)
    assert digests.cached_digest(files, compute) == digests.cached_digest(files, compute)
    assert compute.times == 1
    assert not cache.exists()
