"""One suite on every backend that comes along, plain and encrypted."""

import pytest

from adapter_store import AdapterStore, LocalBackend, MemoryBackend
from adapter_store.backends.protocol import open_backend
from adapter_store.conformance import AdapterStoreConformance
from adapter_store.keys import FileKeys


class TestLocal(AdapterStoreConformance):
    @pytest.fixture
    def backend(self, tmp_path):
        return LocalBackend(tmp_path / "store")


class TestMemory(AdapterStoreConformance):
    @pytest.fixture
    def backend(self):
        return MemoryBackend()


class TestS3(AdapterStoreConformance):
    @pytest.fixture
    def backend(self, s3_url):
        return open_backend(s3_url)


class TestEncryptedAndCached(AdapterStoreConformance):
    """The same promises where everything is sealed, and fetched through one cache."""

    @pytest.fixture
    def backend(self, tmp_path):
        self.cache = tmp_path / "cache"
        self.keys = FileKeys.create(tmp_path / "keys")
        return MemoryBackend()

    def store(self, backend, **options):
        return AdapterStore(backend, keys=self.keys, cache=self.cache, **options)
