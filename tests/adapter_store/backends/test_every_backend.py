"""What a store promises on every backend."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from adapter_store import (
    AdapterNotFoundError,
    AdapterStore,
    BackendError,
    BaseModelMismatchError,
    IntegrityError,
    InvalidAdapterError,
    Limits,
    LocalBackend,
    MemoryBackend,
    PublishConflictError,
)
from adapter_store import layout as store_layout

BASE = {"architecture": "llama", "weights": "ab" * 32, "model": "starter", "quantization": "none"}


@pytest.fixture
def store(place):
    return AdapterStore(place)


@pytest.fixture
def backend(place):
    return place if isinstance(place, MemoryBackend) else LocalBackend(place)


def all_keys(backend, folder="users"):
    """Every file below a folder; only files have a dot in their names."""
    found = []
    for name in backend.list_folder(folder):
        path = f"{folder}/{name}"
        found += [path] if "." in name else all_keys(backend, path)
    return found


class TestPublishAndRead:
    def test_what_was_published_comes_back_whole(self, store, files):
        published = store.publish(
            "alice",
            files(1),
            base=BASE,
            metrics={"dpo": {"nll": 2.5}, "steps": (1, 2)},
            alpha=0.1,
            tau=1,
            metadata={"instruction": "Schreibe wie ich — ✍️"},
        )
        resolved = store.resolve("alice")
        assert resolved == published
        assert resolved.base == BASE
        assert resolved.metrics == {"dpo": {"nll": 2.5}, "steps": [1, 2]}
        assert (resolved.alpha, resolved.tau) == (0.1, 1.0)
        assert resolved.metadata == {"instruction": "Schreibe wie ich — ✍️"}
        assert resolved.created_at.tzinfo is not None
        assert store.fetch(resolved) == files(1)

    def test_the_name_holds_user_and_version_and_the_digest_only_the_content(self, store, files):
        first = store.publish("alice", files(1), base=BASE)
        again = store.publish("bob", files(1), base=BASE)
        other = store.publish("bob", files(2), base=BASE)
        assert first.name == f"{first.user_key}@{first.version}"
        assert first.digest == again.digest != other.digest
        assert len({first.name, again.name, other.name}) == 3

    def test_of_a_peft_folder_only_weights_and_config_are_taken(self, store, peft_folder, files):
        assert store.fetch(store.publish("alice", peft_folder, base=BASE)) == files()
        assert store.fetch(store.publish("alice", str(peft_folder), base=BASE)) == files()

    def test_fetch_dir_is_a_plain_peft_folder(self, store, files):
        folder = store.fetch_dir(store.publish("alice", files(3), base=BASE))
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files(3)
        assert store.fetch_dir(store.resolve("alice")) == folder

    def test_an_exported_version_is_a_plain_peft_folder(self, store, files, tmp_path):
        first = store.publish("alice", files(1), base=BASE)
        store.publish("alice", files(2), base=BASE)
        active = store.export_peft("alice", tmp_path / "new" / "active")
        older = store.export_peft("alice", str(tmp_path / "older"), first.version)
        assert {path.name: path.read_bytes() for path in active.iterdir()} == files(2)
        assert {path.name: path.read_bytes() for path in older.iterdir()} == files(1)
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []

    def test_an_export_never_mixes_with_what_a_folder_holds(self, store, files, tmp_path):
        store.publish("alice", files(), base=BASE)
        full = tmp_path / "full"
        full.mkdir()
        (full / "adapter_model.bin").write_bytes(b"other")
        with pytest.raises(BackendError, match=r"full.*name a new or an empty folder"):
            store.export_peft("alice", full)
        assert [path.name for path in full.iterdir()] == ["adapter_model.bin"]
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    def test_preparing_makes_an_empty_store_and_leaves_no_probe(self, store, place, backend, files):
        store.prepare("alice")
        assert store.list_users() == ([], None)
        assert all_keys(backend, "probes") == backend.list_folder("probes") == []
        version = store.publish("alice", files(), base=BASE)
        AdapterStore(place).prepare("alice")
        assert store.resolve("alice") == version

    def test_a_second_object_on_the_same_place_sees_it(self, store, place, files):
        version = store.publish("alice", files(), base=BASE)
        assert AdapterStore(place).resolve("alice") == version


class TestUsers:
    def test_reading_an_empty_store_finds_nobody(self, store):
        with pytest.raises(
            AdapterNotFoundError, match=r"user 'alice' has no adapter in .*personalize"
        ):
            store.resolve("alice")
        assert store.versions("alice") == []
        assert store.active("alice") is None
        assert store.list_users() == ([], None)
        with pytest.raises(AdapterNotFoundError):
            store.activate("alice", "20260101T000000Z-000000000000")
        with pytest.raises(AdapterNotFoundError):
            store.delete_version("alice", "20260101T000000Z-000000000000")

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("user-1", "user-10"),
            ("é", "e\u0301"),
            ("alice", "Alice"),
            ("a", "a "),
            ("../x", "x"),
            ("😀", "😁"),
            ("u" * 1024, "u" * 1023),
        ],
    )
    def test_two_users_never_meet(self, store, files, one, other):
        mine = store.publish(one, files(1), base=BASE)
        with pytest.raises(AdapterNotFoundError):
            store.resolve(other)
        theirs = store.publish(other, files(2), base=BASE)
        assert mine.user_key != theirs.user_key
        assert store.fetch(store.resolve(one)) == files(1)
        assert store.fetch(store.resolve(other)) == files(2)
        store.delete_version(other, theirs.version)
        assert store.resolve(one) == mine
        with pytest.raises(AdapterNotFoundError):
            store.activate(other, mine.version)

    @pytest.mark.parametrize(
        ("user_id", "said"),
        [
            ("", "user id '' is empty: give 1 to 1024 characters"),
            ("x" * 10_000, "too long: give 1 to 1024.*"),
            ("a\0b", "NUL"),
            ("\ud800", "surrogate"),
            (7, "user id 7 is not text"),
            (None, "user id None is not text"),
        ],
    )
    def test_an_impossible_user_id_is_refused_everywhere_and_nothing_is_made(
        self, store, backend, files, user_id, said
    ):
        version = "20260101T000000Z-000000000000"
        calls = [
            lambda: store.publish(user_id, files(), base=BASE),
            lambda: store.prepare(user_id),
            lambda: store.resolve(user_id),
            lambda: store.versions(user_id),
            lambda: store.active(user_id),
            lambda: store.activate(user_id, version),
            lambda: store.delete_version(user_id, version),
        ]
        for call in calls:
            with pytest.raises(InvalidAdapterError, match=said) as caught:
                call()
            assert len(str(caught.value)) < 250
        assert backend.list_folder("users") == []

    def test_users_are_listed_page_by_page_in_the_order_of_their_keys(self, store, files):
        ids = {f"user-{number}" for number in range(12)}
        for user_id in ids:
            store.publish(user_id, files(), base=BASE)
        whole, end = store.list_users()
        assert end is None
        assert {head.user_id for head in whole} == ids
        assert [head.user_key for head in whole] == sorted(head.user_key for head in whole)
        paged, cursor = [], None
        for num_expected in (5, 5, 2):
            heads, cursor = store.list_users(cursor, limit=5)
            assert len(heads) == num_expected
            paged += heads
        assert cursor is None
        assert paged == whole
        assert store.list_users(limit=12)[1] is None

    def test_a_head_tells_versions_active_and_the_last_change(self, store, files):
        first = store.publish("alice", files(1), base=BASE)
        second = store.publish("alice", files(2), base=BASE, activate=False)
        [head], _ = store.list_users()
        assert head.versions == (first, second)
        assert (head.active, head.operation, head.operation_version) == (
            first.version,
            "publish",
            second.version,
        )
        assert head.seq == 2

    def test_a_cursor_of_no_listing_and_an_empty_page_are_refused(self, store):
        with pytest.raises(InvalidAdapterError, match=r"cursor '../..' comes from no listing"):
            store.list_users("../..")
        with pytest.raises(InvalidAdapterError, match="limit is 0"):
            store.list_users(limit=0)


class TestVersions:
    def test_the_newest_is_active_unless_asked_otherwise(self, store, files):
        first = store.publish("alice", files(1), base=BASE)
        second = store.publish("alice", files(2), base=BASE)
        assert store.active("alice") == second.version
        third = store.publish("alice", files(3), base=BASE, activate=False)
        assert store.active("alice") == second.version
        assert store.versions("alice") == [first, second, third]

    def test_a_first_version_can_wait_unactivated(self, store, files):
        version = store.publish("alice", files(), base=BASE, activate=False)
        with pytest.raises(AdapterNotFoundError, match=r"1 version .*none is active: activate one"):
            store.resolve("alice")
        assert store.resolve("alice", version.version) == version

    def test_activating_goes_back_and_writes_nothing_when_it_is_so_already(self, store, files):
        first = store.publish("alice", files(1), base=BASE)
        store.publish("alice", files(2), base=BASE)
        assert store.activate("alice", first.version) == first
        assert store.resolve("alice") == first
        before = store.list_users()
        store.activate("alice", first.version)
        assert store.list_users() == before

    def test_an_unknown_version_is_refused_and_the_newest_named(self, store, files):
        version = store.publish("alice", files(), base=BASE)
        for call in (store.resolve, store.activate, store.delete_version):
            with pytest.raises(
                AdapterNotFoundError,
                match=f"no version '../../x' .*the newest is {version.version}",
            ):
                call("alice", "../../x")
        assert store.resolve("alice") == version

    def test_deleting_the_active_version_leaves_none_active_and_no_byte(
        self, store, backend, files
    ):
        kept = store.publish("alice", files(1), base=BASE)
        gone = store.publish("alice", files(2), base=BASE)
        store.delete_version("alice", gone.version)
        assert store.active("alice") is None
        assert store.versions("alice") == [kept]
        folders = backend.list_folder(f"{store_layout.user_folder(gone.user_key)}/versions")
        assert folders == [kept.version]
        with pytest.raises(AdapterNotFoundError, match="no version"):
            store.delete_version("alice", gone.version)

    def test_deleting_an_inactive_version_leaves_the_active_one(self, store, files):
        gone = store.publish("alice", files(1), base=BASE)
        kept = store.publish("alice", files(2), base=BASE)
        store.delete_version("alice", gone.version)
        assert store.resolve("alice") == kept
        store.delete_version("alice", kept.version)
        with pytest.raises(AdapterNotFoundError, match="has no adapter"):
            store.resolve("alice")
        assert [head.versions for head in store.list_users()[0]] == [()]

    def test_a_reader_whose_version_is_deleted_in_between_is_told_so(self, store, files):
        store.publish("alice", files(1), base=BASE)
        resolved = store.resolve("alice")
        folder = store.fetch_dir(resolved)
        store.delete_version("alice", resolved.version)
        with pytest.raises(AdapterNotFoundError):
            store.fetch(resolved)
        with pytest.raises(AdapterNotFoundError):
            store.fetch_dir(resolved)
        assert not folder.exists()

    def test_a_listed_version_without_its_file_is_damage_not_absence(self, store, backend, files):
        version = store.publish("alice", files(), base=BASE)
        folder = store_layout.version_folder(version.user_key, version.version)
        backend.delete(f"{folder}/adapter_config.json")
        with pytest.raises(
            IntegrityError, match=rf"{version.version}/adapter_config.json is missing"
        ):
            store.fetch(version)

    def test_beyond_twenty_the_oldest_that_is_not_active_is_dropped_with_its_files(
        self, store, backend, files
    ):
        versions = [store.publish("alice", files(0), base=BASE)]
        versions += [
            store.publish("alice", files(n), base=BASE, activate=False) for n in range(1, 22)
        ]
        expected = [versions[0], *versions[3:]]
        assert store.versions("alice") == expected
        assert store.active("alice") == versions[0].version
        folder = f"{store_layout.user_folder(versions[0].user_key)}/versions"
        assert backend.list_folder(folder) == sorted(version.version for version in expected)
        for version in expected:
            store.fetch(version)

    def test_a_store_that_keeps_one_keeps_the_active_and_the_new_one(self, place, files):
        store = AdapterStore(place, limits=Limits(live_versions=1))
        first = store.publish("alice", files(1), base=BASE)
        second = store.publish("alice", files(2), base=BASE, activate=False)
        assert store.versions("alice") == [first, second]
        third = store.publish("alice", files(3), base=BASE)
        assert store.versions("alice") == [third]

    def test_order_is_the_logs_even_when_the_clock_goes_backwards(self, store, files, monkeypatch):
        times = iter(datetime(2030, 1, 1, tzinfo=UTC) - timedelta(days=n) for n in range(100))
        monkeypatch.setattr("adapter_store.store.now", lambda: next(times))
        versions = [store.publish("alice", files(n), base=BASE) for n in range(3)]
        assert versions[0].version > versions[1].version > versions[2].version
        assert store.versions("alice") == versions
        assert store.resolve("alice") == versions[2]


class TestRollback:
    def test_it_passes_over_what_was_deleted_and_never_stays_where_it_is(self, store, files):
        first, second, third = (
            store.publish("alice", files(n), base=BASE).version for n in range(3)
        )
        store.activate("alice", first)
        store.activate("alice", third)  # the way back: first, second, third, first
        store.delete_version("alice", second)
        assert store.rollback("alice").version == first
        assert store.rollback("alice").version == third
        # Of two versions no more than two steps are kept.
        with pytest.raises(AdapterNotFoundError, match="no earlier active version"):
            store.rollback("alice")

    def test_after_the_active_version_was_deleted_it_goes_to_the_one_before(self, store, files):
        first, second = (store.publish("alice", files(n), base=BASE).version for n in range(2))
        store.delete_version("alice", second)
        assert store.active("alice") is None
        assert store.rollback("alice").version == first

    def test_of_somebody_unknown_or_without_versions_it_says_so(self, store, files):
        with pytest.raises(AdapterNotFoundError, match="user 'bob' has no adapter"):
            store.rollback("bob")
        version = store.publish("alice", files(), base=BASE).version
        store.delete_version("alice", version)
        with pytest.raises(AdapterNotFoundError, match="user 'alice' has no adapter"):
            store.rollback("alice")

    def test_the_way_back_does_not_grow_for_ever(self, store, files):
        first, second = (store.publish("alice", files(n), base=BASE).version for n in range(2))
        for number in range(50):
            store.activate("alice", (first, second)[number % 2])
        [head], _ = store.list_users()
        assert len(head.previous) <= 2

    def test_activating_and_going_back_only_from_the_expected_version(self, store, files):
        first, second = (store.publish("alice", files(n), base=BASE).version for n in range(2))
        before = store.history("alice")
        for call in (
            lambda: store.activate("alice", first, expected_active=first),
            lambda: store.rollback("alice", expected_active=None),
        ):
            with pytest.raises(
                PublishConflictError, match=f"has '{second}' active where .* was expected"
            ):
                call()
        assert store.history("alice") == before
        assert store.rollback("alice", expected_active=second).version == first

    @pytest.mark.parametrize("reason", ["x" * 1001, 7, "\ud800", None])
    def test_a_reason_that_is_none_is_refused(self, store, files, reason):
        version = store.publish("alice", files(), base=BASE).version
        for call in (
            lambda: store.publish("alice", files(), base=BASE, reason=reason),
            lambda: store.activate("alice", version, reason=reason),
            lambda: store.rollback("alice", reason=reason),
            lambda: store.delete_version("alice", version, reason=reason),
        ):
            with pytest.raises(
                InvalidAdapterError, match="is not up to 1000 characters of text: say it shorter"
            ):
                call()
        assert len(store.versions("alice")) == 1

    @pytest.mark.parametrize("data_seq", [-1, 5, True, "1", 1.0])
    def test_a_data_seq_that_is_none_is_refused(self, store, files, data_seq):
        store.publish("alice", files(), base=BASE)
        with pytest.raises(
            InvalidAdapterError, match=r"data_seq is .* the user's log is at 1: give what data_seq"
        ):
            store.publish("alice", files(), base=BASE, data_seq=data_seq)
        assert len(store.versions("alice")) == 1


class TestBase:
    def test_the_same_base_under_another_name_or_quantized_is_accepted(self, store, files):
        store.publish("alice", files(), base=BASE)
        assert store.resolve(
            "alice", base={**BASE, "model": "/models/starter", "quantization": "int8"}
        )

    def test_another_base_is_refused_naming_each_part_that_differs(self, store, files):
        version = store.publish("alice", files(), base=BASE | {"chat_template": "t" * 500})
        other = {"architecture": "llama", "weights": "cd" * 32, "tokenizer": "new"}
        with pytest.raises(BaseModelMismatchError) as caught:
            store.resolve("alice", version.version, base=other)
        message = str(caught.value)
        assert "another base model ('starter', now none): " in message
        assert f"weights was {BASE['weights'][:20]!r}"[:-1] in message
        assert "and is 'cdcdcd" in message
        assert "tokenizer was none and is 'new'" in message
        assert "chat_template was 'ttt" in message
        assert "architecture" not in message
        assert len(message) < 600
        assert caught.value.differences == {
            "chat_template": ("t" * 500, None),
            "tokenizer": (None, "new"),
            "weights": (BASE["weights"], other["weights"]),
        }


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (
                lambda files: files.pop("adapter_config.json"),
                "expected exactly adapter_model.safetensors and",
            ),
            (
                lambda files: files.update({"adapter_model.bin": b""}),
                "adapter_model.bin.*expected exactly",
            ),
            (lambda files: files.update({"../evil": b""}), "../evil.*expected exactly"),
            (
                lambda files: files.update({"adapter_config.json": "{}"}),
                "given as str, expected its content as bytes",
            ),
            (
                lambda files: files.update({"adapter_config.json": b"[]"}),
                "JSON list where an object is expected",
            ),
            (
                lambda files: files.update({"adapter_config.json": b"{"}),
                "adapter_config.json is not usable",
            ),
            (
                lambda files: files.update({"adapter_config.json": b"\xff{}"}),
                "adapter_config.json is not usable",
            ),
            (
                lambda files: files.update({"adapter_config.json": b"[" * 100_000}),
                "nested too deeply",
            ),
            (
                lambda files: files.update({"adapter_model.safetensors": b""}),
                "not a whole safetensors file",
            ),
        ],
    )
    def test_unusable_files_are_refused_and_nothing_is_stored(
        self, store, backend, files, change, said
    ):
        given = files()
        change(given)
        with pytest.raises(InvalidAdapterError, match=said):
            store.publish("alice", given, base=BASE)
        assert backend.list_folder("users") == []
        assert store.list_users() == ([], None)

    def test_a_folder_without_safetensors_is_refused_saying_how_to_save(self, store, tmp_path):
        (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
        with pytest.raises(
            InvalidAdapterError,
            match=f"no adapter_model.safetensors in {tmp_path}.*safe_serialization",
        ):
            store.publish("alice", tmp_path, base=BASE)
        with pytest.raises(
            InvalidAdapterError, match=r"cannot read .*adapter_model.bin/adapter_model.safetensors"
        ):
            store.publish("alice", tmp_path / "adapter_model.bin", base=BASE)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({"metrics": {"nll": float("nan")}}, "metrics .* cannot be kept as JSON"),
            ({"metadata": {"x": float("inf")}}, "metadata .* cannot be kept as JSON"),
            ({"metadata": {"x": object()}}, "metadata .* cannot be kept as JSON"),
            ({"metadata": {"x": "\ud800"}}, "metadata .* cannot be kept as JSON"),
            ({"metadata": {1: "x"}}, "names that are not text"),
            (
                {"metadata": {"x": "y" * 300_000}},
                "metadata has 300.* bytes as JSON, at most 262144",
            ),
            ({"metadata": [1]}, "is not a mapping"),
            ({"base": {"weights": 1}}, "base .* does not map text to text"),
            ({"alpha": -0.1}, "alpha is -0.1: give a finite number of at least 0"),
            ({"alpha": float("inf")}, "alpha is inf"),
            ({"tau": 0}, "tau is 0: give a number above 0 and at most 1"),
            ({"tau": 1.5}, "tau is 1.5"),
            ({"tau": "1"}, "tau is '1'"),
            ({"idempotency_key": ""}, "idempotency key '' is not 1 to 256"),
        ],
    )
    def test_unusable_facts_are_refused_and_nothing_is_stored(
        self, store, backend, files, arguments, said
    ):
        with pytest.raises(InvalidAdapterError, match=said):
            store.publish("alice", files(), **({"base": BASE} | arguments))
        assert backend.list_folder("users") == []

    def test_sizes_beyond_the_limits_are_refused_from_memory_and_from_a_folder(
        self, place, peft_folder, files
    ):
        small = AdapterStore(place, limits=Limits(weights_bytes=100))
        for given in (files(), peft_folder):
            with pytest.raises(
                InvalidAdapterError,
                match="safetensors is larger than the 100 bytes that this store",
            ):
                small.publish("alice", given, base=BASE)
        version = AdapterStore(place).publish("alice", files(), base=BASE)
        with pytest.raises(InvalidAdapterError, match="more than the 100 that this store reads"):
            small.fetch(version)


class TestJobs:
    def test_a_retried_job_publishes_once(self, store, backend, files):
        first = store.publish("alice", files(1), base=BASE, idempotency_key="job-7")
        later = store.publish("alice", files(2), base=BASE)
        assert store.publish("alice", files(3), base=BASE, idempotency_key="job-7") == first
        assert store.versions("alice") == [first, later]
        assert store.active("alice") == later.version
        assert (
            store.publish("bob", files(3), base=BASE, idempotency_key="job-7").user_key
            != first.user_key
        )
        assert store.publish("alice", files(3), base=BASE, idempotency_key="job-8") not in (
            first,
            later,
        )

    def test_the_same_job_run_at_once_in_many_threads_publishes_once(self, store, backend, files):
        with ThreadPoolExecutor(8) as pool:
            jobs = [
                pool.submit(store.publish, "alice", files(n), base=BASE, idempotency_key="job")
                for n in range(8)
            ]
            published = {job.result().version for job in jobs}
        [version] = store.versions("alice")
        assert published == {version.version}
        data = [key for key in all_keys(backend) if "/versions/" in key]
        assert len(data) == 2
        store.fetch(version)

    def test_a_publisher_that_expects_another_active_version_is_refused_and_leaves_nothing(
        self, store, backend, files
    ):
        first = store.publish("alice", files(1), base=BASE, expected_active=None)
        second = store.publish("alice", files(2), base=BASE, expected_active=first.version)
        before = all_keys(backend)
        for expected in (first.version, None):
            with pytest.raises(
                PublishConflictError,
                match=f"'{second.version}' active where .*nothing was published",
            ):
                store.publish("alice", files(3), base=BASE, expected_active=expected)
        assert all_keys(backend) == before
        assert store.resolve("alice") == second

    def test_of_many_that_expect_the_same_active_version_one_wins(self, store, files):
        first = store.publish("alice", files(), base=BASE)
        barrier = threading.Barrier(6)

        def publish(number):
            barrier.wait()
            try:
                return store.publish(
                    "alice", files(number), base=BASE, expected_active=first.version
                )
            except PublishConflictError:
                return None

        with ThreadPoolExecutor(6) as pool:
            won = [version for version in pool.map(publish, range(6)) if version]
        assert len(won) == 1
        assert store.versions("alice") == [first, *won]

    def test_concurrent_publishes_are_all_kept_in_one_order(self, store, files):
        with ThreadPoolExecutor(6) as pool:
            published = list(
                pool.map(lambda n: store.publish("alice", files(n), base=BASE), range(12))
            )
        versions = store.versions("alice")
        assert {version.version for version in versions} == {
            version.version for version in published
        }
        [head], _ = store.list_users()
        assert head.seq == 12
        assert head.active == versions[-1].version

    def test_an_interrupted_publish_leaves_nothing(self, files, place, backend):
        class Interrupted:
            """Stops as Ctrl-C would, between the files."""

            url = backend.url
            get, stat = backend.get, backend.stat
            list_folder, delete = backend.list_folder, backend.delete

            def put_if_absent(self, key, data):
                if key.endswith("adapter_config.json"):
                    raise KeyboardInterrupt
                backend.put_if_absent(key, data)

        with pytest.raises(KeyboardInterrupt):
            AdapterStore(Interrupted()).publish("alice", files(), base=BASE)
        assert all_keys(backend) == backend.list_folder("staging") == []
        assert AdapterStore(place).versions("alice") == []

    def test_a_commit_whose_answer_was_lost_is_recognised(self, files, place, backend):
        class Deaf:
            """Writes the log entry, but reports, as a retrying client may, that it was there already."""

            url = backend.url
            get, stat = backend.get, backend.stat
            list_folder, delete = backend.list_folder, backend.delete

            def put_if_absent(self, key, data):
                backend.put_if_absent(key, data)
                if "/log/" in key:
                    raise FileExistsError(key)

        version = AdapterStore(Deaf()).publish("alice", files(), base=BASE)
        assert AdapterStore(place).versions("alice") == [version]
        assert AdapterStore(place).list_users()[0][0].seq == 1

    def test_a_commit_that_failed_after_it_became_visible_keeps_its_files(
        self, files, place, backend
    ):
        class Unsure:
            """Fails after the entry is there, as an fsync of the folder may."""

            url = backend.url
            get, stat = backend.get, backend.stat
            list_folder, delete = backend.list_folder, backend.delete

            def put_if_absent(self, key, data):
                backend.put_if_absent(key, data)
                if "/log/" in key:
                    raise BackendError("the folder could not be synced")

        with pytest.raises(BackendError, match="could not be synced"):
            AdapterStore(Unsure()).publish("alice", files(5), base=BASE)
        store = AdapterStore(place)
        assert store.fetch(store.resolve("alice")) == files(5)

    def test_storage_that_goes_away_in_mid_publish_is_reported_as_it_first_failed(
        self, files, backend
    ):
        class Leaving:
            """Is gone for good from the log entry on."""

            url = backend.url
            get, stat = backend.get, backend.stat
            list_folder, delete = backend.list_folder, backend.delete

            def put_if_absent(self, key, data):
                if "/log/" in key:
                    self.get = self.stat = self.list_folder = self.delete = self.refuse
                    raise BackendError("it went away")
                backend.put_if_absent(key, data)

            def refuse(self, *_):
                raise BackendError("it is still gone")

        with pytest.raises(BackendError, match="it went away"):
            AdapterStore(Leaving()).publish("alice", files(), base=BASE)


class TestFarAway:
    """How often storage is asked where each time is a way over the network."""

    @pytest.fixture
    def remote(self, backend):
        class Remote:
            url = "s3://bucket"

            def __init__(self):
                self.asked = []

            def __getattr__(self, verb):
                def ask(key, *rest):
                    self.asked.append(verb)
                    return getattr(backend, verb)(key, *rest)

                return ask

            def get(self, key, max_bytes):
                return self.__getattr__("get")(key, max_bytes)

            def stat(self, key):
                return self.__getattr__("stat")(key)

            def put_if_absent(self, key, data):
                return self.__getattr__("put_if_absent")(key, data)

            def list_folder(self, folder):
                return self.__getattr__("list_folder")(folder)

            def delete(self, key):
                return self.__getattr__("delete")(key)

        return Remote()

    def test_a_warm_resolve_takes_two_looks_and_a_fetch_two_reads_more(self, remote, files):
        store = AdapterStore(remote)
        version = store.publish("alice", files(1), base=BASE)
        remote.asked.clear()
        assert store.resolve("alice") == version
        assert remote.asked == ["stat", "stat"]
        remote.asked.clear()
        assert store.fetch(version) == files(1)
        assert sorted(remote.asked) == ["get", "get", "stat", "stat"]

    def test_a_publish_takes_three_writes_three_looks_and_a_list(self, remote, files):
        store = AdapterStore(remote)
        store.publish("alice", files(1), base=BASE)
        remote.asked.clear()
        store.publish("alice", files(2), base=BASE)
        assert sorted(remote.asked) == ["list_folder", *["put_if_absent"] * 3, *["stat"] * 3]

    def test_the_root_is_looked_at_again_after_a_while_and_a_new_store_is_noticed(
        self, remote, backend, files, monkeypatch
    ):
        store = AdapterStore(remote)
        store.publish("alice", files(1), base=BASE)
        if isinstance(backend, LocalBackend):
            shutil.rmtree(backend.path_of("users"))
        for key in all_keys(backend, "users"):
            backend.delete(key)
        backend.delete(store_layout.ROOT_FILE)
        with pytest.raises(AdapterNotFoundError):
            store.resolve("alice")
        other = AdapterStore(backend)
        version = other.publish("alice", files(2), base=BASE)
        monkeypatch.setattr("time.monotonic", lambda clock=time.monotonic: clock() + 120)
        assert store.resolve("alice") == version
