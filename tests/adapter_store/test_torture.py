"""What benchmarks/store_torture.py does for hours, for a moment; and the checker itself, on histories that are wrong."""

import importlib.util
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from adapter_store import (
    AdapterStore,
    BackendError,
    FileKeys,
    Limits,
    LocalBackend,
    MemoryBackend,
    PublishConflictError,
    UserErasedError,
)
from adapter_store.conformance import make_adapter

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


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
                    with pytest.raises(
                        BackendError,
                        match="read-only file system: choose a store on a writable one",
                    ):
                        call()
                fresh = AdapterStore(disk / "store")
                assert fresh.fetch(fresh.resolve("alice")) == files(1)
                assert fresh.verify().ok
        except BackendError as error:
            pytest.skip(str(error))


class TestLinearizable:
    @pytest.mark.parametrize("kind", ["local", "memory", "encrypted", "s3"])
    def test_an_order_explains_every_answer(self, kind, tmp_path, request):
        keys = FileKeys.create(tmp_path / "keys") if kind == "encrypted" else None
        url = request.getfixturevalue("s3_url") if kind == "s3" else ""

        def open_store():
            name = os.urandom(6).hex()
            place = {"memory": MemoryBackend(), "s3": url.replace("/prefix?", f"/{name}?")}.get(
                kind, tmp_path / name
            )
            return AdapterStore(place, keys=keys, limits=Limits(live_versions=1000))

        figures = model.linear(
            open_store, rounds={"local": 6, "memory": 10, "encrypted": 3, "s3": 2}[kind]
        )
        assert figures["calls"] >= 2 * 24

    def test_the_checker_refuses_what_no_order_explains(self):
        def call(kind, result, start, end, argument=None):
            return model.Call(kind, argument, result, start, end)

        published = [call("publish", "v1", 0, 1), call("publish", "v2", 2, 3)]
        assert model.explains([*published, call("resolve", "v2", 4, 5)])
        assert model.explains([*published, call("resolve", "v1", 1.5, 5)])
        assert not model.explains([*published, call("resolve", "v1", 4, 5)])  # a stale reader
        assert not model.explains([*published, call("resolve", None, 4, 5)])  # a lost publish
        assert not model.explains(
            [*published, call("erase", None, 4, 5), call("resolve", "v2", 6, 7)]
        )
        assert not model.explains(
            [*published, call("erase", None, 4, 5), call("activate", "v1", 6, 7, "v1")]
        )
        assert model.explains(
            [*published, call("rollback", "v1", 4, 5), call("resolve", "v1", 6, 7)]
        )
        assert not model.explains([*published, call("rollback", "none", 4, 5)])

    def test_the_checker_knows_what_was_seen_of_a_publish_that_ran_into_an_erasure(self):
        """Found by a long run: committed, resolved by somebody, erased, and only then told to be refused."""

        def call(kind, result, start, end):
            return model.Call(kind, None, result, start, end)

        refused, erased = call("publish", "refused", 0, 10), call("erase", None, 2, 9)
        assert model.explains(
            [refused, call("resolve", "v9", 3, 4), erased, call("resolve", None, 11, 12)]
        )
        assert not model.explains([refused, erased, call("resolve", "v9", 11, 12)])
        assert not model.explains([call("resolve", "v9", 3, 4), erased])

    def test_a_store_that_believes_its_memory_is_caught(self, tmp_path, monkeypatch):
        """The same rounds on a store whose warm readers do not look again: so the check above can fail."""
        look = AdapterStore._head

        def believing(self, user_id):
            log = self._opener.open().log if self.exists() else None
            known = log and log._remembered.get(log.user_key(user_id))
            return known.head if known else look(self, user_id)

        monkeypatch.setattr(AdapterStore, "_head", believing)
        with pytest.raises(AssertionError, match="no order explains"):
            model.linear(
                lambda: AdapterStore(MemoryBackend(), limits=Limits(live_versions=1000)), rounds=20
            )


class TestFuzz:
    def test_only_the_stores_own_errors_come_out(self):
        figures = fuzzing.fuzz(minutes=0.05, seed=int.from_bytes(os.urandom(4), "little"))
        assert figures["cases"] > 50


