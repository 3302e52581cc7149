"""Writers that sleep at the worst moment, told step by step."""

from datetime import timedelta

import pytest

from adapter_store import AdapterStore, LocalBackend, PublishConflictError, UserErasedError
from adapter_store.conformance import make_adapter


class Sleeping(LocalBackend):
    """Does something before the log entry is put."""

    before_entry = staticmethod(lambda: None)

    def put_if_absent(self, key, data):
        if "/log/" in key:
            act, self.before_entry = self.before_entry, lambda: None
            act()
        super().put_if_absent(key, data)


def test_a_late_entry_is_not_lost_below_a_later_head(root):
    backend = Sleeping(root)
    late, other = AdapterStore(backend), AdapterStore(root)
    first = other.publish("alice", make_adapter(1), base={})

    def meanwhile():
        other.erase_user("alice")
        other.publish("alice", make_adapter(2), base={})
        other.erase_user("alice")  # now the number after the first entry is free again

    backend.before_entry = meanwhile
    with pytest.raises(UserErasedError, match="was erased after the data"):
        late.publish("alice", make_adapter(3), base={})
    [log] = root.rglob("log")
    assert [path.name for path in log.iterdir()] == ["000000000004.json"]
    assert not list(root.rglob("*.safetensors"))
    assert first.version not in {version.version for version in other.versions("alice")}


def test_a_publisher_of_collected_files_writes_them_again_elsewhere(root):
    backend = Sleeping(root)
    late, other = AdapterStore(backend), AdapterStore(root)
    other.publish("alice", make_adapter(1), base={})
    collected = []
    backend.before_entry = lambda: collected.append(other.gc(grace=timedelta(0)).versions)
    version = late.publish("alice", make_adapter(3), base={})
    assert collected == [1]
    assert other.fetch(other.resolve("alice")) == make_adapter(3)
    assert other.active("alice") == version.version
    assert other.gc(grace=timedelta(0)).versions == 0


def test_a_publisher_of_a_user_erased_between_two_tries_is_refused(root):
    other = AdapterStore(root)
    other.publish("alice", make_adapter(1), base={})

    class Between(Sleeping):
        """Erases when the files of the first try, which a collection has taken, are removed."""

        def delete(self, key):
            super().delete(key)
            if key.endswith("adapter_model.safetensors"):
                other.erase_user("alice")

    backend = Between(root)
    backend.before_entry = lambda: other.gc(grace=timedelta(0))
    with pytest.raises(UserErasedError):
        AdapterStore(backend).publish("alice", make_adapter(2), base={})
    assert other.versions("alice") == []
    assert not list(root.rglob("*.safetensors"))


def test_a_publisher_collected_each_time_gives_up_and_leaves_nothing(root):
    other = AdapterStore(root)
    other.publish("alice", make_adapter(1), base={})

    class Always(LocalBackend):
        def put_if_absent(self, key, data):
            if "/log/" in key:
                other.gc(grace=timedelta(0))
            super().put_if_absent(key, data)

    with pytest.raises(PublishConflictError, match="collected as garbage 30 times"):
        AdapterStore(Always(root)).publish("alice", make_adapter(2), base={})
    assert len(list(root.rglob("*.safetensors"))) == 1


def test_a_change_erased_the_moment_it_is_made_was_made(root):
    """And a publish that was seen for that moment is refused, its files gone."""
    other = AdapterStore(root)

    class Erased(LocalBackend):
        def put_if_absent(self, key, data):
            super().put_if_absent(key, data)
            if "/log/" in key:
                seen.append(other.active("alice"))
                other.erase_user("alice")

    late = AdapterStore(Erased(root))
    seen = []
    first = other.publish("alice", make_adapter(1), base={})
    other.publish("alice", make_adapter(2), base={})
    assert late.activate("alice", first.version) == first
    assert seen == [first.version]
    with pytest.raises(UserErasedError, match="nothing of it is kept"):
        late.publish("alice", make_adapter(3), base={})
    assert seen[1] is not None
    assert other.versions("alice") == []
    assert not list(root.rglob("*.safetensors"))


def test_a_publish_during_an_erasure_is_refused_and_leaves_nothing(root):
    backend = Sleeping(root)
    late, other = AdapterStore(backend), AdapterStore(root)
    backend.before_entry = lambda: other.erase_user("alice")
    with pytest.raises(UserErasedError, match="was erased after the data"):
        late.publish("alice", make_adapter(3), base={})
    assert not list(root.rglob("*.safetensors"))


def test_a_late_eraser_takes_nothing_that_was_published_since(root):
    backend = Sleeping(root)
    late, other = AdapterStore(backend), AdapterStore(root)
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
