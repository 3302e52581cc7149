"""Writes that land late, or whose answer is lost: nothing erased is served again, nothing listed lacks its files."""

import pytest

from adapter_store import AdapterNotFoundError, AdapterStore, MemoryBackend, UserErasedError
from adapter_store.conformance import make_adapter

BASE = {"weights": "w"}


class Hooked:
    """A backend that lets a test in around each put."""

    url = "hooked://"

    def __init__(self, backend):
        self.get, self.stat, self.list_folder, self.delete = (
            backend.get,
            backend.stat,
            backend.list_folder,
            backend.delete,
        )
        self.put = backend.put_if_absent
        self.before = self.after = lambda key: None

    def put_if_absent(self, key, data):
        self.before(key)
        self.put(key, data)
        self.after(key)


def once(act):
    """Return a hook that acts at the first put of a log entry only."""
    left = [act]

    def hook(key):
        if "/log/" in key and left:
            left.pop()()

    return hook


@pytest.mark.parametrize("reads_itself", [True, False], ids=["read", "committed"])
def test_a_head_in_memory_is_not_taken_for_a_late_entry_in_its_place_after_an_erasure(reads_itself):
    backend = MemoryBackend()
    writer, slow_backend = AdapterStore(backend), Hooked(backend)
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
