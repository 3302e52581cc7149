"""Writes that land late, or lose their answer.

Nothing erased is served again, and nothing listed lacks its files.
"""

import threading
from datetime import timedelta

import pytest
from hooked_backend import HookedBackend, once

from adapter_store import (
    AdapterNotFoundError,
    AdapterStore,
    BackendError,
    FileKeys,
    MemoryBackend,
    PublishConflictError,
    UserErasedError,
)
from adapter_store.conformance import all_keys, make_adapter
from adapter_store.layout import ROOT_FILE, entry_key, keys_folder, log_folder, numbered
from adapter_store.vault import STORE

BASE = {"weights": "w"}


@pytest.mark.parametrize("reads_itself", [True, False], ids=["read", "committed"])
def test_a_remembered_head_is_not_taken_for_a_late_entry(reads_itself):
    """The late entry lands where the head was, after an erasure."""
    backend = MemoryBackend()
    writer, slow_backend = AdapterStore(backend), HookedBackend(backend)
    first, second = (writer.publish("alice", make_adapter(n, 64), base=BASE) for n in range(2))
    reader, slow, other = AdapterStore(backend), AdapterStore(slow_backend), AdapterStore(backend)
    seen = []

    def overtaken():
        (other if reads_itself else reader).activate("alice", first.version)
        assert reader.resolve("alice").version == first.version
        writer.activate("alice", second.version)
        writer.erase_user("alice")

    def looked_at():
        with pytest.raises(AdapterNotFoundError):
            reader.resolve("alice")
        seen.append(reader)

    slow_backend.before, slow_backend.after = once(overtaken), once(looked_at)
    with pytest.raises(UserErasedError):
        slow.publish("alice", make_adapter(3, 64), base=BASE)
    assert seen == [reader]


@pytest.mark.parametrize("num_entries", [1, 2])
def test_a_late_entry_is_not_taken_for_the_one_listed(num_entries):
    """It lands between the listing and the reading."""
    backend = MemoryBackend()
    writer, slow_backend = AdapterStore(backend), HookedBackend(backend)
    versions = [writer.publish("alice", make_adapter(n, 64), base=BASE) for n in range(num_entries)]
    key = entry_key(versions[0].user_key, num_entries)
    late = backend.get(key, 10**6)
    acts = ["once"]

    def list_folder(folder):
        names = backend.list_folder(folder)
        if folder.endswith("/log") and acts:
            acts.pop()
            writer.erase_user("alice")
            writer.erase_user("alice")
            backend.put_if_absent(key, late)
        return names

    slow_backend.list_folder = list_folder
    reader = AdapterStore(slow_backend)
    for _ in range(2):
        with pytest.raises(AdapterNotFoundError):
            reader.resolve("alice")
    assert acts == []


def test_an_overtaken_entry_is_taken_back_after_the_older_ones():
    """Out of order, a warm reader of the one before would believe that nothing came after."""
    backend = MemoryBackend()
    slow_backend, killed_backend = HookedBackend(backend), HookedBackend(backend)
    reader = AdapterStore(backend)
    key = reader.publish("alice", make_adapter(1, 64), base=BASE).user_key
    reader.resolve("alice")

    def kill(key):
        if key.startswith("users/"):
            raise KeyboardInterrupt

    def erase_and_be_killed():
        killed_backend.delete = kill
        with pytest.raises(KeyboardInterrupt):
            AdapterStore(killed_backend).erase_user("alice")

    slow_backend.after = once(erase_and_be_killed)
    with pytest.raises(UserErasedError):
        AdapterStore(slow_backend).publish("alice", make_adapter(2, 64), base=BASE)
    with pytest.raises(AdapterNotFoundError):
        reader.resolve("alice")
    assert backend.list_folder(log_folder(key)) == [numbered(3)]


def test_a_reader_overtaken_at_every_look_gets_an_answer():
    backend = MemoryBackend()
    writer, hooked = AdapterStore(backend), HookedBackend(backend)
    versions = [writer.publish("alice", make_adapter(n, 64), base=BASE).version for n in range(2)]
    looks = []

    def get(key, max_bytes):
        if "/log/" in key:
            looks.append(key)
            writer.activate("alice", versions[(len(looks) + 1) % 2])
        return backend.get(key, max_bytes)

    hooked.get = get
    assert AdapterStore(hooked).resolve("alice").version in versions
    assert len(looks) < 5


