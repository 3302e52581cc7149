"""The forward of the most common decoder with fewer, larger operations: Llama, Qwen2, Qwen3.

It serves what is built like them: RMS norms around attention with rotary positions and a gated
feed-forward, full attention in every layer. Query, key and value come from one product
(`fused_weights.py`), as do gate and up; low-rank products share their first half; rotation is three
operations for queries and keys together; nothing passes through a module's call.
`choose.choose_forward` checks the result against the model itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from langchain_cope.engine.forward.attention import additive, grouped_attention, row_mask
from langchain_cope.engine.forward.fused_weights import GROUPS
from langchain_cope.engine.forward.inputs import Inputs
from langchain_cope.engine.forward.likely_logits import FEW, refined
from langchain_cope.engine.forward.lora_rows import LoraRows, Site
from langchain_cope.engine.forward.matmul_order import MatmulOrder
from langchain_cope.engine.forward.packed_weights import BlockSource
from langchain_cope.engine.forward.products import (
    Product,
    measure_packed_rows,
    pack,
    reorder,
    set_packed_rows,
)
from langchain_cope.engine.forward.reordered_weights import can_reorder

_MODEL = {"model", "lm_head"}
_DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}

# Forwards of more rows than packed ones until weights are reordered: one prompt is not worth it.
_FORWARDS_BEFORE_REORDERING = 8

Rotation = tuple[Tensor, Tensor]
"""Cosine and signed sine of each position, `(R, Q, 1, head size)`."""


class _Norm:
    """An RMS norm, in float32: `F.rms_norm` takes twice as many operations on a CPU."""

    def __init__(self, module: Any) -> None:
        self._dtype = module.weight.dtype
        size = module.weight.numel()
        # x / √(mean x² + ε) · w is x / √(Σ x² + size · ε) · (√size · w).
        self._weight = module.weight.float() * size**0.5
        self._epsilon = self._weight.new_tensor(module.variance_epsilon * size)

    def __call__(self, states: Tensor) -> Tensor:
        """Return the norm of `(…, size)`, in the weights' dtype."""
        states = states.float()
        length = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        inverse = torch.addcmul(self._epsilon, length, length).rsqrt_()
        return (states * inverse).mul_(self._weight).to(self._dtype)


@dataclass(frozen=True)
class _Layer:
    first_norm: _Norm
    qkv: Product
    query_norm: _Norm | None
    key_norm: _Norm | None
    output: Product
    second_norm: _Norm
    gate_up: Product
    activation: Callable[[Tensor], Tensor]
    down: Product
    scaling: float

    @property
    def products(self) -> list[Product]:
        return [self.qkv, self.output, self.gate_up, self.down]


