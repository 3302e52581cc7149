"""Attention over rows of different lengths, each of which starts at position 0 (`kv_cache.py`).

Registered with transformers by name, so that any model whose attention can be exchanged takes it:
the mask is the model's own pattern (causal, sliding, chunked) asked at each row's own positions,
and heads that share keys are computed together. Given grouped heads as they are (`enable_gqa`), a
CPU is five times slower in bfloat16, and repeated keys would be a copy of the cache.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

NAME, EAGER_NAME = "cope_rows", "cope_rows_eager"


def row_mask(
    positions: Tensor, num_positions: int, pattern: Callable[..., Any] = causal_mask_function
) -> Tensor:
    """Return who sees what: bool `(R, 1, Q, num_positions)` for queries at `positions` `(R, Q)`."""
    rows = torch.arange(positions.shape[0], device=positions.device).view(-1, 1, 1, 1)
    keys = torch.arange(num_positions, device=positions.device).view(1, 1, 1, -1)
    heads = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=positions.device)
    mask: Tensor = pattern(rows, heads, positions[:, None, :, None], keys)
    return mask.expand(positions.shape[0], 1, positions.shape[1], num_positions)


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Return attention with the heads of a group computed as queries of one head.

    Args:
        query: `(R, heads, Q, size)`.
        key: `(R, groups, T, size)`.
        value: `(R, groups, T, size)`.
        mask: None, or what is added, `(R, 1, heads / groups · Q, T)` or broadcast to it.
        scaling: of the products; None: 1 / √size.

    Returns:
        `(R, heads, Q, size)`.
    """
    rows, heads, num_queries, size = query.shape
    packed = query.reshape(rows, key.shape[1], heads // key.shape[1] * num_queries, size)
    mixed = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return mixed.reshape(rows, heads, num_queries, value.shape[-1])


def additive(mask: Tensor, dtype: torch.dtype, heads_per_group: int) -> Tensor:
    """Return `mask` `(R, 1, Q, T)` as `grouped_attention` takes it: 0 or −inf, for each head."""
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return added if mask.shape[2] == 1 else added.repeat(1, 1, heads_per_group, 1)


def attend_by_rows(model: PreTrainedModel) -> None:
    """Let `model` attend over rows of different lengths, by torch's attention or its eager one."""
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)
    else:  # models with an attention of their own read the name where they make the mask
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._attn_implementation = EAGER_NAME


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return attention as transformers has it: `(R, heads, Q, size)` to `(R, Q, heads, size)`."""
    groups, heads = key.shape[1], query.shape[1]
    plain = (
        query.device.type != "cpu" or groups == heads or options.get("position_bias") is not None
    )
    if plain or attention_mask is None or attention_mask.shape[1] != 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    mask = attention_mask
    if query.shape[2] > 1:
        mask = mask.repeat(1, 1, heads // groups, 1)
    return grouped_attention(query, key, value, mask, scaling).transpose(1, 2).contiguous(), None


def _eager_attention(module: nn.Module, *arguments: Any, **options: Any) -> Any:
    """Return what the eager attention of the file that `module` comes from returns."""
    file = sys.modules[type(module).__module__]
    return file.eager_attention_forward(module, *arguments, **options)


def _mask(
    q_length: int,
    kv_length: int,
    q_offset: Tensor | int,
    mask_function: Callable[..., Any],
    device: Any,
    **_: Any,
) -> Tensor:
    """Return the mask where `q_offset` `(R, 1)`, from `RowCache`, is each row's first position."""
    assert isinstance(q_offset, Tensor)
    return row_mask(q_offset + torch.arange(q_length, device=device), kv_length, mask_function)


def _eager_mask(dtype: torch.dtype, **arguments: Any) -> Tensor:
    """Return the mask as eager attention adds it: 0, or the dtype's lowest number."""
    mask = _mask(**arguments)
    lowest = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
AttentionInterface.register(EAGER_NAME, _eager_attention)
AttentionMaskInterface.register(EAGER_NAME, _eager_mask)