class Sleeper:
    """A publish in a thread, which sleeps before the put of its log entry, and again after it."""

    def __init__(self, backend, seed):
        self.hooked = HookedBackend(backend)
        self.asleep, self.may_put, self.landed, self.may_go_on = (
            threading.Event() for _ in range(4)
        )
        self.hooked.before, self.hooked.after = self.before, self.after
        self.result = None
        self.thread = threading.Thread(target=self.publish, args=(AdapterStore(self.hooked), seed))
        self.thread.start()
        assert self.asleep.wait(30)

    def publish(self, store, seed):
        try:
            self.result = store.publish("alice", make_adapter(seed, 64), base=BASE)
        except Exception as error:
            self.result = error

    def before(self, key):
        if "/log/" in key and not self.asleep.is_set():
            self.asleep.set()
            assert self.may_put.wait(30)

    def after(self, key):
        if "/log/" in key and not self.landed.is_set():
            self.landed.set()
            assert self.may_go_on.wait(30)

    def put(self):
        self.may_put.set()
        assert self.landed.wait(30)

    def finish(self):
        self.may_go_on.set()
        self.thread.join(30)
        assert isinstance(self.result, UserErasedError)


def test_of_two_entries_that_land_after_an_erasure_none_stays():
    """The first finds the second below it, and must not leave its own for that."""
    backend = MemoryBackend()
    store = AdapterStore(backend)
    key = store.publish("alice", make_adapter(1, 64), base=BASE).user_key
    second = Sleeper(backend, 2)
    store.publish("alice", make_adapter(21, 64), base=BASE)
    third = Sleeper(backend, 3)
    store.publish("alice", make_adapter(31, 64), base=BASE)
    store.erase_user("alice")
    third.put()
    second.put()
    third.finish()
    second.finish()
    assert backend.list_folder(log_folder(key)) == [numbered(4)]
    assert store.verify().ok


def test_a_reader_between_two_late_entries_believes_neither():
    backend = MemoryBackend()
    store, hooked, acts = AdapterStore(backend), HookedBackend(backend), ["erase", "land"]
    store.prepare("alice")
    first = Sleeper(backend, 1)
    store.publish("alice", make_adapter(11, 64), base=BASE)
    second = Sleeper(backend, 2)
    store.publish("alice", make_adapter(21, 64), base=BASE)

    def list_folder(folder):
        names = backend.list_folder(folder)
        if folder.endswith("/log") and acts[:1] == ["erase"]:
            acts.pop(0)
            store.erase_user("alice")
            store.erase_user("alice")
            second.put()
        return names

    def get(key, max_bytes):
        data = backend.get(key, max_bytes)
        if key.endswith("/log/" + numbered(2)) and acts[:1] == ["land"]:
            acts.pop(0)
            first.put()
        return data

    hooked.list_folder, hooked.get = list_folder, get
    reader = AdapterStore(hooked)
    for _ in range(2):
        with pytest.raises(AdapterNotFoundError):
            reader.resolve("alice")
    assert acts == []
    second.finish()
    first.finish()
    with pytest.raises(AdapterNotFoundError):
        reader.resolve("alice")


@pytest.mark.parametrize(
    "is_deleted", [True, False], ids=["in a hole", "before the erasure's entry"]
)
def test_a_change_that_was_never_logged_is_not_reported_as_made(is_deleted):
    """Another one won against the same state, and the user was erased since."""
    backend = MemoryBackend()
    other, hooked = AdapterStore(backend), HookedBackend(backend)
    versions = [other.publish("alice", make_adapter(n, 64), base=BASE).version for n in range(3)]

    def overtake():
        other.activate("alice", versions[0], expected_active=versions[2])
        if is_deleted:
            other.delete_version("alice", versions[1])
        other.erase_user("alice")

    hooked.before = once(overtake)
    with pytest.raises(PublishConflictError, match="has none active where"):
        AdapterStore(hooked).activate("alice", versions[1], expected_active=versions[2])


def test_a_late_erasure_takes_nothing_published_after_the_other():
    backend = MemoryBackend()
    other, hooked = AdapterStore(backend), HookedBackend(backend)
    other.publish("alice", make_adapter(1, 64), base=BASE)
    again = []

    def erase_and_publish():
        other.erase_user("alice")
        again.append(other.publish("alice", make_adapter(2, 64), base=BASE))

    hooked.after = once(erase_and_publish)
    AdapterStore(hooked).erase_user("alice")
    assert other.fetch(other.resolve("alice")) == make_adapter(2, 64)
    assert other.versions("alice") == again


def test_a_change_followed_by_damage_says_that_its_fate_is_unknown():
    backend = MemoryBackend()
    other, hooked = AdapterStore(backend), HookedBackend(backend)
    versions = [other.publish("alice", make_adapter(n, 64), base=BASE) for n in range(2)]
    hooked.after = once(
        lambda: backend.put_if_absent(entry_key(versions[0].user_key, 4), b"damaged")
    )
    with pytest.raises(BackendError, match="it is unknown whether it counted"):
        AdapterStore(hooked).activate("alice", versions[0].version)


