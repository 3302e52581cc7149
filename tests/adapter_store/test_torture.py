"""What benchmarks/store_torture.py does for hours, done for a moment; and the checker itself."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapter_store import AdapterStore, BackendError, Limits, MemoryBackend

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MANY = Limits(live_versions=1000)


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


torture = load("store_torture")
model = sys.modules["store_linear"]
fuzzing = sys.modules["store_fuzz"]


@pytest.fixture(autouse=True)
def children_find_the_package(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(BENCHMARKS.parent), *sys.path]))


class TestKill:
    def test_on_a_local_folder(self, tmp_path):
        figures = torture.kill(str(tmp_path / "store"), rounds=4)
        assert figures["acknowledged"] >= 4 * 3

    def test_on_object_storage(self, s3_url):
        figures = torture.kill(s3_url, rounds=2, writers=2, longest=0.2, num_bytes=3000)
        assert figures["acknowledged"] >= 2 * 2


class TestRace:
    def test_of_eight_processes_every_publish_is_kept_in_one_order(self, tmp_path):
        assert torture.race(str(tmp_path / "store"), processes=8, each=2)["kept"] == 16


class TestErase:
    def test_under_load_no_answer_begins_after_it(self, tmp_path):
        figures = torture.erase(str(tmp_path / "store"), tmp_path, seconds=1.5)
        assert figures["erasures"] > 5
        assert figures["answers"] > 100


class TestFull:
    def test_a_full_disk_is_a_clear_error_each_time_and_loses_nothing(self, tmp_path):
        try:
            with torture.small_disk(tmp_path / "disk", 3_000_000) as disk:
                figures = torture.full(disk)
        except BackendError as error:
            pytest.skip(str(error))
        assert figures["published"] > 2

    def test_a_read_only_disk_is_a_clear_error_and_stays_readable(self, tmp_path, files):
        try:
            with torture.small_disk(tmp_path / "disk", 3_000_000) as disk:
                store = AdapterStore(disk / "store")
                version = store.publish("alice", files(1), base={})
                subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
                for call in (
                    lambda: store.publish("alice", files(2), base={}),
                    lambda: AdapterStore(disk / "store").prepare("alice"),
                    lambda: store.delete_version("alice", version.version),
                    lambda: store.erase_user("alice"),
                    lambda: store.gc(),
                ):
                    said = "read-only file system: choose a store on a writable one"
                    with pytest.raises(BackendError, match=said):
                        call()
                fresh = AdapterStore(disk / "store")
                assert fresh.fetch(fresh.resolve("alice")) == files(1)
                assert fresh.verify().ok
        except BackendError as error:
            pytest.skip(str(error))


class TestLinearizable:
    @pytest.mark.parametrize(
        ("kind", "rounds"), [("local", 6), ("memory", 10), ("encrypted", 3), ("s3", 2)]
    )
    def test_an_order_explains_every_answer(self, kind, rounds, tmp_path, keys, request):
        url = request.getfixturevalue("s3_url") if kind == "s3" else ""

        def open_store():
            name = os.urandom(6).hex()
            location = tmp_path / name
            if kind == "memory":
                location = MemoryBackend()
            elif kind == "s3":
                location = url.replace("/prefix?", f"/{name}?")
            master_keys = keys if kind == "encrypted" else None
            return AdapterStore(location, keys=master_keys, limits=MANY)

        figures = model.linear(open_store, rounds=rounds)
        assert figures["calls"] >= 2 * 24

    def test_the_checker_refuses_what_no_order_explains(self):
        def call(kind, result, start, end, argument=None):
            return model.Call(kind, argument, result, start, end)

        published = [call("publish", "v1", 0, 1), call("publish", "v2", 2, 3)]
        assert model.explains([*published, call("resolve", "v2", 4, 5)])
        assert model.explains([*published, call("resolve", "v1", 1.5, 5)])
        assert not model.explains([*published, call("resolve", "v1", 4, 5)])  # a stale reader
        assert not model.explains([*published, call("resolve", None, 4, 5)])  # a lost publish
        erased = [*published, call("erase", None, 4, 5)]
        assert not model.explains([*erased, call("resolve", "v2", 6, 7)])
        assert not model.explains([*erased, call("activate", "v1", 6, 7, "v1")])
        back = [*published, call("rollback", "v1", 4, 5)]
        assert model.explains([*back, call("resolve", "v1", 6, 7)])
        assert not model.explains([*published, call("rollback", "none", 4, 5)])

    def test_the_checker_knows_a_publish_that_was_seen_and_then_refused(self):
        """A long run gave it: committed, resolved by a reader, erased, and only then refused."""

        def call(kind, result, start, end):
            return model.Call(kind, None, result, start, end)

        refused, erased = call("publish", "refused", 0, 10), call("erase", None, 2, 9)
        seen = call("resolve", "v9", 3, 4)
        assert model.explains([refused, seen, erased, call("resolve", None, 11, 12)])
        assert not model.explains([refused, erased, call("resolve", "v9", 11, 12)])
        assert not model.explains([seen, erased])

    def test_a_store_that_believes_its_memory_is_caught(self, tmp_path, monkeypatch):
        """The same rounds on a store with warm readers that do not look again: it can fail."""
        look = AdapterStore._head

        def believing(self, user_id):
            log = self._opener.open().log if self.exists() else None
            known = log and log._remembered.get(log.user_key(user_id))
            return known.head if known else look(self, user_id)

        monkeypatch.setattr(AdapterStore, "_head", believing)
        with pytest.raises(AssertionError, match="no order explains"):
            model.linear(lambda: AdapterStore(MemoryBackend(), limits=MANY), rounds=20)


class TestFuzz:
    def test_only_the_stores_own_errors_come_out(self):
        figures = fuzzing.fuzz(minutes=0.05, seed=int.from_bytes(os.urandom(4), "little"))
        assert figures["cases"] > 50
