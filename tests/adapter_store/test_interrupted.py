"""Storage that goes away at any step of any operation.

What is listed stays whole, and a second call does the rest.
"""

from datetime import timedelta

import pytest

from adapter_store import AdapterNotFoundError, AdapterStore, BackendError, FileKeys, MemoryBackend
from adapter_store.conformance import all_keys, make_adapter

BASE = {"weights": "w"}


class Failing(MemoryBackend):
    """Gone from the n-th write or removal on, done or not done, until it is repaired."""

    def __init__(self):
        super().__init__()
        self.left = None
        self.done_first = False

    def fail_after(self, count, done_first):
        self.left, self.done_first = count, done_first

    def repair(self):
        self.left = None

    def put_if_absent(self, key, data):
        self._step(lambda: MemoryBackend.put_if_absent(self, key, data))

    def delete(self, key):
        self._step(lambda: MemoryBackend.delete(self, key))

    def _step(self, act):
        if self.left is None:
            return act()
        self.left -= 1
        if self.left == -1 and self.done_first:
            act()
        if self.left < 0:
            raise BackendError("it went away")
        return act()


@pytest.fixture(params=["plain", "encrypted"])
def keys(request, tmp_path):
    return FileKeys.create(tmp_path / "keys") if request.param == "encrypted" else None


@pytest.fixture
def archive(tmp_path):
    other = AdapterStore(MemoryBackend())
    for number in (7, 8):
        other.publish("alice", make_adapter(number, 64), base=BASE)
    return other.export_user("alice", tmp_path / "alice.tar")


def operations(store, archive, keys):
    """Each operation, and what must hold once it has been called again without a failure."""

    def rotate():
        keys.add(f"key-{len(keys.names) + 1}")
        store.rotate_keys()

    def gone():
        with pytest.raises(AdapterNotFoundError):
            store.resolve("alice")
        left = all_keys(store._backend, "keys")  # the pepper's and carol's
        return len(left) == (0 if keys is None else 2)

    first = store.versions("alice")[0].version
    calls = {
        "publish": (
            lambda: store.publish("alice", make_adapter(5, 64), base=BASE, idempotency_key="job"),
            lambda: len([v for v in store.versions("alice") if v.idempotency_key == "job"]) == 1,
        ),
        "publish for a new user": (
            lambda: store.publish("bob", make_adapter(5, 64), base=BASE, idempotency_key="job"),
            lambda: len(store.versions("bob")) == 1,
        ),
        "activate": (
            lambda: store.activate("alice", first),
            lambda: store.active("alice") == first,
        ),
        "erase": (lambda: store.erase_user("alice"), gone),
        "import": (lambda: store.import_user(archive), lambda: len(store.versions("alice")) == 4),
        "gc": (lambda: store.gc(grace=timedelta(0)), lambda: store.verify().orphans == 0),
    }
    if keys is not None:
        calls["rotate"] = (rotate, lambda: store.rotate_keys() == 0)
    return calls


@pytest.mark.parametrize("done_first", [False, True], ids=["not done", "done and not answered"])
@pytest.mark.parametrize(
    "name", ["publish", "publish for a new user", "activate", "erase", "import", "gc", "rotate"]
)
def test_an_operation_that_fails_at_any_step_can_be_repeated(name, done_first, keys, archive):
    if name == "rotate" and keys is None:
        pytest.skip("a plain store has nothing to rotate")
    num_steps = 0
    for count in range(100):
        backend = Failing()
        store = AdapterStore(backend, keys=keys)
        for number in range(2):
            store.publish("alice", make_adapter(number, 64), base=BASE)
        store.publish("carol", make_adapter(3, 64), base=BASE)
        carol = store.resolve("carol")
        folder = f"users/{carol.user_key[:2]}/{carol.user_key[2:4]}/{carol.user_key}"
        backend.put_if_absent(
            f"{folder}/versions/20200101T000000Z-000000000000/adapter_config.json", b"left"
        )
        call, holds = operations(store, archive, keys)[name]
        backend.fail_after(count, done_first)
        try:
            call()
        except BackendError:
            num_steps += 1
        else:
            break
        finally:
            backend.repair()
        for looker in (store, AdapterStore(backend, keys=keys)):
            # An interrupted erasure says so; everything that is listed is whole.
            assert all(
                "left of an erasure" in problem
                for r in looker.verify().damaged
                for problem in r.problems
            )
            for user in ("alice", "bob", "carol"):
                for version in looker.versions(user):
                    looker.fetch(version)
            assert looker.fetch(looker.resolve("carol")) == make_adapter(3, 64)
        call()
        assert holds(), f"after a failure at step {count}"
        store.gc(grace=timedelta(0))
        assert store.verify().ok
        assert store.verify().orphans == 0
        listed = sum(len(head.versions) for head in store.list_users()[0])
        assert len([key for key in all_keys(backend, "users") if "/versions/" in key]) == 2 * listed
        assert all_keys(backend, "probes") == []
    assert num_steps >= {"publish": 3, "erase": 6, "import": 5, "gc": 4}.get(name, 1)
