"""Large linear layers for a pair of rows, which is one user's contrastive step, in float32 on a CPU.

torch multiplies two rows by a transposed weight at about half the speed of the same product the other way round (MKL; seen from
576 × 576 on, and at a head of 49 152 × 576 five times). Small layers gain nothing, nor do three rows or more.
"""

from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import PreTrainedModel

LARGE = 1 << 18  # weights of a layer


def hasten_pairs(model: PreTrainedModel) -> None:
    """Let the large linear layers of ``model`` compute pairs of rows that way, where it helps."""
    if model.device.type == "cpu" and model.dtype == torch.float32:
        for module in model.modules():
            if type(module) is nn.Linear and module.weight.numel() >= LARGE:
                module.forward = partial(_linear, module)  # type: ignore[method-assign]


def _linear(module: nn.Linear, states: Tensor) -> Tensor:
    if states.numel() != 2 * module.in_features:
        return F.linear(states, module.weight, module.bias)
    product = torch.mm(module.weight, states.reshape(2, -1).t()).t().contiguous()
    if module.bias is not None:
        product += module.bias
    return product.view(*states.shape[:-1], -1)
