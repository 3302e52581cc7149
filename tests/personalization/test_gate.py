"""What was published in the moment of a cancel is taken back, and nothing else."""

from typing import Any

import pytest

from adapter_store import AdapterStore, AdapterVersion, Limits, MemoryBackend
from adapter_store.conformance import make_adapter
from langchain_cope.personalization.gate import Outcome, Publisher
from langchain_cope.training.progress import Monitor


def publish(store: AdapterStore, seed: int) -> AdapterVersion:
    return store.publish("alice", make_adapter(seed), base={"weights": "w"})


def publisher(store: AdapterStore) -> Publisher:
    unused: Any = None
    return Publisher(
        store=store,
        user="alice",
        engine=unused,
        training=unused,
        evaluation=unused,
        adapter="sft",
        recommended=unused,
        fault=None,
        trained=(),
        held_out=(),
        num_items=0,
        instruction=None,
        gate="always",
        min_gain=0.0,
        reference_adapter=None,
        job_key="a job",
        data_seq=0,
        monitor=Monitor(),
    )


def outcome(version: AdapterVersion, replaced: AdapterVersion) -> Outcome:
    return Outcome(version, "better", None, published_now=True, replaced=replaced.version)


def test_the_version_before_is_active_again() -> None:
    store = AdapterStore(MemoryBackend())
    first, second = publish(store, 1), publish(store, 2)
    publisher(store).withdraw(outcome(second, first))
    assert store.versions("alice") == [first]
    assert store.active("alice") == first.version


def test_what_another_process_publishes_in_between_stays_active(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = MemoryBackend()
    store, other = AdapterStore(backend), AdapterStore(backend)
    first, second = publish(store, 1), publish(store, 2)
    theirs = []
    activate = store.activate

    def activate_late(*args: Any, **options: Any) -> AdapterVersion:
        theirs.append(publish(other, 3))
        return activate(*args, **options)

    monkeypatch.setattr(store, "activate", activate_late)
    publisher(store).withdraw(outcome(second, first))
    assert store.versions("alice") == [first, *theirs]
    assert store.active("alice") == theirs[0].version


def test_where_the_version_before_is_no_longer_kept_none_is_active() -> None:
    store = AdapterStore(MemoryBackend(), limits=Limits(live_versions=1))
    first, second = publish(store, 1), publish(store, 2)
    assert store.versions("alice") == [second]
    publisher(store).withdraw(outcome(second, first))
    assert store.versions("alice") == []
