"""Weights in the order in which oneDNN multiplies them fastest, for forwards of some rows.

A product with a weight as it lies in memory reorders it first, every time. To keep the reordered
ones costs their memory once more, and takes a third off a step of many users. The product is the
same to the last bit, so an answer does not depend on when that begins.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from langchain_cope.engine.device import free_bytes
from langchain_cope.engine.forward.timing import fastest_of_each

MOST_ROWS = 256
"""From here on arithmetic takes the time, and the bits differ."""
_USUAL_ROWS = 64  # that the order suits
_MOST_MEMORY = 0.25  # of what is free
_MARGIN = 0.9  # the products must take less than this share of the time
_CHECKED_ROWS = (5, 16, 64, MOST_ROWS)
_TIMED_ROWS = 16
_TRIALS = 3
_MAX_WEIGHTS = 8  # multiplied in a trial


class ReorderedWeight:
    """The product with one weight in bfloat16 for up to `MOST_ROWS` rows."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _USUAL_ROWS)

    def __call__(self, states: Tensor, bias: Tensor | None) -> Tensor:
        """Return what `F.linear` does: from `(…, in)` to `(…, out)`."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            states, self._weight, bias, "none", [], ""
        )
        return product


def can_reorder(weight: Tensor) -> bool:
    """Tell whether products with `weight` could be computed with a reordered one."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def reordered(weights: Sequence[Tensor]) -> list[ReorderedWeight] | None:
    """Return the products with `weights`.

    None where they are no faster here, differ in some bit, or take much of the free memory.
    """
    num_bytes = sum(weight.nbytes for weight in weights)
    if not all(map(can_reorder, weights)):
        return None
    if num_bytes > _MOST_MEMORY * free_bytes(weights[0].device):
        return None
    products = [ReorderedWeight(weight) for weight in weights]
    one_of_shape = {weight.shape: index for index, weight in enumerate(weights)}
    same = all(_equal(products[index], weights[index]) for index in one_of_shape.values())
    return products if same and _pays(products, weights) else None


def _equal(product: ReorderedWeight, weight: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(MOST_ROWS, weight.shape[1], generator=generator).to(weight.dtype)
    return all(
        torch.equal(product(states[:rows], None), F.linear(states[:rows], weight))
        for rows in _CHECKED_ROWS
    )


def _pays(products: Sequence[ReorderedWeight], weights: Sequence[Tensor]) -> bool:
    largest = max(weights, key=Tensor.numel)
    same = [index for index, weight in enumerate(weights) if weight.shape == largest.shape]
    timed = same[:_MAX_WEIGHTS]
    states = largest.new_ones(_TIMED_ROWS, largest.shape[1])
    ways = (
        lambda: [F.linear(states, weights[index]) for index in timed],
        lambda: [products[index](states, None) for index in timed],
    )
    as_it_lies, own_order = fastest_of_each(ways, _TRIALS)
    return own_order < _MARGIN * as_it_lies