class TestLateWriters:
    """Writers that sleep at the worst moment, told step by step."""

    class Sleeping(LocalBackend):
        """Does something before the log entry is put."""

        before_entry = staticmethod(lambda: None)

        def put_if_absent(self, key, data):
            if "/log/" in key:
                act, self.before_entry = self.before_entry, lambda: None
                act()
            super().put_if_absent(key, data)

    def test_whose_place_in_the_log_was_erased_twice_is_not_lost_below_the_head(self, tmp_path):
        backend = self.Sleeping(tmp_path / "store")
        late, other = AdapterStore(backend), AdapterStore(tmp_path / "store")
        first = other.publish("alice", make_adapter(1), base={})

        def meanwhile():
            other.erase_user("alice")
            other.publish("alice", make_adapter(2), base={})
            other.erase_user("alice")  # now the place after the first entry is free again

        backend.before_entry = meanwhile
        with pytest.raises(UserErasedError, match="was erased after the data"):
            late.publish("alice", make_adapter(3), base={})
        [log] = (tmp_path / "store").rglob("log")
        assert [path.name for path in log.iterdir()] == ["000000000004.json"]
        assert not list((tmp_path / "store").rglob("*.safetensors"))
        assert first.version not in {version.version for version in other.versions("alice")}

    def test_whose_files_were_collected_writes_them_again_elsewhere(self, tmp_path):
        backend = self.Sleeping(tmp_path / "store")
        late, other = AdapterStore(backend), AdapterStore(tmp_path / "store")
        other.publish("alice", make_adapter(1), base={})
        collected = []
        backend.before_entry = lambda: collected.append(other.gc(grace=timedelta(0)).versions)
        version = late.publish("alice", make_adapter(3), base={})
        assert collected == [1]
        assert other.fetch(other.resolve("alice")) == make_adapter(3)
        assert other.active("alice") == version.version
        assert other.gc(grace=timedelta(0)).versions == 0

    def test_whose_user_is_erased_between_two_tries_is_refused(self, tmp_path):
        other = AdapterStore(tmp_path / "store")
        other.publish("alice", make_adapter(1), base={})

        class Between(self.Sleeping):
            """Erases when the files of the first try, which a collection has taken, are removed."""

            def delete(self, key):
                super().delete(key)
                if key.endswith("adapter_model.safetensors"):
                    other.erase_user("alice")

        backend = Between(tmp_path / "store")
        backend.before_entry = lambda: other.gc(grace=timedelta(0))
        with pytest.raises(UserErasedError):
            AdapterStore(backend).publish("alice", make_adapter(2), base={})
        assert other.versions("alice") == []
        assert not list((tmp_path / "store").rglob("*.safetensors"))

    def test_for_whom_others_always_collect_gives_up_and_leaves_nothing(self, tmp_path):
        other = AdapterStore(tmp_path / "store")
        other.publish("alice", make_adapter(1), base={})

        class Always(LocalBackend):
            def put_if_absent(self, key, data):
                if "/log/" in key:
                    other.gc(grace=timedelta(0))
                super().put_if_absent(key, data)

        with pytest.raises(PublishConflictError, match="collected as garbage 30 times"):
            AdapterStore(Always(tmp_path / "store")).publish("alice", make_adapter(2), base={})
        assert len(list((tmp_path / "store").rglob("*.safetensors"))) == 1

    def test_whose_change_is_erased_the_moment_it_is_made_has_made_it(self, tmp_path):
        """And a publish that was seen for that moment is refused, its files gone."""
        other = AdapterStore(tmp_path / "store")

        class Erased(LocalBackend):
            def put_if_absent(self, key, data):
                super().put_if_absent(key, data)
                if "/log/" in key:
                    seen.append(other.active("alice"))
                    other.erase_user("alice")

        late = AdapterStore(Erased(tmp_path / "store"))
        seen = []
        first = other.publish("alice", make_adapter(1), base={})
        other.publish("alice", make_adapter(2), base={})
        assert late.activate("alice", first.version) == first
        assert seen == [first.version]
        with pytest.raises(UserErasedError, match="nothing of it is kept"):
            late.publish("alice", make_adapter(3), base={})
        assert seen[1] is not None
        assert other.versions("alice") == []
        assert not list((tmp_path / "store").rglob("*.safetensors"))

    def test_who_publishes_while_the_user_is_erased_is_refused_and_leaves_nothing(self, tmp_path):
        backend = self.Sleeping(tmp_path / "store")
        late, other = AdapterStore(backend), AdapterStore(tmp_path / "store")
        backend.before_entry = lambda: other.erase_user("alice")
        with pytest.raises(UserErasedError, match="was erased after the data"):
            late.publish("alice", make_adapter(3), base={})
        assert not list((tmp_path / "store").rglob("*.safetensors"))

    def test_an_eraser_late_itself_takes_nothing_that_was_published_since(self, tmp_path):
        backend = self.Sleeping(tmp_path / "store")
        late, other = AdapterStore(backend), AdapterStore(tmp_path / "store")
        other.publish("alice", make_adapter(1), base={})

        def meanwhile():
            other.erase_user("alice")
            other.publish("alice", make_adapter(2), base={})
            other.erase_user("alice")

        backend.before_entry = meanwhile
        late.erase_user("alice")
        kept = other.publish("alice", make_adapter(4), base={})
        assert other.fetch(kept) == make_adapter(4)
        assert other.verify().ok