@pytest.mark.parametrize("others", ["activate", "publish"])
def test_a_change_with_an_entry_trimmed_meanwhile_is_not_made_twice(others):
    """It is unknown whether it counted, and the error says so."""
    backend = MemoryBackend()
    other, hooked = AdapterStore(backend), HookedBackend(backend)
    versions = [other.publish("alice", make_adapter(n, 64), base=BASE).version for n in range(6)]

    def change_and_trim():
        for number in range(102):
            if others == "activate":
                other.activate("alice", versions[number % 2])
            else:
                other.publish("alice", make_adapter(number, 64), base=BASE)
        other.gc(entry_age=timedelta(0))

    hooked.after = once(change_and_trim)
    slow = AdapterStore(hooked)
    call = {
        "activate": lambda: slow.rollback("alice"),
        "publish": lambda: slow.publish("alice", make_adapter(7, 64), base=BASE),
    }[others]
    with pytest.raises(BackendError, match="it is unknown whether it counted"):
        call()
    reader = AdapterStore(backend)
    assert reader.verify().ok
    assert reader.fetch(reader.resolve("alice"))


@pytest.mark.parametrize("folder", ["keys/", "probes/"])
def test_a_put_that_lost_its_first_answer_is_done(folder, keys):
    """The storage client tries again, and is told that the file exists."""
    backend = MemoryBackend()

    def lose_the_answer(key):
        if key.startswith(folder):
            raise FileExistsError(key)

    store = AdapterStore(HookedBackend(backend, after=lose_the_answer), keys=keys)
    store.prepare("bob")
    version = store.publish("alice", make_adapter(1, 64), base=BASE)
    store.gc()
    fresh = AdapterStore(backend, keys=keys)
    assert fresh.fetch(fresh.resolve("alice")) == make_adapter(1, 64)
    assert version == fresh.resolve("alice")


class TestAPublishWithoutAnAnswer:
    """The put of its entry fails for the caller, who cannot know whether it lands."""

    @pytest.fixture(params=["plain", "encrypted"])
    def keys(self, request, tmp_path):
        return FileKeys.create(tmp_path / "keys") if request.param == "encrypted" else None

    @pytest.fixture(
        params=[BackendError("timeout"), KeyboardInterrupt()], ids=["timeout", "Ctrl-C"]
    )
    def late(self, request, keys):
        """The storage, and the puts of entries that were not answered."""
        backend = MemoryBackend()
        hooked, puts = HookedBackend(backend), []
        AdapterStore(backend, keys=keys).prepare("bob")

        def put(key, data):
            if "/log/" in key:
                puts.append((key, data))
                raise request.param
            backend.put_if_absent(key, data)

        hooked.put = put
        with pytest.raises(type(request.param)):
            AdapterStore(hooked, keys=keys).publish("alice", make_adapter(1, 64), base=BASE)
        return backend, puts

    def test_has_its_files_where_it_lands_later(self, late, keys):
        backend, ((key, data),) = late
        backend.put_if_absent(key, data)
        store = AdapterStore(backend, keys=keys)
        assert store.fetch(store.resolve("alice")) == make_adapter(1, 64)

    def test_is_cleared_up_by_gc_where_it_does_not(self, late, keys):
        backend, _ = late
        store = AdapterStore(backend, keys=keys)
        assert store.verify().orphans == 1
        store.gc(grace=timedelta(0))
        assert store.verify().orphans == 0
        assert len(all_keys(backend, "keys")) == (1 if keys else 0)  # the store's own
        version = store.publish("alice", make_adapter(2, 64), base=BASE)
        assert store.fetch(version) == make_adapter(2, 64)

    def test_that_failed_before_leaves_nothing(self, keys):
        backend = MemoryBackend()

        def fail(key):
            if key.endswith("adapter_config.json"):
                raise BackendError("timeout")

        failing = HookedBackend(backend, fail)
        with pytest.raises(BackendError):
            AdapterStore(failing, keys=keys).publish("alice", make_adapter(1, 64), base=BASE)
        assert not [key for key in all_keys(backend, "users") if "/versions/" in key]


class TestAStoreIsMade:
    def test_with_its_pepper_where_the_root_files_answer_was_lost(self, keys):
        """The storage client tries again, and is told that the file exists: it is our own."""
        backend = MemoryBackend()

        def lose_the_answer(key):
            if key == ROOT_FILE:
                raise FileExistsError(key)

        hooked = HookedBackend(backend, after=lose_the_answer)
        AdapterStore(hooked, keys=keys).publish("alice", make_adapter(1, 64), base=BASE)
        store = AdapterStore(backend, keys=keys)
        assert store.fetch(store.resolve("alice")) == make_adapter(1, 64)

    def test_without_the_pepper_of_the_maker_that_came_second(self, keys):
        backend = MemoryBackend()

        def overtake(key):
            if key == ROOT_FILE:
                AdapterStore(backend, keys=keys).prepare("bob")

        hooked = HookedBackend(backend, overtake)
        AdapterStore(hooked, keys=keys).publish("alice", make_adapter(1, 64), base=BASE)
        assert len(all_keys(backend, keys_folder(STORE))) == 1
        assert AdapterStore(backend, keys=keys).versions("alice")
