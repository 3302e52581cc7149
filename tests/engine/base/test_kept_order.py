"""The faster order of products is measured once a machine."""

from pathlib import Path

import pytest
import torch

from langchain_cope.engine.base import kept_order, user_cache
from langchain_cope.engine.base.kept_order import matmul_order
from langchain_cope.engine.forward.matmul_order import MatmulOrder

MODEL = torch.nn.Linear(512, 512).requires_grad_(False)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setattr(user_cache, "user_cache_path", lambda *_, **__: tmp_path / "cache")
    return tmp_path / "cache"


def measures(monkeypatch: pytest.MonkeyPatch, *rows: int) -> None:
    """Let a measurement find that W comes first for those numbers of rows."""
    order = MatmulOrder(frozenset(rows))
    monkeypatch.setattr(MatmulOrder, "measured", lambda _: order)


@pytest.mark.parametrize("found", [(), (2,), (64, 2, 16)])
def test_later_processes_take_the_order_found_first(
    cache: Path, monkeypatch: pytest.MonkeyPatch, found: tuple[int, ...]
) -> None:
    measures(monkeypatch, *found)
    assert matmul_order(MODEL).weight_first == set(found)
    measures(monkeypatch, 4)
    assert matmul_order(MODEL).weight_first == set(found)
    assert matmul_order(torch.nn.Linear(512, 600).requires_grad_(False)).weight_first == {4}
    assert matmul_order(MODEL.to(torch.bfloat16)).weight_first == {4}
    MODEL.to(torch.float32)
    monkeypatch.setattr(kept_order, "cpu_features", lambda: "another")
    assert matmul_order(MODEL).weight_first == {4}


@pytest.mark.parametrize("damage", ["", "3", "2 x", "\xff"])
def test_a_damaged_entry_costs_a_measurement_only(
    cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    measures(monkeypatch, 2)
    matmul_order(MODEL)
    (entry,) = (cache / "order").iterdir()
    entry.write_text(damage, encoding="latin-1")
    measures(monkeypatch, 4)
    assert matmul_order(MODEL).weight_first == {4}
    assert entry.read_text() == "4"


def test_a_model_of_small_layers_is_not_measured(cache: Path) -> None:
    assert matmul_order(torch.nn.Linear(4, 4)).weight_first == frozenset()
    assert not cache.exists()
