"""Keys and values of rows of different lengths: every row starts at position 0 of a place of its own.

Nothing is padded on the left: a row joins, leaves or moves without touching the others, and what lies beyond its length is masked.
Windows and other patterns are left to the masks; every layer keeps every position.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from langchain_cope.errors import ModelError

_SERVED = (DynamicLayer, DynamicSlidingWindowLayer)
_POSITIONS = 64  # room is taken in multiples of this
_KEEP_WHEN_IDLE = 64 << 20  # bytes that an idle engine keeps allocated

Block = list[tuple[Tensor, Tensor]]
"""Per layer the keys and values of one row, ``(heads, positions, size)`` each."""


@dataclass(frozen=True)
class LayerShape:
    """What one layer keeps of a position."""

    heads: int
    key_size: int
    value_size: int


def layer_shapes(model: PreTrainedModel) -> list[LayerShape | None]:
    """What each layer of ``model`` keeps, seen by running one token; None for a layer that reads another's.

    Raises ``ModelError``, by name, where a layer keeps anything but keys and values of plain attention.
    """
    cache = DynamicCache(config=model.config)
    other = sorted(
        {type(layer).__name__ for layer in cache.layers} - {kind.__name__ for kind in _SERVED}
    )
    name = cache_argument(model)
    if name is None:
        other = ["its forward takes no cache of keys and values"]
    if "local" in getattr(
        model.config, "attention_layers", ()
    ):  # GPT-Neo's, cut by position in the batch
        other = ["local attention of its own"]
    if not other and name is not None:
        model(
            input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device),
            use_cache=True,
            **{name: cache},
        )
        other = [] if any(map(_shape, cache.layers)) else ["its layers keep nothing in the cache"]
    if other:
        raise ModelError(
            f"{type(model).__name__} keeps a state that is not plain attention ({', '.join(other)}); "
            "the engine serves decoders whose every layer is full or sliding-window attention"
        )
    return [_shape(layer) for layer in cache.layers]


def cache_argument(model: PreTrainedModel) -> str | None:
    """What the forward of ``model`` calls its cache: ``past_key_values``, or ``cache`` from transformers 5.24 on."""
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in ("past_key_values", "cache") if name in accepted), None)


def _shape(layer: Any) -> LayerShape | None:
    if not layer.is_initialized:
        return None
    return LayerShape(layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1])


class KeyValues:
    """Room for the keys and values of rows, in every layer. Grows as asked; never read where nothing was written."""

    def __init__(
        self, shapes: Sequence[LayerShape | None], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shapes = shapes
        self._like = torch.empty(0, dtype=dtype, device=device)
        self.num_rows = self.num_positions = 0
        """What there is room for."""
        self.keys: list[Tensor] = []
        """Per layer ``(rows, heads, positions, size)``."""
        self.values: list[Tensor] = []
        self.clear()

    @property
    def bytes_per_position(self) -> int:
        """Of one row."""
        sizes = (s.heads * (s.key_size + s.value_size) for s in self._shapes if s is not None)
        return sum(sizes) * self._like.element_size()

    def rounded(self, positions: int) -> int:
        """Positions that are allocated where ``positions`` are needed."""
        return -(-positions // _POSITIONS) * _POSITIONS

    def bytes_for(self, rows: int, positions: int) -> int:
        """What `reserve` would have allocated in all."""
        rows, positions = self._enlarged(rows, positions)
        return rows * positions * self.bytes_per_position

    def reserve(self, rows: int, positions: int, *, exactly: bool = False) -> None:
        """Make room for that many rows of that many positions each; what is there stays.

        ``exactly``: also give up room beyond that, which earlier rows had.
        """
        wanted = (rows, self.rounded(positions)) if exactly else self._enlarged(rows, positions)
        if wanted == (self.num_rows, self.num_positions):
            return
        try:
            for states in (self.keys, self.values):
                for layer, old in enumerate(
                    states
                ):  # layer by layer: old and new are never both there whole
                    states[layer] = _resized(old, *wanted)
        finally:  # where memory ran out in between, what every layer has
            self.num_rows = min(states.shape[0] for states in (*self.keys, *self.values))
            self.num_positions = min(states.shape[2] for states in (*self.keys, *self.values))

    def _enlarged(self, rows: int, positions: int) -> tuple[int, int]:
        more = (
            self.num_rows + self.num_rows // 2 if rows > self.num_rows else self.num_rows
        )  # few, larger steps
        return max(rows, more), max(self.num_positions, self.rounded(positions))

    def write(
        self, layer: int, rows: Tensor, positions: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """Put ``keys`` and ``values`` ``(R, Q, heads, size)`` of one layer at ``positions`` ``(R, Q)`` of ``rows`` ``(R, 1)``."""
        self.keys[layer][rows, :, positions] = keys
        self.values[layer][rows, :, positions] = values

    def copy_row(self, source: "KeyValues", source_row: int, row: int, length: int) -> None:
        """Make ``row`` the first ``length`` positions of a row of ``source``, which may be this one; the rest of it is zeroed."""
        for mine, theirs in ((self.keys, source.keys), (self.values, source.values)):
            for target, states in zip(mine, theirs, strict=True):
                target[row, :, :length] = states[source_row, :, :length]
                target[row, :, length:] = 0

    def zero_row(self, row: int) -> None:
        """Nothing of an earlier row may be left where masked positions are multiplied by 0: 0 times NaN is NaN."""
        for states in (*self.keys, *self.values):
            states[row] = 0

    def read(self, row: int, start: int, end: int) -> Block:
        """A copy of positions ``start`` to ``end`` of a row, in one piece of memory: small ones that stay would litter the heap."""
        flat = self._like.new_empty(
            (end - start) * self.bytes_per_position // self._like.element_size()
        )
        sources = [
            states[row, :, start:end]
            for layer in zip(self.keys, self.values, strict=True)
            for states in layer
        ]
        parts = torch.split(flat, [source.numel() for source in sources])
        copies = [
            part.view(source.shape).copy_(source)
            for part, source in zip(parts, sources, strict=True)
        ]
        return list(zip(copies[::2], copies[1::2], strict=True))

    def fill(self, row: int, blocks: Sequence[Block]) -> None:
        """Write ``blocks`` one after the other from position 0 of ``row``."""
        for layer in range(len(self.keys)):
            for side, states in enumerate((self.keys[layer], self.values[layer])):
                joined = torch.cat([block[layer][side] for block in blocks], dim=1)
                states[row, :, : joined.shape[1]] = joined

    def clear(self) -> None:
        """Nobody is here: give the memory back where it is much."""
        if (
            not self.keys
            or self.num_rows * self.num_positions * self.bytes_per_position > _KEEP_WHEN_IDLE
        ):
            self.num_rows = self.num_positions = 0
            shapes = [shape or LayerShape(0, 0, 0) for shape in self._shapes]
            self.keys = [self._like.new_empty(0, s.heads, 0, s.key_size) for s in shapes]
            self.values = [self._like.new_empty(0, s.heads, 0, s.value_size) for s in shapes]


def _resized(old: Tensor, rows: int, positions: int) -> Tensor:
    new = old.new_zeros(rows, old.shape[1], positions, old.shape[3])
    kept = old[:rows, :, :positions]
    new[: kept.shape[0], :, : kept.shape[2]] = kept
    return new
