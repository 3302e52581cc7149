"""Arguments that cannot be accepted: refused with the reason, and nothing is stored."""

import pytest

from adapter_store import AdapterStore, InvalidAdapterError, Limits

BASE = {"architecture": "llama", "weights": "ab" * 32, "model": "starter", "quantization": "none"}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def store(location):
    return AdapterStore(location)


class TestFiles:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({CONFIG: None}, "expected exactly adapter_model.safetensors and"),
            ({"adapter_model.bin": b""}, "adapter_model.bin.*expected exactly"),
            ({"../evil": b""}, "../evil.*expected exactly"),
            ({CONFIG: "{}"}, "given as str, expected its content as bytes"),
            ({CONFIG: b"[]"}, "JSON list where an object is expected"),
            ({CONFIG: b"{"}, "adapter_config.json is not usable"),
            ({CONFIG: b"\xff{}"}, "adapter_config.json is not usable"),
            ({CONFIG: b"[" * 100_000}, "nested too deeply"),
            ({WEIGHTS: b""}, "not a whole safetensors file"),
        ],
    )
    def test_unusable_files_are_refused_and_nothing_is_stored(
        self, store, backend, files, changes, said
    ):
        changed = files() | changes
        if changed[CONFIG] is None:
            del changed[CONFIG]
        with pytest.raises(InvalidAdapterError, match=said):
            store.publish("alice", changed, base=BASE)
        assert backend.list_folder("users") == []
        assert store.list_users() == ([], None)

    def test_a_folder_without_safetensors_is_refused_saying_how_to_save(self, store, tmp_path):
        (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
        said = f"no adapter_model.safetensors in {tmp_path}.*safe_serialization"
        with pytest.raises(InvalidAdapterError, match=said):
            store.publish("alice", tmp_path, base=BASE)
        said = r"cannot read .*adapter_model.bin/adapter_model.safetensors"
        with pytest.raises(InvalidAdapterError, match=said):
            store.publish("alice", tmp_path / "adapter_model.bin", base=BASE)

    def test_sizes_beyond_the_limits_are_refused_from_memory_and_folder(
        self, location, peft_folder, files
    ):
        small = AdapterStore(location, limits=Limits(weights_bytes=100))
        said = "safetensors is larger than the 100 bytes that this store"
        for source in (files(), peft_folder):
            with pytest.raises(InvalidAdapterError, match=said):
                small.publish("alice", source, base=BASE)
        version = AdapterStore(location).publish("alice", files(), base=BASE)
        with pytest.raises(InvalidAdapterError, match="more than the 100 that this store reads"):
            small.fetch(version)


class TestArguments:
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
    def test_an_impossible_user_id_is_refused_everywhere(
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
    def test_unusable_values_are_refused_and_nothing_is_stored(
        self, store, backend, files, arguments, said
    ):
        with pytest.raises(InvalidAdapterError, match=said):
            store.publish("alice", files(), **({"base": BASE} | arguments))
        assert backend.list_folder("users") == []

    @pytest.mark.parametrize("reason", ["x" * 1001, 7, "\ud800", None])
    def test_an_impossible_reason_is_refused(self, store, files, reason):
        version = store.publish("alice", files(), base=BASE).version
        said = "is not up to 1000 characters of text: say it shorter"
        for call in (
            lambda: store.publish("alice", files(), base=BASE, reason=reason),
            lambda: store.activate("alice", version, reason=reason),
            lambda: store.rollback("alice", reason=reason),
            lambda: store.delete_version("alice", version, reason=reason),
        ):
            with pytest.raises(InvalidAdapterError, match=said):
                call()
        assert len(store.versions("alice")) == 1

    @pytest.mark.parametrize("data_seq", [-1, 5, True, "1", 1.0])
    def test_an_impossible_data_seq_is_refused(self, store, files, data_seq):
        store.publish("alice", files(), base=BASE)
        said = r"data_seq is .* the user's log is at 1: give what data_seq"
        with pytest.raises(InvalidAdapterError, match=said):
            store.publish("alice", files(), base=BASE, data_seq=data_seq)
        assert len(store.versions("alice")) == 1
