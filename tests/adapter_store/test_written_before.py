"""A store that an earlier release wrote, as it lies in data/: read, changed and written on.

It is a plain store of one user, "alice", with two versions; the first was activated again.
"""

import shutil
from pathlib import Path

import pytest

from adapter_store import AdapterStore, MemoryBackend
from adapter_store.conformance import make_adapter
from adapter_store.layout import ADAPTER_FILES

WRITTEN = Path(__file__).parent / "data" / "store_of_format_2"
FIRST, SECOND = "20261126T150034Z-a00db74c91df", "20261126T150034Z-20449c0cc762"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(WRITTEN, tmp_path / "store")


@pytest.fixture
def store(folder):
    return AdapterStore(folder)


def test_its_versions_are_read_with_all_that_is_known_of_them(store):
    first, second = store.versions("alice")
    assert (first.version, second.version) == (FIRST, SECOND)
    assert store.resolve("alice", base={"weights": "w", "model": "another name"}) == first
    assert (first.metrics, first.alpha, first.tau) == ({"nll": 2.5}, 0.1, 0.2)
    assert second.metadata == {"instruction": "Schreibe wie ich"}
    assert (first.idempotency_key, second.idempotency_key) == (None, "job-2")
    for version in (first, second):
        [written] = WRITTEN.rglob(version.version)
        assert store.fetch(version) == {
            name: (written / name).read_bytes() for name in ADAPTER_FILES
        }


def test_its_history_goes_on(store):
    third = store.publish("alice", make_adapter(3), base={"weights": "w"})
    assert store.fetch(store.resolve("alice")) == make_adapter(3)
    assert store.rollback("alice").version == FIRST
    assert store.rollback("alice").version == SECOND
    changes = [(change.operation, change.active) for change in store.history("alice")]
    assert changes == [
        ("publish", FIRST),
        ("publish", SECOND),
        ("activate", FIRST),
        ("publish", third.version),
        ("rollback", FIRST),
        ("rollback", SECOND),
    ]
    assert [change.reason for change in store.history("alice")][:3] == [
        "first",
        "",
        "it read better",
    ]


def test_a_job_that_it_published_is_not_published_again(store):
    again = store.publish("alice", make_adapter(4), base={}, idempotency_key="job-2")
    assert again == store.versions("alice")[1]


def test_it_is_verified_collected_moved_and_erased(store, folder, tmp_path):
    assert store.verify().ok
    assert store.gc().problems == []
    other = AdapterStore(MemoryBackend())
    head = other.import_user(store.export_user("alice", tmp_path / "alice.tar"))
    assert [v.digest for v in head.versions] == [v.digest for v in store.versions("alice")]
    store.erase_user("alice")
    assert store.versions("alice") == []
    assert not list(folder.rglob("*.safetensors"))
