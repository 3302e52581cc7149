"""Publishes that are repeated, that compete, that fail half-way or are not answered."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hooked_backend import HookedBackend

from adapter_store import AdapterStore, BackendError, PublishConflictError
from adapter_store.conformance import all_keys, at_once

BASE = {"weights": "w"}


@pytest.fixture
def store(location):
    return AdapterStore(location)


class TestJobs:
    def test_a_retried_job_publishes_once(self, store, files):
        first = store.publish("alice", files(1), base=BASE, idempotency_key="job-7")
        later = store.publish("alice", files(2), base=BASE)
        assert store.publish("alice", files(3), base=BASE, idempotency_key="job-7") == first
        assert store.versions("alice") == [first, later]
        assert store.active("alice") == later.version
        bobs = store.publish("bob", files(3), base=BASE, idempotency_key="job-7")
        assert bobs.user_key != first.user_key
        third = store.publish("alice", files(3), base=BASE, idempotency_key="job-8")
        assert third not in (first, later)

    def test_the_same_job_run_at_once_in_many_threads_publishes_once(self, store, backend, files):
        with ThreadPoolExecutor(8) as pool:
            jobs = [
                pool.submit(store.publish, "alice", files(n), base=BASE, idempotency_key="job")
                for n in range(8)
            ]
            published = {job.result().version for job in jobs}
        [version] = store.versions("alice")
        assert published == {version.version}
        data = [key for key in all_keys(backend, "users") if "/versions/" in key]
        assert len(data) == 2
        store.fetch(version)

    def test_a_publisher_that_expects_another_active_version_is_refused(
        self, store, backend, files
    ):
        first = store.publish("alice", files(1), base=BASE, expected_active=None)
        second = store.publish("alice", files(2), base=BASE, expected_active=first.version)
        before = all_keys(backend, "users")
        said = f"'{second.version}' active where .*nothing was published"
        for expected in (first.version, None):
            with pytest.raises(PublishConflictError, match=said):
                store.publish("alice", files(3), base=BASE, expected_active=expected)
        assert all_keys(backend, "users") == before
        assert store.resolve("alice") == second

    def test_of_many_that_expect_the_same_active_version_one_wins(self, store, files):
        first = store.publish("alice", files(), base=BASE)

        def publish(number):
            expected = first.version
            try:
                return store.publish("alice", files(number), base=BASE, expected_active=expected)
            except PublishConflictError:
                return None

        winners = [version for version in at_once(6, publish) if version]
        assert len(winners) == 1
        assert store.versions("alice") == [first, *winners]

    def test_concurrent_publishes_are_all_kept_in_one_order(self, store, files):
        with ThreadPoolExecutor(6) as pool:
            published = list(
                pool.map(lambda n: store.publish("alice", files(n), base=BASE), range(12))
            )
        versions = store.versions("alice")
        assert {v.version for v in versions} == {v.version for v in published}
        [head], _ = store.list_users()
        assert head.seq == 12
        assert head.active == versions[-1].version


class TestFailures:
    def test_an_interrupted_publish_leaves_nothing(self, files, location, backend):
        def interrupt(key):
            if key.endswith("adapter_config.json"):  # as Ctrl-C would, between the files
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            AdapterStore(HookedBackend(backend, interrupt)).publish("alice", files(), base=BASE)
        assert all_keys(backend, "users") == backend.list_folder("staging") == []
        assert AdapterStore(location).versions("alice") == []

    def test_a_commit_without_its_answer_is_recognised(self, files, location, backend):
        def lose_the_answer(key):
            if "/log/" in key:  # as a retrying client may report it
                raise FileExistsError(key)

        deaf = HookedBackend(backend, after=lose_the_answer)
        version = AdapterStore(deaf).publish("alice", files(), base=BASE)
        assert AdapterStore(location).versions("alice") == [version]
        assert AdapterStore(location).list_users()[0][0].seq == 1

    def test_a_commit_that_failed_after_it_became_visible_keeps_its_files(
        self, files, location, backend
    ):
        def fail(key):
            if "/log/" in key:  # after the entry is there, as an fsync of the folder may
                raise BackendError("the folder could not be synced")

        unsure = HookedBackend(backend, after=fail)
        with pytest.raises(BackendError, match="could not be synced"):
            AdapterStore(unsure).publish("alice", files(5), base=BASE)
        store = AdapterStore(location)
        assert store.fetch(store.resolve("alice")) == files(5)

    def test_storage_lost_in_mid_publish_is_reported_as_it_first_failed(self, files, backend):
        leaving = HookedBackend(backend)

        def refuse(*_):
            raise BackendError("it is still gone")

        def leave(key):
            if "/log/" in key:  # gone for good from the log entry on
                leaving.get = leaving.stat = leaving.list_folder = leaving.delete = refuse
                raise BackendError("it went away")

        leaving.before = leave
        with pytest.raises(BackendError, match="it went away"):
            AdapterStore(leaving).publish("alice", files(), base=BASE)
