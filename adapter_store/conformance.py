"""What every backend promises, as tests that a backend of your own can run. Needs pytest.

```python
from adapter_store.conformance import AdapterStoreConformance


class TestMyBackend(AdapterStoreConformance):
    @pytest.fixture
    def backend(self):
        return MyBackend(...)  # empty, and no two tests share one
```

The first tests ask the five verbs, the others the store on top of them.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from adapter_store import (
    AdapterNotFoundError,
    AdapterStore,
    AdapterVersion,
    Backend,
    IntegrityError,
    Limits,
    PublishConflictError,
    UserErasedError,
    UserReport,
)
from adapter_store import layout as store_layout

if TYPE_CHECKING:
    from pathlib import Path

BASE = {"architecture": "llama", "weights": "ab" * 32}
_NO_GRACE = timedelta(0)


def make_adapter(seed: int = 0, num_bytes: int = 256) -> dict[str, bytes]:
    """Return the two files of a small, valid adapter; other bytes for another seed."""
    content = b"".join(
        hashlib.sha256(f"{seed} {block}".encode()).digest() for block in range(-(-num_bytes // 32))
    )
    tensor = {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}
    header = json.dumps({"base_model.model.q_proj.lora_A.weight": tensor}).encode()
    return {
        store_layout.WEIGHTS: len(header).to_bytes(8, "little") + header + content[:num_bytes],
        store_layout.CONFIG: b'{"peft_type": "LORA", "r": 4}',
    }


def all_keys(backend: Backend, folder: str) -> list[str]:
    """Return every file below a folder; only files have a dot in their names."""
    keys: list[str] = []
    for name in backend.list_folder(folder):
        key = f"{folder}/{name}"
        if "." in name or name == store_layout.PROBE:
            keys.append(key)
        else:
            keys += all_keys(backend, key)
    return keys


def raises(error: type[Exception], match: str | None = None) -> Any:
    """Return pytest's context manager for an expected error."""
    import pytest  # here, so that reading this module needs no pytest

    return pytest.raises(error, match=match)


def at_once(count: int, call: Callable[[int], Any]) -> list[Any]:
    """Return what `call(0)` … `call(count - 1)` return, started at the same moment in threads."""
    barrier = threading.Barrier(count)

    def started(number: int) -> Any:
        barrier.wait(timeout=60)
        return call(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(started, range(count)))


