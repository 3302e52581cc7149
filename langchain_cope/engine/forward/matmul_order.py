"""The faster of two orders of a product with a weight, measured on the machine at hand.

`x · Wᵀ` and `(W · xᵀ)ᵀ` are the same product. Which one a CPU's library is good at depends on the
library, the processor, the dtype and the number of rows. Each order was twice as fast as the other
somewhere: two rows in float32 want W first on an AMD EPYC and last on an Intel Xeon; sixteen rows
in bfloat16 want W first on the Xeon.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from langchain_cope.engine.forward.timing import fastest_of_each

LARGE = 1 << 18  # weights of a layer; smaller ones differ little
ROWS = (2, 4, 8, 16, 32, 64)
_MARGIN = 0.9  # the other order must take less than this share of the time
_TRIALS = 20
_MAX_WEIGHTS = 16  # multiplied in a trial: so many that no cache holds them all

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""From states `(…, in)`, weight `(out, in)` and bias to `(…, out)`."""


class MatmulOrder:
    """`F.linear`, computed in whichever order was faster for the number of rows."""

    def __init__(self, weight_first: frozenset[int]) -> None:
        """Take the numbers of `ROWS` for which W comes first."""
        self.weight_first = weight_first

    @classmethod
    def measured(cls, weights: Sequence[Tensor]) -> "MatmulOrder":
        """Time both orders on weights of one shape."""
        timed = list(weights[:_MAX_WEIGHTS])
        return cls(frozenset(rows for rows in ROWS if _weight_first_wins(timed, rows)))

    def __call__(self, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `Linear`."""
        if self._wants_weight_first(states, weight):
            return weight_first(states, weight, bias)
        return F.linear(states, weight, bias)

    def plus(self, states: Tensor, weight: Tensor, bias: Tensor | None, change: Tensor) -> Tensor:
        """Return the product plus `change` `(…, out)`, which is added before the sum is rounded."""
        rows, changes = states.reshape(-1, states.shape[-1]), change.view(-1, change.shape[-1])
        if self._wants_weight_first(states, weight):
            product = torch.addmm(changes.t(), weight, rows.t()).t().contiguous()
        else:
            product = torch.addmm(changes, rows, weight.t())
        if bias is not None:  # after it: a small change would be lost in the sum of the two
            product += bias
        return product.view(change.shape)

    def _wants_weight_first(self, states: Tensor, weight: Tensor) -> bool:
        if not self.weight_first or weight.numel() < LARGE:
            return False
        num_rows = states.numel() // states.shape[-1]
        measured_rows = min(1 << (num_rows - 1).bit_length(), ROWS[-1] * 2)
        return num_rows > 1 and measured_rows in self.weight_first


def weight_first(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `(W · xᵀ)ᵀ`."""
    product = torch.mm(weight, states.reshape(-1, states.shape[-1]).t()).t().contiguous()
    if bias is not None:
        product += bias
    return product.view(*states.shape[:-1], -1)


def usual_weights(model: nn.Module) -> list[Tensor]:
    """Return the large weights of the commonest shape of `model`; none where it is on no CPU."""
    weights = [module.weight for module in model.modules() if type(module) is nn.Linear]
    weights = [weight for weight in weights if _can_be_ordered(weight)]
    shapes = [weight.shape for weight in weights]
    usual = max(sorted(set(shapes)), key=shapes.count, default=None)
    return [weight for weight in weights if weight.shape == usual]


def _can_be_ordered(weight: Tensor) -> bool:
    return (
        weight.numel() >= LARGE
        and weight.is_contiguous()
        and weight.device.type == "cpu"
        and weight.is_floating_point()
    )


def _weight_first_wins(weights: list[Tensor], rows: int) -> bool:
    states = weights[0].new_ones(rows, weights[0].shape[1])
    orders = (F.linear, weight_first)
    ways = [partial(_multiply, order, states, weights) for order in orders]
    usual, other = fastest_of_each(ways, _TRIALS)
    return bool(other < _MARGIN * usual)


def _multiply(order: Linear, states: Tensor, weights: list[Tensor]) -> None:
    for weight in weights:
        order(states, weight, None)
