"""How often storage is asked where each call goes over the network."""

import shutil
import time

import pytest

from adapter_store import AdapterNotFoundError, AdapterStore, LocalBackend
from adapter_store.conformance import all_keys
from adapter_store.layout import ROOT_FILE

BASE = {"weights": "w"}


class Remote:
    """Another backend's storage, which notes what it is asked."""

    url = "s3://bucket"

    def __init__(self, backend):
        self.backend = backend
        self.asked = []

    def get(self, key, max_bytes):
        return self.ask("get", key, max_bytes)

    def stat(self, key):
        return self.ask("stat", key)

    def put_if_absent(self, key, data):
        return self.ask("put_if_absent", key, data)

    def list_folder(self, folder):
        return self.ask("list_folder", folder)

    def delete(self, key):
        return self.ask("delete", key)

    def ask(self, verb, *arguments):
        self.asked.append(verb)
        return getattr(self.backend, verb)(*arguments)


@pytest.fixture
def remote(backend):
    return Remote(backend)


def test_a_warm_resolve_takes_two_looks_and_a_fetch_two_reads_more(remote, files):
    store = AdapterStore(remote)
    version = store.publish("alice", files(1), base=BASE)
    remote.asked.clear()
    assert store.resolve("alice") == version
    assert remote.asked == ["stat", "stat"]
    remote.asked.clear()
    assert store.fetch(version) == files(1)
    assert sorted(remote.asked) == ["get", "get", "stat", "stat"]


def test_a_publish_takes_three_writes_three_looks_and_a_list(remote, files):
    store = AdapterStore(remote)
    store.publish("alice", files(1), base=BASE)
    remote.asked.clear()
    store.publish("alice", files(2), base=BASE)
    assert sorted(remote.asked) == ["list_folder", *["put_if_absent"] * 3, *["stat"] * 3]


def test_a_new_store_in_its_place_is_noticed_after_a_while(remote, backend, files, monkeypatch):
    store = AdapterStore(remote)
    store.publish("alice", files(1), base=BASE)
    if isinstance(backend, LocalBackend):
        shutil.rmtree(backend.path_of("users"))
    for key in all_keys(backend, "users"):
        backend.delete(key)
    backend.delete(ROOT_FILE)
    with pytest.raises(AdapterNotFoundError):
        store.resolve("alice")
    other = AdapterStore(backend)
    version = other.publish("alice", files(2), base=BASE)
    monkeypatch.setattr("time.monotonic", lambda clock=time.monotonic: clock() + 120)
    assert store.resolve("alice") == version
