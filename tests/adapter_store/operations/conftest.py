from pathlib import Path

import pytest

from adapter_store import AdapterStore
from adapter_store.conformance import make_adapter


@pytest.fixture
def archive(local: AdapterStore, tmp_path: Path) -> Path:
    """The archive of a user of `local` with two versions."""
    for number in range(2):
        local.publish("alice", make_adapter(number), base={"weights": "w"}, metrics={"nll": number})
    return local.export_user("alice", tmp_path / "alice.tar")


@pytest.fixture
def other(tmp_path: Path) -> AdapterStore:
    """Another store."""
    return AdapterStore(tmp_path / "other")
