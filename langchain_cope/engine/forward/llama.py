"""The forward of the most common decoder with fewer, larger operations: Llama, Mistral, Qwen2, Qwen3 and what is built like them.

RMS norms around attention with rotary positions and a gated feed-forward, full attention in every layer. Query, key and value come
from one product (`fuse.py`), as do gate and up; low-rank products share their first half; rotation is three operations for queries
and keys together; nothing passes through a module's call. `forward.choose_forward` checks the result against the model itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import PreTrainedModel

from langchain_cope.engine.adapter import LoraRows, Site
from langchain_cope.engine.forward.attention import additive, grouped_attention, row_mask
from langchain_cope.engine.forward.fused_weights import GROUPS, joined
from langchain_cope.engine.forward.matmul_order import FasterOrder
from langchain_cope.engine.forward.plain import Inputs

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


@dataclass(frozen=True)
class _Product:
    """One product with a weight, and the site where adapters change it."""

    weight: Tensor
    bias: Tensor | None
    site: Site

    @classmethod
    def of(cls, path: str, module: nn.Module, names: tuple[str, ...]) -> "_Product | None":
        layers = [getattr(module, name) for name in names]
        weight, bias = (
            joined([layer.weight for layer in layers]),
            joined([layer.bias for layer in layers]),
        )
        if weight is None or (bias is None and any(layer.bias is not None for layer in layers)):
            return None
        return cls(
            weight,
            bias,
            Site(
                tuple(f"{path}.{name}" for name in names),
                tuple(layer.out_features for layer in layers),
            ),
        )


@dataclass(frozen=True)
class _Layer:
    first_norm: "_Norm"
    qkv: _Product
    query_norm: "_Norm | None"
    key_norm: "_Norm | None"
    output: _Product
    second_norm: "_Norm"
    gate_up: _Product
    activation: Callable[[Tensor], Tensor]
    down: _Product
    scaling: float


@dataclass(frozen=True)
class _Norm:
    weight: Tensor
    epsilon: float

    def __call__(self, states: Tensor) -> Tensor:
        return F.rms_norm(states, self.weight.shape, self.weight, self.epsilon)


class LeanForward:
    """See `Forward`."""

    def __init__(self, model: Any, layers: list[_Layer], order: FasterOrder) -> None:
        decoder = model.model
        self._embed, self._rotary, self._head = (
            decoder.embed_tokens,
            decoder.rotary_emb,
            model.lm_head,
        )
        self._norm = _norm(decoder.norm)
        self._layers = layers
        self._linear = order
        attention = decoder.layers[0].self_attn
        self._size: int = attention.head_dim
        self._groups = attention.k_proj.out_features // self._size
        self._heads = attention.q_proj.out_features // self._size
        products = (
            p for layer in layers for p in (layer.qkv, layer.output, layer.gate_up, layer.down)
        )
        self.sites = {path: product.site for product in products for path in product.site.paths}

    @classmethod
    def of(cls, model: PreTrainedModel, order: FasterOrder) -> "LeanForward | None":
        """A forward for ``model``, or None where the model is built in another way."""
        decoder: Any = getattr(model, "model", None)
        parts = (
            {name for name, _ in decoder.named_children()}
            if isinstance(decoder, nn.Module)
            else set()
        )
        if (
            parts != {"embed_tokens", "layers", "norm", "rotary_emb"}
            or type(getattr(model, "lm_head", None)) is not nn.Linear
        ):
            return None
        if _differs_by_layer(model.config) or {name for name, _ in model.named_children()} != {
            "model",
            "lm_head",
        }:
            return None
        layers = [
            _layer(f"model.layers.{index}", layer) for index, layer in enumerate(decoder.layers)
        ]
        if not layers or any(layer is None for layer in layers) or not _is_rms_norm(decoder.norm):
            return None
        return cls(model, [layer for layer in layers if layer is not None], order)

    def __call__(self, inputs: Inputs) -> Tensor:
        """See `Forward`."""
        states = self._embed(inputs.ids)
        cos, sin = (part.unsqueeze(2) for part in self._rotary(states, inputs.positions))
        half = self._size // 2
        turn = cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        rows = torch.arange(inputs.ids.shape[0], device=states.device).unsqueeze(1)
        mask = self._mask(inputs, states.dtype)
        for index, layer in enumerate(self._layers):
            mixed = self._attend(index, layer, layer.first_norm(states), turn, mask, rows, inputs)
            states = states + self._product(layer.output, mixed, inputs.lora)
            gated = self._product(layer.gate_up, layer.second_norm(states), inputs.lora)
            width = gated.shape[-1] // 2
            gated = layer.activation(gated[..., :width]) * gated[..., width:]
            states = states + self._product(layer.down, gated, inputs.lora)
        last = self._norm(states[inputs.wanted[0], inputs.wanted[1]])
        return self._linear(last, self._head.weight, self._head.bias)

    def _attend(
        self,
        index: int,
        layer: _Layer,
        states: Tensor,
        turn: tuple[Tensor, Tensor],
        mask: Tensor | None,
        rows: Tensor,
        inputs: Inputs,
    ) -> Tensor:
        """Attention of one layer: ``(R, Q, width)`` to ``(R, Q, heads · size)``."""
        num_rows, num_queries = states.shape[:2]
        heads, groups, end = self._heads, self._groups, inputs.num_positions
        everything = self._product(layer.qkv, states, inputs.lora).view(
            num_rows, num_queries, heads + 2 * groups, self._size
        )
        turned, values = everything[:, :, : heads + groups], everything[:, :, heads + groups :]
        if layer.query_norm is not None and layer.key_norm is not None:
            turned = torch.cat(
                [layer.query_norm(turned[:, :, :heads]), layer.key_norm(turned[:, :, heads:])],
                dim=2,
            )
        # The rotation pairs entry i with i + size / 2: rolling by half a head brings each its partner, the sign is in the sine.
        turned = torch.addcmul(turned * turn[0], turned.roll(self._size // 2, -1), turn[1])
        inputs.kv.write(index, rows, inputs.positions, turned[:, :, heads:], values)
        queries = turned[:, :, :heads].transpose(1, 2)
        keys, values = (
            inputs.kv.keys[index][:num_rows, :, :end],
            inputs.kv.values[index][:num_rows, :, :end],
        )
        mixed = grouped_attention(queries, keys, values, mask, layer.scaling)
        return mixed.transpose(1, 2).reshape(num_rows, num_queries, -1)

    def _product(self, product: _Product, states: Tensor, lora: LoraRows) -> Tensor:
        output = self._linear(states, product.weight, product.bias)
        lora.add(product.site, states, output)
        return output

    def _mask(self, inputs: Inputs, dtype: torch.dtype) -> Tensor | None:
        if inputs.positions.shape[1] == 1 and inputs.same_length:
            return None  # every row sees all that is read
        return additive(
            row_mask(inputs.positions, inputs.num_positions), dtype, self._heads // self._groups
        )


def _layer(path: str, layer: nn.Module) -> _Layer | None:
    """The products of a decoder layer, or None where it has other parts than those this forward knows."""
    children = dict(layer.named_children())
    if children.keys() != _LAYER:
        return None
    attention: Any = children["self_attn"]
    mlp: Any = children["mlp"]
    inside, gated = dict(attention.named_children()), dict(mlp.named_children())
    norms = [children["input_layernorm"], children["post_attention_layernorm"]]
    norms += [inside[name] for name in ("q_norm", "k_norm") if name in inside]
    linear = [module for name, module in {**inside, **gated}.items() if name.endswith("_proj")]
    known = (
        inside.keys() <= _ATTENTION
        and gated.keys() == _MLP
        and ("q_norm" in inside) == ("k_norm" in inside)
    )
    if not (
        known
        and len(linear) == 7
        and all(type(m) is nn.Linear for m in linear)
        and all(map(_is_rms_norm, norms))
    ):
        return None
    qkv = _Product.of(f"{path}.self_attn", attention, GROUPS[0])
    gate_up = _Product.of(f"{path}.mlp", mlp, GROUPS[1])
    output, down = (
        _Product.of(f"{path}.self_attn", attention, ("o_proj",)),
        _Product.of(f"{path}.mlp", mlp, ("down_proj",)),
    )
    if (
        qkv is None
        or gate_up is None
        or output is None
        or down is None
        or not hasattr(attention, "scaling")
    ):
        return None
    query_norm, key_norm = (
        _norm(inside[name]) if name in inside else None for name in ("q_norm", "k_norm")
    )
    return _Layer(
        _norm(norms[0]),
        qkv,
        query_norm,
        key_norm,
        output,
        _norm(norms[1]),
        gate_up,
        mlp.act_fn,
        down,
        attention.scaling,
    )


def _is_rms_norm(module: Any) -> bool:
    return (
        type(module).__name__.endswith("RMSNorm")
        and hasattr(module, "variance_epsilon")
        and hasattr(module, "weight")
    )


def _norm(module: Any) -> _Norm:
    return _Norm(module.weight, module.variance_epsilon)


def _differs_by_layer(config: Any) -> bool:
    """Whether some layer sees less than everything before it, or without positions."""
    if 0 in (getattr(config, "no_rope_layers", None) or ()):
        return True
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None