class AdapterStoreConformance:
    """Tests to subclass, with a fixture `backend` that gives an empty backend to each test."""

    def store(self, backend: Backend, **options: Any) -> AdapterStore:
        """Return a new store object on the backend; override it to open stores in another way."""
        return AdapterStore(backend, **options)

    # ── the five verbs ──

    def test_what_is_put_comes_back(self, backend: Backend) -> None:
        backend.put_if_absent("a/b/c.bin", b"\0content\xff")
        backend.put_if_absent("a/b/empty.bin", b"")
        assert backend.get("a/b/c.bin", 1000) == b"\0content\xff"
        assert backend.get("a/b/empty.bin", 1000) == b""

    def test_no_more_is_read_than_asked_for(self, backend: Backend) -> None:
        backend.put_if_absent("a/big.bin", bytes(range(256)) * 40)
        assert backend.get("a/big.bin", 10) == bytes(range(10))
        assert len(backend.get("a/big.bin", 10**9)) == 10240

    def test_what_is_not_there_is_a_file_not_found_error(self, backend: Backend) -> None:
        for key in ("nothing.bin", "no/folder/nothing.bin"):
            with raises(FileNotFoundError):
                backend.get(key, 10)
            assert backend.stat(key) is None
            backend.delete(key)

    def test_what_is_there_is_not_written_again(self, backend: Backend) -> None:
        backend.put_if_absent("a/b.bin", b"first")
        for content in (b"second", b"first", b""):
            with raises(FileExistsError):
                backend.put_if_absent("a/b.bin", content)
        assert backend.get("a/b.bin", 100) == b"first"
        backend.delete("a/b.bin")
        backend.put_if_absent("a/b.bin", b"third")
        assert backend.get("a/b.bin", 100) == b"third"

    def test_of_many_that_put_at_once_one_wins(self, backend: Backend) -> None:
        for number in range(5):
            key = f"race/{number}.bin"

            def put(thread: int, key: str = key) -> bytes | None:
                content = f"{thread} ".encode() * 500
                try:
                    backend.put_if_absent(key, content)
                except FileExistsError:
                    return None
                return content

            winners = [content for content in at_once(8, put) if content is not None]
            assert len(winners) == 1
            assert backend.get(key, 10_000) == winners[0]

    def test_a_folder_lists_what_is_directly_in_it_sorted(self, backend: Backend) -> None:
        for key in (
            "f/b.bin",
            "f/a.bin",
            "f/sub/x.bin",
            "f/sub/y.bin",
            "f/a-longer.bin",
            "fo/z.bin",
        ):
            backend.put_if_absent(key, b"x")
        assert backend.list_folder("f") == ["a-longer.bin", "a.bin", "b.bin", "sub"]
        assert backend.list_folder("f/sub") == ["x.bin", "y.bin"]
        assert backend.list_folder("nothing") == backend.list_folder("f/su") == []
        backend.delete("f/sub/x.bin")
        backend.delete("f/sub/y.bin")
        assert backend.list_folder("f") == ["a-longer.bin", "a.bin", "b.bin"]

    def test_a_listing_longer_than_a_page_is_whole(self, backend: Backend) -> None:
        names = [f"{number:05d}.bin" for number in range(1005)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: backend.put_if_absent(f"many/{name}", b""), names))
        assert backend.list_folder("many") == names

    def test_stat_tells_size_time_and_whether_it_was_written_anew(self, backend: Backend) -> None:
        backend.put_if_absent("a/b.bin", b"12345")
        first = backend.stat("a/b.bin")
        assert first is not None
        assert first == backend.stat("a/b.bin")
        assert first.size == 5
        backend.put_if_absent("a/later.bin", b"")
        later = backend.stat("a/later.bin")
        assert later is not None
        assert 0 <= later.modified - first.modified < 60
        backend.delete("a/b.bin")
        assert backend.stat("a/b.bin") is None
        backend.put_if_absent("a/b.bin", b"54321")
        anew = backend.stat("a/b.bin")
        assert anew is not None
        assert anew.mark != first.mark

    # ── the store on top ──

    def test_what_was_published_is_what_is_fetched(self, backend: Backend) -> None:
        store = self.store(backend)
        published = store.publish(
            "ålice 😀", make_adapter(1), base=BASE, metrics={"nll": 2.5}, alpha=0.1
        )
        assert self.store(backend).resolve("ålice 😀") == published == store.resolve("ålice 😀")
        assert store.fetch(published) == make_adapter(1)
        folder = store.fetch_dir(published)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == make_adapter(1)

    def test_a_second_object_sees_each_change_at_once(self, backend: Backend) -> None:
        writer, reader = self.store(backend), self.store(backend)
        for number in range(5):
            version = writer.publish("alice", make_adapter(number), base=BASE)
            assert reader.resolve("alice") == version
        first = reader.versions("alice")[0].version
        writer.activate("alice", first)
        assert reader.active("alice") == first
        writer.delete_version("alice", first)
        assert reader.active("alice") is None

    def test_going_back_and_why(self, backend: Backend) -> None:
        store = self.store(backend)
        versions = [
            store.publish("alice", make_adapter(n), base=BASE, metrics={"n": n}).version
            for n in range(3)
        ]
        assert store.rollback("alice", reason="worse answers").version == versions[1]
        assert store.rollback("alice").version == versions[0]
        with raises(AdapterNotFoundError, match="no earlier active version"):
            store.rollback("alice")
        store.activate("alice", versions[2], reason="it was the prompt")
        history = store.history("alice")
        assert [(change.operation, change.active) for change in history] == [
            ("publish", versions[0]),
            ("publish", versions[1]),
            ("publish", versions[2]),
            ("rollback", versions[1]),
            ("rollback", versions[0]),
            ("activate", versions[2]),
        ]
        assert [change.reason for change in history[3:]] == [
            "worse answers",
            "",
            "it was the prompt",
        ]
        assert history[5].metrics == {"n": 2}
        assert store.history("alice", limit=2) == history[-2:]
        assert store.history("alice", limit=2, before_seq=history[-2].seq) == history[2:4]
        assert [change.at for change in history] == sorted(change.at for change in history)

    def test_a_retried_job_publishes_once(self, backend: Backend) -> None:
        store = self.store(backend)
        versions = at_once(
            6,
            lambda number: store.publish(
                "alice", make_adapter(number), base=BASE, idempotency_key="job"
            ),
        )
        assert len({version.version for version in versions}) == 1
        assert store.versions("alice") == versions[:1]
        assert len([key for key in all_keys(backend, "users") if "/versions/" in key]) == 2

    def test_concurrent_publishes_are_all_kept_in_one_order(self, backend: Backend) -> None:
        stores = [self.store(backend) for _ in range(6)]
        published = at_once(
            6, lambda n: [stores[n].publish("alice", make_adapter(n), base=BASE) for _ in range(2)]
        )
        listed = self.store(backend).versions("alice")
        assert {v.version for v in listed} == {
            v.version for versions in published for v in versions
        }
        for one, other in published:
            assert listed.index(one) < listed.index(other)
        for version in listed:
            stores[0].fetch(version)

    def test_of_many_that_expect_the_same_active_version_one_wins(self, backend: Backend) -> None:
        store = self.store(backend)
        first = store.publish("alice", make_adapter(), base=BASE)

        def publish(number: int) -> AdapterVersion | None:
            try:
                return store.publish(
                    "alice", make_adapter(number), base=BASE, expected_active=first.version
                )
            except PublishConflictError:
                return None

        winners = [version for version in at_once(6, publish) if version is not None]
        assert len(winners) == 1
        assert store.versions("alice") == [first, *winners]

    def test_only_so_many_versions_are_kept(self, backend: Backend) -> None:
        store = self.store(backend, limits=Limits(live_versions=3))
        versions = [
            store.publish("alice", make_adapter(n), base=BASE, activate=n == 0) for n in range(6)
        ]
        assert store.versions("alice") == [versions[0], *versions[4:]]
        assert len([key for key in all_keys(backend, "users") if "/versions/" in key]) == 6

    def test_users_never_meet_and_are_listed_by_page(self, backend: Backend) -> None:
        store = self.store(backend)
        ids = [f"user-{number}" for number in range(11)]
        for number, user_id in enumerate(ids):
            store.publish(user_id, make_adapter(number), base=BASE)
        for number, user_id in enumerate(ids):
            assert store.fetch(store.resolve(user_id)) == make_adapter(number)
        heads, cursor = store.list_users(limit=4)
        while cursor is not None:
            page, cursor = store.list_users(cursor, limit=4)
            heads = [*heads, *page]
        assert sorted(head.user_id for head in heads) == sorted(ids)
        store.erase_user("user-3")
        assert "user-3" not in {head.user_id for head in store.list_users()[0]}

    def test_after_an_erasure_nothing_is_left_and_nothing_is_served(self, backend: Backend) -> None:
        store, warm = self.store(backend), self.store(backend)
        other = store.publish("bob", make_adapter(9), base=BASE)
        versions = [store.publish("alice", make_adapter(n), base=BASE) for n in range(3)]
        for version in versions:
            warm.fetch(version)
        store.erase_user("alice")
        for reader in (store, warm, self.store(backend)):
            with raises(AdapterNotFoundError):
                reader.resolve("alice")
            for version in versions:
                with raises(AdapterNotFoundError):
                    reader.fetch(version)
            assert reader.versions("alice") == []
            assert [change.operation for change in reader.history("alice")] == ["erase"]
        left = all_keys(backend, store_layout.user_folder(versions[0].user_key))
        assert [key.rpartition("/")[2] for key in left] == ["000000000004.json"]
        assert b"alice" not in backend.get(left[0], 10_000)
        assert warm.fetch(other) == make_adapter(9)
        verified = store.verify()
        assert (verified.ok, verified.orphans) == (True, 0)

    def test_what_was_trained_before_an_erasure_is_refused_after_it(self, backend: Backend) -> None:
        store, trainer = self.store(backend), self.store(backend)
        # Before a first erasure, and after it.
        for data_seq in (trainer.data_seq("alice"), trainer.data_seq("alice")):
            store.erase_user("alice")
            with raises(UserErasedError, match="nothing of it is kept"):
                trainer.publish("alice", make_adapter(1), base=BASE, data_seq=data_seq)
        assert all_keys(backend, "users") == [
            key for key in all_keys(backend, "users") if key.endswith("/log/000000000002.json")
        ]
        again = trainer.publish(
            "alice", make_adapter(2), base=BASE, data_seq=trainer.data_seq("alice")
        )
        assert store.fetch(store.resolve("alice")) == make_adapter(2)
        assert store.versions("alice") == [again]

    def test_publishers_and_erasers_at_once_leave_a_whole_store(self, backend: Backend) -> None:
        def work(number: int) -> None:
            store = self.store(backend)
            for round_number in range(4):
                if number < 2:
                    store.erase_user("alice")
                    continue
                try:
                    store.publish("alice", make_adapter(10 * number + round_number), base=BASE)
                except UserErasedError:
                    continue

        at_once(5, work)
        store = self.store(backend)
        for version in store.versions("alice"):
            store.fetch(version)
        store.erase_user("alice")
        store.gc(grace=_NO_GRACE)
        assert len(all_keys(backend, "users")) == 1

    def test_damage_is_found_and_named(self, backend: Backend) -> None:
        store = self.store(backend)
        whole = store.publish("bob", make_adapter(1), base=BASE)
        version = store.publish("alice", make_adapter(2), base=BASE)
        folder = store_layout.version_folder(version.user_key, version.version)
        key = f"{folder}/{store_layout.WEIGHTS}"
        data = backend.get(key, 10**6)
        backend.delete(key)
        backend.put_if_absent(key, data[:-1] + bytes([data[-1] ^ 1]))
        with raises(IntegrityError, match="sha256 differs|does not decrypt"):
            store.fetch(version)
        seen: list[UserReport] = []
        verified = store.verify(on_user=seen.append)
        assert {report.user_id for report in seen} == {"alice", "bob"}
        assert (verified.users, verified.versions, verified.ok) == (2, 2, False)
        assert [report.user_id for report in verified.damaged] == ["alice"]
        assert store_layout.WEIGHTS in verified.damaged[0].problems[0]
        assert store.verify("bob").ok
        assert store.fetch(whole) == make_adapter(1)

    def test_garbage_goes_and_what_is_published_stays(self, backend: Backend) -> None:
        store = self.store(backend)
        version = store.publish("alice", make_adapter(1), base=BASE)
        orphan = "20200101T000000Z-000000000000"
        for name, data in make_adapter(2).items():
            backend.put_if_absent(
                f"{store_layout.version_folder(version.user_key, orphan)}/{name}", data
            )
        backend.put_if_absent(store_layout.new_probe(), b"")
        seen: list[UserReport] = []
        assert store.verify(on_user=seen.append).ok
        assert [report.orphans for report in seen] == [(orphan,)]
        assert store.gc().versions == 0  # too young
        assert store.gc(grace=_NO_GRACE, dry_run=True).versions == 1
        done = store.gc(grace=_NO_GRACE)
        assert (done.versions, done.problems) == (1, [])
        assert all_keys(backend, "probes") == []
        assert store.fetch(store.resolve("alice")) == make_adapter(1)
        assert store.verify().orphans == 0
        assert store.gc(grace=_NO_GRACE).versions == 0
        assert len(store.versions("alice")) == 1

    def test_a_collection_beside_writers_takes_nothing_that_they_publish(
        self, backend: Backend
    ) -> None:
        stop = threading.Event()

        def work(number: int) -> int:
            store = self.store(backend)
            if number == 0:
                while not stop.wait(0.02):
                    store.gc(grace=_NO_GRACE)
                return 0
            try:
                for round_number in range(4):
                    store.publish("alice", make_adapter(10 * number + round_number), base=BASE)
            finally:
                if number == 1:
                    stop.set()
            return 4

        published = sum(at_once(3, work))
        store = self.store(backend)
        assert len(store.versions("alice")) == published
        for version in store.versions("alice"):
            store.fetch(version)

    def test_old_entries_are_trimmed_beyond_the_newest_hundred(self, backend: Backend) -> None:
        store = self.store(backend)
        one = store.publish("alice", make_adapter(1), base=BASE).version
        two = store.publish("alice", make_adapter(2), base=BASE).version
        for number in range(110):
            store.activate("alice", (one, two)[number % 2])
        warm = self.store(backend)
        warm.resolve("alice")
        assert store.gc().entries == 0  # too young
        assert store.gc(entry_age=_NO_GRACE).entries == 12
        assert warm.active("alice") == self.store(backend).active("alice") == two
        assert [change.seq for change in store.history("alice", limit=1000)] == list(range(13, 113))
        store.activate("alice", one)
        assert warm.active("alice") == one

    def test_a_candidate_is_nobodys_version_until_it_is_accepted(self, backend: Backend) -> None:
        store = self.store(backend)
        first = store.publish("alice", make_adapter(1), base=BASE)
        waits = store.publish(
            "alice", make_adapter(2), base=BASE, candidate=True, idempotency_key="run"
        )
        again = store.publish(
            "alice", make_adapter(3), base=BASE, candidate=True, idempotency_key="run"
        )
        assert again == waits == store.candidate("alice")
        assert store.versions("alice") == [first]
        assert store.active("alice") == first.version
        with raises(AdapterNotFoundError):
            store.fetch(waits)
        with raises(AdapterNotFoundError):
            store.activate("alice", waits.version)
        assert store.gc(grace=_NO_GRACE).versions == 0
        assert (store.verify().versions, store.verify().orphans) == (2, 0)
        with raises(PublishConflictError):
            store.accept("alice", waits.version, expected_active=None)
        assert store.accept("alice", waits.version, expected_active=first.version) == waits
        assert store.accept("alice", waits.version) == waits  # once, however often
        assert store.fetch(store.resolve("alice")) == make_adapter(2)
        assert store.rollback("alice") == first
        assert store.candidate("alice") is None

    def test_candidates_that_nobody_wants_leave_no_file(self, backend: Backend) -> None:
        store = self.store(backend)
        replaced = store.publish("alice", make_adapter(1), base=BASE, candidate=True)
        waits = store.publish("alice", make_adapter(2), base=BASE, candidate=True)
        folders = f"{store_layout.user_folder(waits.user_key)}/versions"
        assert backend.list_folder(folders) == [waits.version]
        with raises(AdapterNotFoundError):
            store.accept("alice", replaced.version)
        store.withdraw("alice", replaced.version)
        store.withdraw("alice", waits.version)
        assert backend.list_folder(folders) == []
        store.publish("alice", make_adapter(3), base=BASE, candidate=True)
        assert store.gc(grace=_NO_GRACE).candidates == 0
        assert store.gc(candidate_age=_NO_GRACE, dry_run=True).candidates == 1
        assert store.gc(candidate_age=_NO_GRACE).candidates == 1  # its run never came back
        assert backend.list_folder(folders) == []

    def test_an_erasure_takes_the_candidate(self, backend: Backend) -> None:
        store = self.store(backend)
        data_seq = store.data_seq("alice")
        waits = store.publish("alice", make_adapter(1), base=BASE, candidate=True)
        store.erase_user("alice")
        assert store.candidate("alice") is None
        assert len(all_keys(backend, store_layout.user_folder(waits.user_key))) == 1
        with raises(AdapterNotFoundError, match="personalize the user again"):
            store.accept("alice", waits.version)
        with raises(UserErasedError):
            store.publish("alice", make_adapter(1), base=BASE, candidate=True, data_seq=data_seq)

    def test_a_user_moves_to_another_store(self, backend: Backend, tmp_path: "Path") -> None:
        store = self.store(backend)
        versions = [
            store.publish("alice", make_adapter(n), base=BASE, metrics={"n": n}) for n in range(3)
        ]
        store.activate("alice", versions[1].version)
        archive = store.export_user("alice", tmp_path / f"{os.urandom(4).hex()}.tar")
        other = AdapterStore("memory://" + os.urandom(8).hex())
        head = other.import_user(archive)
        assert [v.digest for v in head.versions] == [v.digest for v in versions]
        assert head.active == head.versions[1].version
        for moved, original in zip(head.versions, versions, strict=True):
            assert other.fetch(moved) == store.fetch(original)
            assert (moved.metrics, moved.created_at) == (original.metrics, original.created_at)
        assert store.import_user(archive).seq == 4  # all there already: nothing is written
        store.delete_version("alice", versions[0].version)
        restored = store.import_user(archive).versions[0]
        assert store.fetch(restored) == other.fetch(head.versions[0])
        # Another process may still be removing files under the old id.
        assert restored.version != versions[0].version
        assert store.import_user(archive).seq == 6
        assert other.import_user(archive) == head
        store.erase_user("alice")
        with raises(UserErasedError, match="destroy it"):
            store.import_user(archive)
        assert store.versions("alice") == []
