"""The faster of two orders of a product with a weight, per number of rows, measured once on the machine at hand.

``x · Wᵀ`` and ``(W · xᵀ)ᵀ`` are the same product, and which one a CPU's library is good at depends on the library, the processor,
the dtype and the number of rows. Both orders were twice as fast as the other somewhere: two rows in float32 want W first on an AMD
EPYC and last on an Intel Xeon; sixteen rows in bfloat16 want W first on the Xeon.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

LARGE = 1 << 18  # weights of a layer; smaller ones differ little
ROWS = (2, 4, 8, 16, 32, 64)
_MARGIN = 0.9  # the other order must take less than this share of the time
_TRIALS = 5

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""From states ``(…, in)``, weight ``(out, in)`` and bias to ``(…, out)``."""


class FasterOrder:
    """``F.linear``, computed in whichever order was faster for the number of rows."""

    def __init__(self, weight_first: frozenset[int]) -> None:
        self._weight_first = weight_first

    @classmethod
    def measured(cls, model: nn.Module) -> "FasterOrder":
        """Time both orders on the commonest large layers of ``model``; off CPUs there is nothing to choose."""
        layers = [
            m
            for m in model.modules()
            if type(m) is nn.Linear and m.weight.numel() >= LARGE and m.weight.is_contiguous()
        ]
        layers = [
            layer
            for layer in layers
            if layer.weight.device.type == "cpu" and layer.weight.is_floating_point()
        ]
        if not layers:
            return cls(frozenset())
        shapes = [layer.weight.shape for layer in layers]
        usual = max(
            set(shapes), key=shapes.count
        )  # many weights of one shape: the caches must not hold them all
        weights = [layer.weight for layer in layers if layer.weight.shape == usual][:16]
        return cls(frozenset(rows for rows in ROWS if _weight_first_wins(weights, rows)))

    def __call__(self, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `Linear`."""
        if self._weight_first and weight.numel() >= LARGE:
            num_rows = states.numel() // states.shape[-1]
            if (
                num_rows > 1
                and min(1 << (num_rows - 1).bit_length(), ROWS[-1] * 2) in self._weight_first
            ):
                return weight_first(states, weight, bias)
        return F.linear(states, weight, bias)


def weight_first(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``(W · xᵀ)ᵀ``."""
    product = torch.mm(weight, states.reshape(-1, states.shape[-1]).t()).t().contiguous()
    if bias is not None:
        product += bias
    return product.view(*states.shape[:-1], -1)


def _weight_first_wins(weights: list[Tensor], rows: int) -> bool:
    states = weights[0].new_ones(rows, weights[0].shape[1])
    usual, other = (
        min(_seconds(order, states, weights) for _ in range(_TRIALS))
        for order in (F.linear, weight_first)
    )
    return other < _MARGIN * usual


def _seconds(order: Linear, states: Tensor, weights: list[Tensor]) -> float:
    start = time.perf_counter()
    for weight in weights:
        order(states, weight, None)
    return time.perf_counter() - start
