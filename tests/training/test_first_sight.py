"""What items were like before training came to them, on a tiny base that is really trained."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from langchain_cope.engine import Engine
from langchain_cope.evaluation.evaluate import item_nll
from langchain_cope.history.items import Item
from langchain_cope.training.encode import fit
from langchain_cope.training.first_sight import FIRST_SIGHT, Sight
from langchain_cope.training.progress import Monitor
from langchain_cope.training.recipe import Recipe
from langchain_cope.training.sft import train_sft


def sights(
    engine: Engine, items: list[Item], recipe: Recipe, monitor: Monitor, folder: Path
) -> list[Sight]:
    examples, _ = fit(engine.base, items, recipe.max_length, recipe.max_words)
    train_sft(engine.base, examples, recipe, folder / "sft", monitor)
    return [Sight(**row) for row in json.loads((folder / FIRST_SIGHT).read_text())]


def test_each_item_is_seen_once_and_at_first_as_by_the_base(
    engine: Engine, items: list[Item], recipe: Recipe, monitor: Monitor, tmp_path: Path
) -> None:
    seen = sights(engine, items, recipe, monitor, tmp_path)
    assert sorted(sight.index for sight in seen) == list(range(6))
    assert [sight.step for sight in seen] == [0, 0, 0, 0, 1, 1]  # batches of four
    of_base = item_nll(engine, items, recipe)
    for sight in seen[:4]:
        assert sight.nll == pytest.approx(of_base[sight.index], abs=1e-4)


def test_what_was_seen_late_is_what_the_steps_before_had_taught(
    engine: Engine, items: list[Item], recipe: Recipe, monitor: Monitor, tmp_path: Path
) -> None:
    certain = replace(recipe, sft=replace(recipe.sft, dropout=0.0, warmup=0.0, batch_size=3))
    both = sights(engine, items, certain, monitor, tmp_path)
    late = [sight for sight in both if sight.step == 1]
    of_base = item_nll(engine, items, certain)
    assert all(sight.nll != pytest.approx(of_base[sight.index], abs=1e-4) for sight in late)
    gain = sum(of_base[sight.index] - sight.nll for sight in late)
    assert gain > 0, "the items are alike, so what was learnt of some helps the others"


def test_of_items_that_are_the_same_only_the_first_is_unseen(
    engine: Engine, items: list[Item], recipe: Recipe, monitor: Monitor, tmp_path: Path
) -> None:
    seen = sights(engine, [*items[:2], items[0]], recipe, monitor, tmp_path)
    assert sorted(sight.index for sight in seen) == [0, 1]
