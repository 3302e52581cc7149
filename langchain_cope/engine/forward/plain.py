"""One forward over rows of different lengths: token ids and positions in, logits of the positions asked for out.

`PlainForward` runs the model's own forward, whatever its architecture; it is the reference. `lean.py` does the same with fewer
operations for the most common architecture. `choose_forward` takes the latter where the model has that form, and checks either
against the model's uncached forward before anyone is served.
"""

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from langchain_cope.engine.adapter import LoraRows, Site, linear_sizes, low_rank_dtype
from langchain_cope.engine.forward.attention import attend_by_rows
from langchain_cope.engine.forward.kv_cache import KeyValues, LayerShape, cache_argument
from langchain_cope.engine.forward.matmul_order import FasterOrder
from langchain_cope.errors import ModelError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What one forward computes: Q new tokens for each of the first R rows of ``kv``, from each row's own position on."""

    ids: Tensor
    """``(R, Q)``; what pads a row that has fewer new tokens stands on the right and is overwritten later."""
    positions: Tensor
    """``(R, Q)``."""
    kv: KeyValues
    num_positions: int
    """Positions that any row will have, padding included: keys and values are read up to here."""
    lora: LoraRows
    wanted: tuple[list[int], list[int]]
    """Rows and columns of the positions whose logits are asked for."""
    same_length: bool = False
    """All rows have as many positions: with one query a row nothing needs a mask."""


class Forward(Protocol):
    """Logits ``(N, V)`` of the N positions wanted; writes the new tokens' keys and values."""

    @property
    def sites(self) -> Mapping[str, Site]:
        """Where an adapter may change the model: the site of each path."""

    def __call__(self, inputs: Inputs, /) -> Tensor:
        """Run one forward."""
        ...


def choose_forward(model: PreTrainedModel, shapes: list[LayerShape | None]) -> Forward:
    """The fastest forward that gives what ``model`` itself gives. Raises ``ModelError``, by name, where none does."""
    from langchain_cope.engine.forward.llama import LeanForward

    device = model.device
    prompts = [
        torch.randint(0, 100, (length,), generator=torch.Generator().manual_seed(length))
        for length in (12, 7)
    ]
    prompts = [
        prompt.clamp_max(model.config.get_text_config().vocab_size - 1).to(device)
        for prompt in prompts
    ]
    expected = torch.stack(
        [model(input_ids=p.unsqueeze(0), use_cache=False).logits[0, -1].float() for p in prompts]
    )
    order = FasterOrder.measured(model)
    try:
        if lean := LeanForward.of(model, order):
            difference = _difference(lean, model, shapes, prompts, expected)
            if difference <= _tolerance(model.dtype) / 2:
                return lean
            _log.debug(
                "%s is not served by the lean forward: it differs by %.3g",
                type(model).__name__,
                difference,
            )
    except Exception:  # it has the parts, but in other sizes, say
        _log.debug("%s is not served by the lean forward", type(model).__name__, exc_info=True)
    plain = PlainForward(model, order)
    try:
        difference = _difference(plain, model, shapes, prompts, expected)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be served: rows of different lengths fail in its attention ({error})"
        ) from error
    if difference > _tolerance(model.dtype):
        raise ModelError(
            f"{type(model).__name__} cannot be served: with rows of different lengths its attention gives other answers "
            f"(logits differ by {difference:.2g} of their size)"
        )
    return plain


def _tolerance(dtype: torch.dtype) -> float:
    return (
        1e-3 if dtype == torch.float32 else 0.2
    )  # a wrong mask or scale is off by a third and more


def _difference(
    forward: Forward,
    model: PreTrainedModel,
    shapes: list[LayerShape | None],
    prompts: list[Tensor],
    expected: Tensor,
) -> float:
    """How far ``forward`` is from ``expected`` logits, relative to their spread, when it gets the prompts in two ragged chunks."""
    kv = KeyValues(shapes, model.dtype, model.device)
    kv.reserve(2, 16)
    lora = LoraRows(
        forward.sites,
        torch.empty(0, dtype=low_rank_dtype(model.dtype, model.device), device=model.device),
    )
    first, second = (
        torch.zeros(2, width, dtype=torch.long, device=model.device) for width in (5, 7)
    )
    offsets = torch.tensor([[5], [2]], device=model.device)
    for row, (prompt, offset) in enumerate(zip(prompts, (5, 2), strict=True)):
        first[row, :offset] = prompt[:offset]
        second[row, : len(prompt) - offset] = prompt[offset:]
    steps = torch.arange(7, device=model.device).expand(2, 7)
    forward(Inputs(first, steps[:, :5], kv, 5, lora, ([0, 1], [4, 1])))
    found = forward(Inputs(second, steps + offsets, kv, 12, lora, ([0, 1], [6, 4]))).float()
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    return float((found - expected).norm() / spread.clamp_min(1e-6))


