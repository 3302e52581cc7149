"""Memory that is not in use any more is given back while the server runs."""

from pathlib import Path

import psutil
import pytest
import torch
from serving.conftest import running, wait_until

from langchain_cope.serving import heap

MEGABYTES = 200


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def test_freed_memory_between_pieces_in_use_is_given_back(
    base: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(base, published, tmp_path):  # looks at the clock once a minute
        pieces = [torch.ones(25_000, dtype=torch.uint8) for _ in range(MEGABYTES * 40)]
        held = resident()
        in_use = pieces[::20]
        del pieces
        assert held - resident() < MEGABYTES << 19, "the C library keeps them in reserve"
    monkeypatch.setattr(heap, "TRIM_SECONDS", 0.05)
    with running(base, published, tmp_path):
        wait_until(lambda: held - resident() > MEGABYTES << 19)
    assert len(in_use) == MEGABYTES * 2
