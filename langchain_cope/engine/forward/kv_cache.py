"""The key-value cache: keys and values of rows of different lengths, each from position 0 on.

Nothing is padded on the left: a row joins, leaves or moves without touching the others, and what
lies beyond its length is masked. Windows and other patterns are left to the masks; every layer
keeps every position.
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

_SERVED = {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}
_POSITIONS = 64  # positions are allocated in multiples of this
_KEEP_WHEN_IDLE = 64 << 20  # bytes that an idle engine keeps allocated

Block = list[tuple[Tensor, Tensor]]
"""Per layer the keys and values of one row, `(heads, positions, size)` each."""


@dataclass(frozen=True)
class LayerShape:
    """What one layer keeps of a position."""

    heads: int
    key_size: int
    value_size: int


def layer_shapes(model: PreTrainedModel) -> list[LayerShape | None]:
    """Return what each layer of `model` keeps, seen by running one token.

    None stands for a layer that reads another's. Raises ModelError, with the model's class, where a
    layer keeps anything but keys and values of plain attention.
    """
    cache = DynamicCache(config=model.config)
    problems = sorted({type(layer).__name__ for layer in cache.layers} - _SERVED)
    name = cache_argument(model)
    if name is None:
        problems = ["its forward takes no cache of keys and values"]
    # GPT-Neo's local attention is cut by position in the batch.
    if "local" in getattr(model.config, "attention_layers", ()):
        problems = ["local attention of its own"]
    if not problems and name is not None:
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        model(input_ids=token, use_cache=True, **{name: cache})
        if not any(map(_shape, cache.layers)):
            problems = ["its layers keep nothing in the cache"]
    if problems:
        raise ModelError(
            f"{type(model).__name__} keeps a state that is not plain attention "
            f"({', '.join(problems)}); the engine serves decoders whose every layer is full or "
            "sliding-window attention"
        )
    return [_shape(layer) for layer in cache.layers]


def cache_argument(model: PreTrainedModel) -> str | None:
    """Return the name of the cache argument of the forward of `model`, if it has one.

    It is `past_key_values`, or `cache` from transformers 5.24 on.
    """
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in ("past_key_values", "cache") if name in accepted), None)


def _shape(layer: Any) -> LayerShape | None:
    if not layer.is_initialized:
        return None
    return LayerShape(layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1])


class KeyValues:
    """Room for the keys and values of rows, in every layer.

    Grows when asked to; what was not written is never read.
    """

    def __init__(
        self, shapes: Sequence[LayerShape | None], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shapes = shapes
        self._like = torch.empty(0, dtype=dtype, device=device)
        self.num_rows = self.num_positions = 0
        """Allocated rows, and positions of each."""
        self.keys: list[Tensor] = []
        """Per layer `(rows, heads, positions, size)`."""
        self.values: list[Tensor] = []
        """Per layer `(rows, heads, positions, size)`."""
        self.free()

    @property
    def bytes_per_position(self) -> int:
        """Bytes of one position of one row, in all layers."""
        sizes = (s.heads * (s.key_size + s.value_size) for s in self._shapes if s is not None)
        return sum(sizes) * self._like.element_size()

    def rounded(self, positions: int) -> int:
        """Return the positions that are allocated where `positions` are needed."""
        return -(-positions // _POSITIONS) * _POSITIONS

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes now."""
        return self.num_rows * self.num_positions * self.bytes_per_position

    def bytes_for(self, rows: int, positions: int) -> int:
        """Return the bytes that would be allocated in all after `reserve`."""
        rows, positions = self._enlarged(rows, positions)
        return rows * positions * self.bytes_per_position

    def reserve(self, rows: int, positions: int, *, exactly: bool = False) -> None:
        """Make room for `rows` of `positions` each; what is there stays.

        Args:
            rows: rows needed.
            positions: positions needed in each of them.
            exactly: also give up room beyond that, which earlier rows had.
        """
        size = (rows, self.rounded(positions)) if exactly else self._enlarged(rows, positions)
        if size == (self.num_rows, self.num_positions):
            return
        try:
            # Layer by layer, so that old and new are never both there whole.
            for states in (self.keys, self.values):
                for layer, old in enumerate(states):
                    states[layer] = _resized(old, *size)
        finally:  # where memory ran out in between, what every layer has
            self.num_rows = min(states.shape[0] for states in (*self.keys, *self.values))
            self.num_positions = min(states.shape[2] for states in (*self.keys, *self.values))

    def write(
        self, layer: int, rows: Tensor, positions: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """Put new keys and values of one layer into the cache.

        Args:
            layer: index of the layer.
            rows: `(R, 1)`.
            positions: `(R, Q)`.
            keys: `(R, Q, heads, size)`.
            values: `(R, Q, heads, size)`.
        """
        self.keys[layer][rows, :, positions] = keys
        self.values[layer][rows, :, positions] = values

    def write_at(self, layer: int, position: int, keys: Tensor, values: Tensor) -> None:
        """Put one new position of the first R rows, the same one for all, into a layer.

        Args:
            layer: index of the layer.
            position: where.
            keys: `(R, 1, heads, size)`.
            values: `(R, 1, heads, size)`.
        """
        self.keys[layer][: len(keys), :, position] = keys[:, 0]
        self.values[layer][: len(values), :, position] = values[:, 0]

    def copy_row(self, source: "KeyValues", source_row: int, row: int, length: int) -> None:
        """Copy the first `length` positions of a row of `source` to `row` and zero the rest.

        `source` may be this cache.
        """
        for mine, theirs in ((self.keys, source.keys), (self.values, source.values)):
            for target, states in zip(mine, theirs, strict=True):
                target[row, :, :length] = states[source_row, :, :length]
                target[row, :, length:] = 0

    def zero_row(self, row: int) -> None:
        """Set `row` to 0: masked positions are multiplied by 0, and 0 times NaN would be NaN."""
        for states in (*self.keys, *self.values):
            states[row] = 0

    def read(self, row: int, start: int, end: int) -> Block:
        """Return a copy of positions `start` to `end` of a row.

        It is one piece of memory: many small ones that stay would litter the heap.
        """
        size = (end - start) * self.bytes_per_position // self._like.element_size()
        sources = []
        for keys, values in zip(self.keys, self.values, strict=True):
            sources += [keys[row, :, start:end], values[row, :, start:end]]
        parts = torch.split(self._like.new_empty(size), [source.numel() for source in sources])
        copies = [
            part.view(source.shape).copy_(source)
            for part, source in zip(parts, sources, strict=True)
        ]
        return list(zip(copies[::2], copies[1::2], strict=True))

    def fill(self, row: int, blocks: Sequence[Block]) -> None:
        """Write `blocks` one after the other from position 0 of `row`."""
        for layer in range(len(self.keys)):
            for side, states in enumerate((self.keys[layer], self.values[layer])):
                joined = torch.cat([block[layer][side] for block in blocks], dim=1)
                states[row, :, : joined.shape[1]] = joined

    def clear(self) -> None:
        """Free the buffers when no row is left; 64 MB or less are kept."""
        num_bytes = self.num_bytes
        if num_bytes > _KEEP_WHEN_IDLE:
            self.free()

    def free(self) -> None:
        """Free the buffers; no row is left."""
        self.num_rows = self.num_positions = 0
        shapes = [shape or LayerShape(0, 0, 0) for shape in self._shapes]
        self.keys = [self._like.new_empty(0, s.heads, 0, s.key_size) for s in shapes]
        self.values = [self._like.new_empty(0, s.heads, 0, s.value_size) for s in shapes]

    def _enlarged(self, rows: int, positions: int) -> tuple[int, int]:
        """Return the size that has room for both what is needed and what is there."""
        if rows > self.num_rows:
            rows = max(rows, self.num_rows + self.num_rows // 2)  # few, larger steps
        return max(rows, self.num_rows), max(self.num_positions, self.rounded(positions))


def _resized(old: Tensor, rows: int, positions: int) -> Tensor:
    new = old.new_zeros(rows, old.shape[1], positions, old.shape[3])
    common = old[:rows, :, :positions]
    new[: common.shape[0], :, : common.shape[2]] = common
    return new