class RowCache(Cache):
    """`KeyValues` in the form in which a transformers model writes and reads them, for one forward."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(layers=[DynamicLayer() for _ in inputs.kv.keys])  # type: ignore[no-untyped-call]
        self._inputs = inputs
        self._rows = torch.arange(inputs.ids.shape[0], device=inputs.ids.device).unsqueeze(1)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write ``(R, heads, Q, size)`` and return everything up to the longest row."""
        kv, num_rows, end = self._inputs.kv, len(self._rows), self._inputs.num_positions
        kv.write(
            layer_idx,
            self._rows,
            self._inputs.positions,
            key_states.transpose(1, 2),
            value_states.transpose(1, 2),
        )
        return kv.keys[layer_idx][:num_rows, :, :end], kv.values[layer_idx][:num_rows, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions seen before this forward, of the longest row."""
        return self._inputs.num_positions - self._inputs.ids.shape[1]

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Where each row's queries begin, ``(R, 1)``: `attention.row_mask` takes it as it is."""
        return self._inputs.positions[:, :1]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(positions that are read, 0)."""
        return self._inputs.num_positions, 0


class PlainForward:
    """The model's own forward."""

    def __init__(self, model: PreTrainedModel, order: FasterOrder) -> None:
        self._model = model
        self._accepts = inspect.signature(model.forward).parameters.keys()
        self._modules = dict(model.named_modules())
        self.sites: dict[str, Site] = {
            path: Site((path,), (sizes[1],))
            for path, module in self._modules.items()
            if (sizes := linear_sizes(module))
        }
        self._hooked: set[str] = set()
        self._inputs: Inputs | None = None
        self._cache_name = cache_argument(model) or "past_key_values"
        attend_by_rows(model)
        for module in self._modules.values():
            if (
                type(module) is nn.Linear
                and module.weight.is_contiguous()
                and module.weight.device.type == "cpu"
            ):
                module.forward = partial(_ordered, order, module)  # type: ignore[method-assign]

    def __call__(self, inputs: Inputs) -> Tensor:
        """See `Forward`."""
        self._hook(inputs.lora)
        rows, columns = inputs.wanted
        kept = sorted(set(columns))
        arguments: dict[str, Any] = {
            "input_ids": inputs.ids,
            self._cache_name: RowCache(inputs),
            "use_cache": True,
        }
        if "position_ids" in self._accepts:
            arguments["position_ids"] = inputs.positions
        if "logits_to_keep" in self._accepts:
            arguments["logits_to_keep"] = torch.tensor(kept, device=inputs.ids.device)
            columns = [kept.index(column) for column in columns]
        self._inputs = inputs
        try:
            logits: Tensor = self._model(**arguments).logits
        finally:
            self._inputs = None
        return logits[rows, columns]

    def _hook(self, lora: LoraRows) -> None:
        for path in lora.paths - self._hooked:
            self._hooked.add(path)
            self._modules[path].register_forward_hook(
                partial(self._add_low_rank_product, self.sites[path])
            )

    def _add_low_rank_product(
        self, site: Site, _: nn.Module, states: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        if self._inputs is not None and self._inputs.lora.changes(site):
            shape = self._inputs.ids.shape
            self._inputs.lora.add(
                site, _by_row(states[0], shape, site), _by_row(output, shape, site)
            )
        return output


def _by_row(states: Tensor, shape: torch.Size, site: Site) -> Tensor:
    """``(R, Q, width)``; layers behind a router, say, see rows and positions as one dimension."""
    if states.ndim == 3:
        return states
    if states.shape[0] != shape.numel():
        raise ModelError(
            f"an adapter changes {site.paths[0]!r}, which does not see every token: it cannot be served in a batch"
        )
    return states.view(*shape, -1)


def _ordered(order: FasterOrder, module: nn.Linear, states: Tensor) -> Tensor:
    return order(states, module.weight, module.bias)
