"""Rows joining and leaving a key-value cache.

Every row is padded on the left to one common length. A layer with a sliding window keeps fewer positions than it has seen,
so each layer is padded and trimmed to its own length.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from langchain_cope.errors import ModelError

_SERVED = (DynamicLayer, DynamicSlidingWindowLayer)
_ROOM = 128  # positions allocated ahead


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache for ``model``. Raises ``ModelError`` where a layer keeps anything but keys and values."""
    cache = DynamicCache(config=model.config)
    other = sorted({type(layer).__name__ for layer in cache.layers} - {kind.__name__ for kind in _SERVED})
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        other = ["its forward takes no past_key_values"]
    if other:
        raise ModelError(
            f"{type(model).__name__} keeps a state that is not plain attention ({', '.join(other)}); "
            "the engine serves decoders whose every layer is full or sliding-window attention"
        )
    cache.layers = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """Full attention that writes a new position into room kept for it, where ``DynamicLayer`` copies everything at each step."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._key_room: Tensor | None = None
        self._value_room: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._key_room, self.keys = _append(self._key_room, self.keys, key_states)
        self._value_room, self.values = _append(self._value_room, self.values, value_states)
        return self.keys, self.values


def _append(room: Tensor | None, states: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor]:
    """(room, ``states`` and ``new`` as its beginning). New room is taken where there is too little, or ``states`` lie elsewhere."""
    held = None if states is None or states.numel() == 0 else states
    seen = 0 if held is None else held.shape[-2]
    total = seen + new.shape[-2]
    if room is None or held is None or held.data_ptr() != room.data_ptr() or room.shape[-2] < total:
        room = new.new_empty(*new.shape[:2], total + _ROOM, new.shape[-1])
        if held is not None:
            room[:, :, :seen] = held
    room[:, :, seen:total] = new
    return room, room[:, :, :total]


def length(cache: DynamicCache) -> int:
    """Positions seen, padding included."""
    return int(cache.get_seq_length())


def merge(first: DynamicCache, second: DynamicCache) -> DynamicCache:
    """The rows of ``first``, then those of ``second``, padded on the left to one length. Takes ``first`` over."""
    total = max(length(first), length(second))
    for ours, theirs in zip(_layers(first), _layers(second), strict=True):
        if ours.is_initialized:  # layers that share another's keys hold nothing
            kept = _kept(ours, total)
            ours.keys = torch.cat([_fit(ours.keys, kept), _fit(theirs.keys, kept)])
            ours.values = torch.cat([_fit(ours.values, kept), _fit(theirs.values, kept)])
            _set_seen(ours, total)
    return first


def keep(cache: DynamicCache, rows: Tensor, drop_left: int = 0) -> None:
    """Keep these ``rows`` (indices, in their order) and drop ``drop_left`` positions of padding that all of them share."""
    total = length(cache) - drop_left
    for layer in _layers(cache):
        if layer.is_initialized:
            kept = _kept(layer, total)
            layer.keys = _fit(layer.keys.index_select(0, rows), kept)
            layer.values = _fit(layer.values.index_select(0, rows), kept)
            _set_seen(layer, total)


def _layers(cache: DynamicCache) -> list[Any]:
    return cache.layers


def _kept(layer: DynamicLayer, total: int) -> int:
    """Positions that the layer holds once it has seen ``total``."""
    return min(total, layer.sliding_window - 1) if isinstance(layer, DynamicSlidingWindowLayer) else total


def _set_seen(layer: DynamicLayer, total: int) -> None:
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = total


def _fit(states: Tensor, kept: int) -> Tensor:
    """``(rows, heads, positions, size)`` padded with zeros, or cut, on the left to ``kept`` positions."""
    missing = kept - states.shape[-2]
    if missing <= 0:
        return states[:, :, -missing:]
    return torch.cat([states.new_zeros(*states.shape[:2], missing, states.shape[-1]), states], dim=-2)
