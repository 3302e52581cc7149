"""How likely each item was when training first came to it: evidence that costs nothing.

At that moment the adapter has been trained on other items only, so that the item is held out from
it (prequential evaluation: A. P. Dawid, 1984). The likelihoods are by-products of the forward that
SFT makes anyway. The adapter is unfinished then, and its dropout is on: what it gains so far is, if
anything, less than what the finished one will.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel

from langchain_cope.training.encode import Encoded

FIRST_SIGHT = "first_sight.json"  # beside the folder of the adapter that SFT leaves


@dataclass(frozen=True)
class Sight:
    """An item at the moment before the first step that trains on it."""

    index: int
    """Index of the item in the history."""
    step: int
    """Steps of the optimizer that were done before; 0: the adapter was still the base."""
    nll: float
    """Nats per completion token under the adapter of that moment."""


class FirstSights:
    """Hears the forwards of a training, and keeps what each item was like at first."""

    def __init__(self, model: PeftModel, examples: Sequence[Encoded]) -> None:
        """Listen to `model` while it trains on `examples`."""
        self._index_of: dict[tuple[int, ...], int] = {}
        for example in examples:
            # Of items that are the same after they were cut, the first one alone is unseen.
            ids = (*example.prompt_ids, *example.completion_ids)
            self._index_of.setdefault(ids, example.index)
        self._num_batches = 0
        self.sights: list[Sight] = []
        model.register_forward_hook(self._hear, with_kwargs=True)

    def _hear(
        self, model: PeftModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not self._index_of or not model.training:
            return
        rows = kwargs["input_ids"].tolist()
        lengths = kwargs["attention_mask"].sum(dim=1).tolist()
        mask = output.label_mask
        nll = -output.log_probs.detach().sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        for row, length, of_row in zip(rows, lengths, nll.tolist(), strict=True):
            index = self._index_of.pop(tuple(row[:length]), None)
            if index is not None:
                self.sights.append(Sight(index, self._num_batches, of_row))
        self._num_batches += 1
