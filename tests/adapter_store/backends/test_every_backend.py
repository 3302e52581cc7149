"""What a store promises on every backend."""

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
    PublishConflictError,
    layout,
)
from adapter_store.conformance import all_keys

BASE = {"architecture": "llama", "weights": "ab" * 32, "model": "starter", "quantization": "none"}


@pytest.fixture
def store(location):
    return AdapterStore(location)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def hidden_names(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


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
        assert contents(folder) == files(3)
        assert store.fetch_dir(store.resolve("alice")) == folder

    def test_an_exported_version_is_a_plain_peft_folder(self, store, files, tmp_path):
        first = store.publish("alice", files(1), base=BASE)
        store.publish("alice", files(2), base=BASE)
        active = store.export_peft("alice", tmp_path / "new" / "active")
        older = store.export_peft("alice", str(tmp_path / "older"), first.version)
        assert contents(active) == files(2)
        assert contents(older) == files(1)
        assert hidden_names(tmp_path) == []

    def test_an_export_never_mixes_with_what_a_folder_holds(self, store, files, tmp_path):
        store.publish("alice", files(), base=BASE)
        full = tmp_path / "full"
        full.mkdir()
        (full / "adapter_model.bin").write_bytes(b"other")
        with pytest.raises(BackendError, match=r"full.*name a new or an empty folder"):
            store.export_peft("alice", full)
        assert [path.name for path in full.iterdir()] == ["adapter_model.bin"]
        assert hidden_names(tmp_path) == []

    def test_preparing_makes_an_empty_store_and_leaves_no_probe(
        self, store, location, backend, files
    ):
        store.prepare("alice")
        assert store.list_users() == ([], None)
        assert all_keys(backend, "probes") == backend.list_folder("probes") == []
        version = store.publish("alice", files(), base=BASE)
        AdapterStore(location).prepare("alice")
        assert store.resolve("alice") == version

    def test_a_second_object_on_the_same_location_sees_it(self, store, location, files):
        version = store.publish("alice", files(), base=BASE)
        assert AdapterStore(location).resolve("alice") == version


class TestUsers:
    def test_an_empty_store_has_no_user(self, store):
        said = r"user 'alice' has no adapter in .*personalize"
        with pytest.raises(AdapterNotFoundError, match=said):
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
        assert head.active == first.version
        assert (head.operation, head.operation_version) == ("publish", second.version)
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

    def test_activating_goes_back_and_writes_nothing_where_it_is_active(self, store, files):
        first = store.publish("alice", files(1), base=BASE)
        store.publish("alice", files(2), base=BASE)
        assert store.activate("alice", first.version) == first
        assert store.resolve("alice") == first
        before = store.list_users()
        store.activate("alice", first.version)
        assert store.list_users() == before

    def test_an_unknown_version_is_refused_and_the_newest_named(self, store, files):
        version = store.publish("alice", files(), base=BASE)
        said = f"no version '../../x' .*the newest is {version.version}"
        for call in (store.resolve, store.activate, store.delete_version):
            with pytest.raises(AdapterNotFoundError, match=said):
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
        assert backend.list_folder(layout.versions_folder(gone.user_key)) == [kept.version]
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

    def test_a_reader_of_a_version_deleted_in_between_is_told_so(self, store, files):
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
        folder = layout.version_folder(version.user_key, version.version)
        backend.delete(f"{folder}/adapter_config.json")
        said = rf"{version.version}/adapter_config.json is missing"
        with pytest.raises(IntegrityError, match=said):
            store.fetch(version)

    def test_beyond_twenty_the_oldest_inactive_version_goes_with_its_files(
        self, store, backend, files
    ):
        versions = [store.publish("alice", files(0), base=BASE)]
        for number in range(1, 22):
            versions.append(store.publish("alice", files(number), base=BASE, activate=False))
        expected = [versions[0], *versions[3:]]
        assert store.versions("alice") == expected
        assert store.active("alice") == versions[0].version
        folder = layout.versions_folder(versions[0].user_key)
        assert backend.list_folder(folder) == sorted(version.version for version in expected)
        for version in expected:
            store.fetch(version)

    def test_a_store_that_keeps_one_keeps_the_active_and_the_new_one(self, location, files):
        store = AdapterStore(location, limits=Limits(live_versions=1))
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
    @pytest.fixture
    def publish(self, store, files):
        """Publishes so many versions and returns their ids."""
        return lambda count: [
            store.publish("alice", files(n), base=BASE).version for n in range(count)
        ]

    def test_it_skips_what_was_deleted_and_never_stays_where_it_is(self, store, publish):
        first, second, third = publish(3)
        store.activate("alice", first)
        store.activate("alice", third)  # active in turn: first, second, third, first
        store.delete_version("alice", second)
        assert store.rollback("alice").version == first
        assert store.rollback("alice").version == third
        # Of two versions no more than two steps are kept.
        with pytest.raises(AdapterNotFoundError, match="no earlier active version"):
            store.rollback("alice")

    def test_after_the_active_version_was_deleted_it_goes_to_the_one_before(self, store, publish):
        first, second = publish(2)
        store.delete_version("alice", second)
        assert store.active("alice") is None
        assert store.rollback("alice").version == first

    def test_of_an_unknown_user_or_one_without_versions_it_says_so(self, store, files):
        with pytest.raises(AdapterNotFoundError, match="user 'bob' has no adapter"):
            store.rollback("bob")
        version = store.publish("alice", files(), base=BASE).version
        store.delete_version("alice", version)
        with pytest.raises(AdapterNotFoundError, match="user 'alice' has no adapter"):
            store.rollback("alice")

    def test_the_stack_of_earlier_versions_does_not_grow_for_ever(self, store, publish):
        first, second = publish(2)
        for number in range(50):
            store.activate("alice", (first, second)[number % 2])
        [head], _ = store.list_users()
        assert len(head.previous) <= 2

    def test_activating_and_going_back_only_from_the_expected_version(self, store, publish):
        first, second = publish(2)
        before = store.history("alice")
        for call in (
            lambda: store.activate("alice", first, expected_active=first),
            lambda: store.rollback("alice", expected_active=None),
        ):
            said = f"has '{second}' active where .* was expected"
            with pytest.raises(PublishConflictError, match=said):
                call()
        assert store.history("alice") == before
        assert store.rollback("alice", expected_active=second).version == first


class TestBase:
    def test_the_same_base_under_another_name_or_quantized_is_accepted(self, store, files):
        store.publish("alice", files(), base=BASE)
        same = {**BASE, "model": "/models/starter", "quantization": "int8"}
        assert store.resolve("alice", base=same)

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
