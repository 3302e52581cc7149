"""Projections that read the same input, side by side in memory, so that one product serves all.

Nothing is copied for good: the parameters become views of the common tensor, each with its own
name, shape and values. Those that lie side by side already stay where they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from langchain_cope.engine.device import CheckpointPages

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fuse_weights(model: nn.Module) -> None:
    """Move weights (and biases) of each group of projections in `model` into common tensors."""
    pages = CheckpointPages()
    for module in model.modules():
        for names in GROUPS:
            layers = [getattr(module, name, None) for name in names]
            if all(type(layer) is nn.Linear for layer in layers):
                _fuse([layer.weight for layer in layers], pages)  # type: ignore[union-attr]
                _fuse([layer.bias for layer in layers], pages)  # type: ignore[union-attr]


def fused(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Return one view of all `tensors`, which lie side by side; None where they do not."""
    present = [tensor for tensor in tensors if tensor is not None]
    if len(present) != len(tensors) or not present:
        return None
    first = present[0]
    storage = first.untyped_storage().data_ptr()
    start = first.storage_offset()
    for tensor in present:
        if not (
            tensor.untyped_storage().data_ptr() == storage
            and tensor.dtype == first.dtype
            and tensor.is_contiguous()
            and tensor.storage_offset() == start
            and tensor.shape[1:] == first.shape[1:]
        ):
            return None
        start += tensor.numel()
    rows = sum(tensor.shape[0] for tensor in present)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def _fuse(parameters: Sequence[nn.Parameter | None], pages: CheckpointPages) -> None:
    present = [parameter for parameter in parameters if parameter is not None]
    kinds = {(parameter.dtype, parameter.device, parameter.shape[1:]) for parameter in present}
    if len(present) != len(parameters) or len(kinds) != 1 or fused(present) is not None:
        return
    common = torch.cat([parameter.data for parameter in present])
    start = 0
    for parameter in present:
        pages.release(parameter.data)
        parameter.data = common[start : start + parameter.shape[0]]
        start += parameter.shape[0]
