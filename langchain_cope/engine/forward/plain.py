"""The reference forward: the model's own, whatever its architecture.

`PlainForward` hands the model a cache in the form that it knows (`RowCache`), its attention is made
to read each row at its own positions (`attention.py`). Adapters' changes are added within the
products of dense linear layers on a CPU, before these are rounded, and by hooks to what all others
give.
"""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from langchain_cope.engine.adapter import linear_sizes
from langchain_cope.engine.forward.attention import attend_by_rows
from langchain_cope.engine.forward.inputs import Inputs
from langchain_cope.engine.forward.kv_cache import cache_argument
from langchain_cope.engine.forward.lora_rows import LoraRows, Site
from langchain_cope.engine.forward.matmul_order import MatmulOrder
from langchain_cope.errors import ModelError


class PlainForward:
    """See `Forward`."""

    def __init__(self, model: PreTrainedModel, order: MatmulOrder) -> None:
        self._model = model
        self._accepts = inspect.signature(model.forward).parameters.keys()
        self._modules = dict(model.named_modules())
        self.sites: dict[str, Site] = {}
        for path, module in self._modules.items():
            if sizes := linear_sizes(module):
                self.sites[path] = Site((path,), (sizes[1],))
        self._hooked: set[str] = set()
        self._inputs: Inputs | None = None
        self._cache_name = cache_argument(model) or "past_key_values"
        attend_by_rows(model)
        self._plain = {path for path, module in self._modules.items() if _is_plain_linear(module)}
        for path in self._plain:
            module = self._modules[path]
            module.forward = partial(self._multiply, order, module, self.sites[path])

    def __call__(self, inputs: Inputs) -> Tensor:
        """See `Forward`."""
        self._hook(inputs.lora)
        columns = inputs.logit_columns
        arguments: dict[str, Any] = {
            "input_ids": inputs.ids,
            self._cache_name: RowCache(inputs),
            "use_cache": True,
        }
        if "position_ids" in self._accepts:
            arguments["position_ids"] = inputs.positions
        if "logits_to_keep" in self._accepts:
            needed = sorted(set(columns))
            arguments["logits_to_keep"] = torch.tensor(needed, device=inputs.ids.device)
            columns = [needed.index(column) for column in columns]
        self._inputs = inputs
        try:
            logits: Tensor = self._model(**arguments).logits
        finally:
            self._inputs = None
        return logits[inputs.logit_rows, columns]

    def _hook(self, lora: LoraRows) -> None:
        for path in lora.paths - self._hooked - self._plain:
            self._hooked.add(path)
            add_product = partial(self._add_low_rank_product, self.sites[path])
            self._modules[path].register_forward_hook(add_product)

    def _add_low_rank_product(
        self, site: Site, _: nn.Module, states: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        if self._changes(site):
            self._add_change(site, states[0], output)
        return output

    def _multiply(
        self, order: MatmulOrder, module: nn.Linear, site: Site, states: Tensor
    ) -> Tensor:
        if not self._changes(site):
            return order(states, module.weight, module.bias)
        # A sum that is rounded already would take up large changes alone.
        change = states.new_zeros(*states.shape[:-1], *site.sizes)
        self._add_change(site, states, change)
        return order.plus(states, module.weight, module.bias, change)

    def _changes(self, site: Site) -> bool:
        return self._inputs is not None and self._inputs.lora.changes(site)

    def _add_change(self, site: Site, states: Tensor, output: Tensor) -> None:
        assert self._inputs is not None
        shape = self._inputs.ids.shape
        self._inputs.lora.add(site, _by_row(states, shape, site), _by_row(output, shape, site))


class RowCache(Cache):
    """`KeyValues` in the form that a transformers model writes and reads, for one forward."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(layers=[DynamicLayer() for _ in inputs.kv.keys])  # type: ignore[no-untyped-call]
        self._inputs = inputs
        self._rows = torch.arange(inputs.ids.shape[0], device=inputs.ids.device).unsqueeze(1)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write `(R, heads, Q, size)` and return everything up to the longest row."""
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
        """Return the positions seen before this forward, of the longest row."""
        return self._inputs.num_positions - self._inputs.ids.shape[1]

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Return where each row's queries begin, `(R, 1)`, as `attention.row_mask` takes it."""
        return self._inputs.positions[:, :1]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return (positions that are read, 0)."""
        return self._inputs.num_positions, 0


def _by_row(states: Tensor, shape: torch.Size, site: Site) -> Tensor:
    """Return `states` as `(R, Q, width)`; layers behind a router, say, see `(R · Q, width)`."""
    if states.ndim == 3:
        return states
    if states.shape[0] != shape.numel():
        raise ModelError(
            f"an adapter changes {site.paths[0]!r}, which does not see every token: "
            "it cannot be served in a batch"
        )
    return states.view(*shape, -1)


def _is_plain_linear(module: nn.Module) -> bool:
    """Tell whether the module's product may be computed in another order: dense, on a CPU."""
    return (
        type(module) is nn.Linear
        and module.weight.is_contiguous()
        and module.weight.device.type == "cpu"
    )
