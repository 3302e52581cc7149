"""Damaged and hostile input, chosen and shrunk by hypothesis.

The same damage, for as long as you like and with seeds: benchmarks/store_torture.py fuzz.
"""

import contextlib
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import store_fuzz

from adapter_store import AdapterStore, AdapterStoreError, InvalidAdapterError, MemoryBackend
from adapter_store.conformance import make_adapter

KINDS = [
    store_fuzz.fuzz_entry,
    store_fuzz.fuzz_root,
    store_fuzz.fuzz_weights,
    store_fuzz.fuzz_user_id,
    store_fuzz.fuzz_archive,
]


@pytest.fixture(scope="module")
def stored():
    """A folder with a store of one user, and that user's archive."""
    with tempfile.TemporaryDirectory() as name:
        store = AdapterStore(Path(name) / "store")
        for number in range(2):
            store.publish(
                "alice", make_adapter(number), base={"weights": "w"}, metrics={"dpo": {"nll": 1.5}}
            )
        yield Path(name), store.export_user("alice", Path(name) / "alice.tar").read_bytes()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(chance=st.randoms(use_true_random=False))
def test_only_the_stores_own_errors_come_out(stored, kind, chance):
    folder, archive = stored
    before = store_fuzz.snapshot(folder, "store", "fuzzed.tar")
    with contextlib.suppress(AdapterStoreError):
        kind(folder, chance, archive)
    assert store_fuzz.snapshot(folder, "store", "fuzzed.tar") == before
    versions = AdapterStore(folder / "store").versions("alice")
    assert [version.user_id for version in versions] == ["alice", "alice"]


@settings(max_examples=150, deadline=None)
@given(user_id=st.text(max_size=40) | st.text(st.characters(), min_size=1, max_size=5))
def test_any_text_is_a_user_of_its_own_or_is_refused(user_id):
    store = AdapterStore(MemoryBackend())
    store.publish("alice", make_adapter(1, 32), base={})
    try:
        version = store.publish(user_id, make_adapter(2, 32), base={})
    except InvalidAdapterError:
        assert [head.user_id for head in store.list_users()[0]] == ["alice"]
        return
    assert store.resolve(user_id) == version
    assert store.fetch(store.resolve("alice")) == make_adapter(2 if user_id == "alice" else 1, 32)
