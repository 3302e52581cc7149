"""Logits of the likeliest tokens in float32, so that rounding does not decide between two of them.

bfloat16 has 8 bits: logits around 16 come in steps of an eighth, and the likeliest two are often
closer. Only those that can be chosen are computed anew, each from its own row of the weight.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

FEW = 64
"""Rows of logits that share the tokens which are computed anew, at most."""
_EACH = 32  # tokens that are computed anew for a row, on average


def refined(logits: Tensor, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `logits` in float32, those of the likeliest tokens of any row with its precision.

    Args:
        logits: `(N, V)`, the product of the others in their dtype.
        states: `(N, width)`.
        weight: `(V, width)`.
        bias: `(V,)`, or None.

    Returns:
        `(N, V)`; as it is given, where it is no bfloat16 on a CPU.
    """
    if logits.dtype != torch.bfloat16 or logits.device.type != "cpu":
        return logits
    exact = logits.float()
    for rows, own in zip(exact.split(FEW), states.split(FEW), strict=True):
        nearest = (rows - rows.amax(-1, keepdim=True)).amax(0)
        tokens = nearest.topk(min(_EACH * len(rows), len(nearest))).indices
        offsets = None if bias is None else bias[tokens].float()
        rows[:, tokens] = F.linear(own.float(), weight[tokens].float(), offsets)
    return exact