class LlamaForward:
    """See `Forward`."""

    def __init__(self, model: Any, layers: list[_Layer], head: Product, order: MatmulOrder) -> None:
        decoder = model.model
        self._embed = decoder.embed_tokens
        self._rotary = decoder.rotary_emb
        self._norm = _Norm(decoder.norm)
        self._layers = layers
        self._output_head = head
        # What is reordered later must give the same bits, which the usual order does.
        self._order = MatmulOrder(frozenset()) if can_reorder(head.weight) else order
        self._forwards_before_reordering = _FORWARDS_BEFORE_REORDERING
        attention = decoder.layers[0].self_attn
        self._size: int = attention.head_dim
        self._groups = attention.k_proj.out_features // self._size
        self._heads = attention.q_proj.out_features // self._size
        self.num_layers = len(layers)
        self.sites: dict[str, Site] = {}
        for layer in layers:
            for product in layer.products:
                self.sites.update(dict.fromkeys(product.site.paths, product.site))

    @classmethod
    def of(cls, model: PreTrainedModel, order: MatmulOrder) -> "LlamaForward | None":
        """Return a forward for `model`, or None where the model is built in another way."""
        decoder: Any = getattr(model, "model", None)
        if not isinstance(decoder, nn.Module) or _children(decoder) != _DECODER:
            return None
        if _children(model) != _MODEL or type(model.lm_head) is not nn.Linear:
            return None
        if _differs_by_layer(model.config) or not _is_rms_norm(decoder.norm):
            return None
        layers = []
        modules: Any = decoder.layers
        for index, module in enumerate(modules):
            layer = _layer(f"model.layers.{index}", module)
            if layer is None:
                return None
            layers.append(layer)
        head = Product.of("", model, ("lm_head",))
        return cls(model, layers, head, order) if layers and head else None

    def pack(self, source: BlockSource) -> None:
        """Compute forwards of few rows with packed blocks, where there are some and it pays."""
        pack([product for products in self._alike for product in products], source)
        for products in self._alike:
            measure_packed_rows(products, source, self._order)

    @property
    def packed_rows(self) -> tuple[int, ...]:
        """The most rows that packed products compute: of the layers, and of the output head."""
        return tuple(products[0].packed_rows for products in self._alike)

    @packed_rows.setter
    def packed_rows(self, most: tuple[int, ...]) -> None:
        for products, rows in zip(self._alike, most, strict=True):
            set_packed_rows(products, rows)

    @property
    def _alike(self) -> list[list[Product]]:
        """The products of all layers, and that of the output head, which is a larger one."""
        return [
            [product for layer in self._layers for product in layer.products],
            [self._output_head],
        ]

    def __call__(self, inputs: Inputs) -> Tensor:
        """See `Forward`."""
        self._count(inputs.ids.numel())
        embedded = self._embed(inputs.ids)
        cos, sin = (part.unsqueeze(2) for part in self._rotary(embedded, inputs.positions))
        half = self._size // 2
        rotation = cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        rows = torch.arange(inputs.ids.shape[0], device=embedded.device).unsqueeze(1)
        mask = self._mask(inputs, embedded.dtype)
        states = embedded.float()  # sums over layers: in bfloat16 they would lose most
        early: dict[int, Tensor] = {}
        for index, layer in enumerate(self._layers):
            normed = layer.first_norm(states)
            mixed = self._attend(index, layer, normed, rotation, mask, rows, inputs)
            states = self._add_product(states, layer.output, mixed, inputs.lora)
            gated = self._product(layer.gate_up, layer.second_norm(states), inputs.lora)
            width = gated.shape[-1] // 2
            gated = layer.activation(gated[..., :width]) * gated[..., width:]
            gated = gated.to(embedded.dtype)
            states = self._add_product(states, layer.down, gated, inputs.lora)
            if index + 1 in inputs.exits:
                early[index + 1] = states
        read = states[inputs.logit_rows, inputs.logit_columns]
        for number, layers in enumerate(inputs.exits):
            if layers is not None:
                at = inputs.logit_rows[number], inputs.logit_columns[number]
                read[number] = early[layers][at]
        last = self._norm(read)
        head = self._output_head
        logits = head(last, self._order)
        if len(last) > max(FEW, len(inputs.ids)):
            return logits  # of whole texts, from which nothing is chosen
        return refined(logits, last, head.weight, head.bias)

    def _count(self, num_rows: int) -> None:
        """Reorder the weights once that pays."""
        if self._forwards_before_reordering and num_rows > max(self.packed_rows):
            self._forwards_before_reordering -= 1
            if not self._forwards_before_reordering:
                reorder([product for products in self._alike for product in products])

    def _attend(
        self,
        index: int,
        layer: _Layer,
        states: Tensor,
        rotation: Rotation,
        mask: Tensor | None,
        rows: Tensor,
        inputs: Inputs,
    ) -> Tensor:
        """Return the attention of one layer: from `(R, Q, width)` to `(R, Q, heads · size)`."""
        num_rows, num_queries = states.shape[:2]
        heads, groups, end = self._heads, self._groups, inputs.num_positions
        qkv = self._product(layer.qkv, states, inputs.lora)
        qkv = qkv.view(num_rows, num_queries, heads + 2 * groups, self._size)
        qk, values = qkv[:, :, : heads + groups], qkv[:, :, heads + groups :]
        if layer.query_norm is not None and layer.key_norm is not None:
            normed = [layer.query_norm(qk[:, :, :heads]), layer.key_norm(qk[:, :, heads:])]
            qk = torch.cat(normed, dim=2)
        # The rotation pairs entry i with i + size / 2: halves that change places bring each its
        # partner, the sign is in the sine. (`roll` and `cat` take several times as long as `flip`.)
        cos, sin = rotation
        swapped = qk.view(*qk.shape[:-1], 2, self._size // 2).flip(-2).flatten(-2)
        qk = torch.addcmul(qk * cos, swapped, sin).to(states.dtype)
        values = values.to(states.dtype)
        if mask is None:  # one query, at the end of rows of one length
            inputs.kv.write_at(index, end - 1, qk[:, :, heads:], values)
        else:
            inputs.kv.write(index, rows, inputs.positions, qk[:, :, heads:], values)
        queries = qk[:, :, :heads].transpose(1, 2)
        keys = inputs.kv.keys[index][:num_rows, :, :end]
        values = inputs.kv.values[index][:num_rows, :, :end]
        mixed = grouped_attention(queries, keys, values, mask, layer.scaling)
        return mixed.transpose(1, 2).reshape(num_rows, num_queries, -1)

    def _product(self, product: Product, states: Tensor, lora: LoraRows) -> Tensor:
        output = product(states, self._order)
        if lora.changes(product.site):
            # In float32: a sum that is rounded already would take up large changes alone.
            output = output.float()
            lora.add(product.site, states, output)
        return output

    def _add_product(
        self, sums: Tensor, product: Product, states: Tensor, lora: LoraRows
    ) -> Tensor:
        """Return `sums`, in float32, plus the product of `states`."""
        sums = sums + product(states, self._order)
        lora.add(product.site, states, sums)
        return sums

    def _mask(self, inputs: Inputs, dtype: torch.dtype) -> Tensor | None:
        if inputs.positions.shape[1] == 1 and inputs.same_length:
            return None  # every row sees all that is read
        mask = row_mask(inputs.positions, inputs.num_positions)
        return additive(mask, dtype, self._heads // self._groups)


def _layer(path: str, module: nn.Module) -> _Layer | None:
    """Return what a decoder layer computes, or None where it has other parts than those known."""
    if _children(module) != _LAYER:
        return None
    layer: Any = module
    attention, mlp = layer.self_attn, layer.mlp
    parts = _children(attention)
    if parts not in (_ATTENTION, _ATTENTION | _HEAD_NORMS):
        return None
    if _children(mlp) != _MLP or not hasattr(attention, "scaling"):
        return None
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    head_norms = [attention.q_norm, attention.k_norm] if parts != _ATTENTION else []
    linear = [getattr(attention, name) for name in _ATTENTION]
    linear += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if any(type(part) is not nn.Linear for part in linear):
        return None
    if not all(map(_is_rms_norm, norms + head_norms)):
        return None
    qkv = Product.of(f"{path}.self_attn", attention, GROUPS[0])
    output = Product.of(f"{path}.self_attn", attention, ("o_proj",))
    gate_up = Product.of(f"{path}.mlp", mlp, GROUPS[1])
    down = Product.of(f"{path}.mlp", mlp, ("down_proj",))
    if qkv is None or output is None or gate_up is None or down is None:
        return None
    query_norm, key_norm = map(_Norm, head_norms) if head_norms else (None, None)
    return _Layer(
        first_norm=_Norm(norms[0]),
        qkv=qkv,
        query_norm=query_norm,
        key_norm=key_norm,
        output=output,
        second_norm=_Norm(norms[1]),
        gate_up=gate_up,
        activation=mlp.act_fn,
        down=down,
        scaling=attention.scaling,
    )


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _is_rms_norm(module: Any) -> bool:
    return (
        type(module).__name__.endswith("RMSNorm")
        and hasattr(module, "variance_epsilon")
        and hasattr(module, "weight")
    )


def _differs_by_layer(config: Any) -> bool:
    """Tell whether some layer sees less than everything before it, or no positions."""
    if 0 in (getattr(config, "no_rope_layers", None) or ()):
        return True
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None
