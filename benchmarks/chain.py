"""The training chain as the benchmarks run it; served by a `worker.Worker`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets.utils.logging import disable_progress_bar
from ours import products
from roofline import Work
from worker import Setting, peak_memory

from langchain_cope.engine import Base, Engine, load_base
from langchain_cope.history.items import Item
from langchain_cope.training.encode import fit
from langchain_cope.training.pipeline import train_user
from langchain_cope.training.progress import Monitor
from langchain_cope.training.recipe import Negatives, Recipe


class Training:
    """The chain for a user's items on one engine, as `personalize` runs it."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._base = load_base(setting.base, device=setting.device)
        self._engine = Engine.of(self._base)
        disable_progress_bar()

    def train(self, rows: Sequence[Mapping[str, str]]) -> dict[str, float]:
        """Train on items of `prompt` and `completion`; return the seconds of each stage."""
        items = as_items(rows)
        monitor = Monitor()
        self._engine.drop_caches()
        with TemporaryDirectory() as folder:
            train_user(self._engine, items, self._recipe(items), Path(folder), monitor)
        return monitor.timings

    def sft_pass(self, rows: Sequence[Mapping[str, str]]) -> tuple[Work, int]:
        """Return what SFT has to do for these items once, and how many times it does so.

        A token takes two operations a weight forwards and two backwards, as frozen weights have no
        gradient; the output head does so for completions only. A batch reads the weights twice.
        """
        items = as_items(rows)
        recipe = self._recipe(items)
        examples, _ = fit(self._base, items, recipe.max_length, recipe.max_words)
        answered = sum(len(example.completion_ids) for example in examples)
        read = sum(len(example.prompt_ids) for example in examples) + answered
        parts = products(self._engine)
        head = parts[-1].weight.numel()
        layers = sum(product.weight.numel() for product in parts[:-1])
        num_batches = -(-len(examples) // recipe.sft.batch_size)
        num_bytes = 2 * num_batches * (layers + head) * self._base.dtype.itemsize
        flops = 4.0 * (layers * read + head * answered)
        dtype = str(self._base.dtype).removeprefix("torch.")
        return Work(num_bytes, {dtype: flops}), int(recipe.sft.epochs)

    def num_parameters(self) -> int:
        """Return those of the base, tied ones counted once."""
        return self._base.num_parameters

    def peak_memory(self) -> int:
        """Return the peak of this process, in bytes."""
        return peak_memory(self._setting.device)

    def _recipe(self, items: Sequence[Item]) -> Recipe:
        return whole_chain(self._base, items)


def whole_chain(base: Base, items: Sequence[Item]) -> Recipe:
    """Return the default recipe with every stage, also where it would leave some out."""
    return replace(Recipe.for_model(base, items), negatives=Negatives())


def as_items(rows: Sequence[Mapping[str, str]]) -> list[Item]:
    """Return rows of `prompt` and `completion` as items."""
    return [Item(prompt=row["prompt"], completion=row["completion"]) for row in rows]
