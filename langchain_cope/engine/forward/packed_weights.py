"""Products with the 4-bit blocks that a base's file holds, for forwards of few rows.

A step of few rows waits for the weights, which in blocks are a quarter of bfloat16's bytes; many
rows wait for the arithmetic, which bfloat16 does faster. Both compute with the file's own values:
one rounds each weight to bfloat16, the other the scale and the zero of each block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from langchain_cope.engine.forward.matmul_order import LARGE, Linear
from langchain_cope.engine.forward.timing import fastest_of_each

BLOCK = 32
"""Weights of a row that have a scale and a zero in common."""
ROWS = (1, 2, 4, 8, 16)
_ROWS_PACKED = 128  # at once: few, so that they stay in the cache; a multiple of the kernel's 64
_OUTPUTS = 16  # the kernel takes multiples of this
_MARGIN = 0.9  # the packed product must take less than this share of the time
_TRIALS = 3
_MAX_WEIGHTS = 8  # multiplied in a trial
_PIECE = 1 << 17  # weights that are compared at once: few, so that they stay in the cache


@dataclass(frozen=True)
class Blocks:
    """A weight `(out, in)` as blocks of 32: each value is `(code − 8) · scale + zero`."""

    codes: Tensor
    """`(out, planes · in)` uint8, 0 to 15. Of several planes the values are added."""
    scales: Tensor
    """`(out, planes · in / 32)` float32."""
    zeros: Tensor
    """The same shape."""
    planes: int = 1

    def equal(self, weight: Tensor) -> bool:
        """Tell whether `weight`, in bfloat16, is these values rounded to it."""
        num_outputs, num_codes = self.codes.shape
        if weight.shape != (num_outputs, num_codes // self.planes):
            return False
        step = max(1, _PIECE // num_codes)
        # One piece of memory for all: fresh pages would cost more than the arithmetic.
        values = torch.empty(step, num_codes // BLOCK, BLOCK)
        pieces = zip(
            *(torch.split(part, step) for part in (self.codes, self.scales, self.zeros, weight)),
            strict=True,
        )
        return all(torch.equal(self._values(values, *piece), rows) for *piece, rows in pieces)

    def _values(self, buffer: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """Return the values of a few rows in bfloat16, computed in `buffer`."""
        values = buffer[: len(codes)].copy_(codes.view(*scales.shape, BLOCK))
        values.sub_(8).mul_(scales.unsqueeze(-1)).add_(zeros.unsqueeze(-1))
        planes = values.view(len(codes), self.planes, -1)
        for plane in range(1, self.planes):
            planes[:, 0] += planes[:, plane]
        return planes[:, 0].to(torch.bfloat16)


class PackedWeight:
    """The product with one weight, or with several that lie side by side."""

    def __init__(self, codes: Tensor, scales: Tensor, planes: int) -> None:
        """Take what the kernel multiplies with.

        Args:
            codes: uint8, in the kernel's own order, which depends on processor and torch.
            scales: `(blocks of a row, out, 2)` bfloat16: scale and zero.
            planes: see `Blocks`.
        """
        self.codes = codes
        self.scales = scales
        self.planes = planes

    @classmethod
    def of(cls, parts: Sequence[Blocks]) -> "PackedWeight":
        """Pack `parts`, which have as many planes, the rows of one after those of the other."""
        codes = torch.cat([part.codes for part in parts])
        scales, zeros = (torch.cat(each) for each in zip(*map(_rounded, parts), strict=True))
        # The kernel's own order, the same for pieces; the number is of no meaning on a CPU.
        pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        packed = torch.cat([pack(piece.int(), 2) for piece in torch.split(codes, _ROWS_PACKED)])
        both = torch.stack([scales, zeros], dim=-1).transpose(0, 1)
        return cls(packed, both.to(torch.bfloat16).contiguous(), parts[0].planes)

    def __call__(self, states: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product: from `(…, in)` in bfloat16 to `(…, out)`."""
        flat = states.reshape(-1, states.shape[-1])
        if self.planes > 1:
            flat = flat.repeat(1, self.planes)
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            flat, self.codes, BLOCK, self.scales
        )
        if bias is not None:
            product += bias
        return product.view(*states.shape[:-1], -1)


class BlockSource(Protocol):
    """What gives the packed products of a model's parameters."""

    def packed(self, groups: Sequence[Sequence[Tensor]], /) -> list[PackedWeight | None]:
        """Return the packed product with each group of parameters side by side.

        None where one of them has no blocks, or other values than those of its blocks.
        """
        ...

    def most_rows(
        self, packed: Sequence[PackedWeight], weights: Sequence[Tensor], linear: Linear, /
    ) -> int:
        """Return what `rows_that_pay` does, or did on this machine."""
        ...


def is_worth_packing(weights: Sequence[Tensor]) -> bool:
    """Tell whether the kernel takes `weights` side by side, and they are large enough to differ."""
    num_outputs = sum(len(weight) for weight in weights)
    return num_outputs % _OUTPUTS == 0 and num_outputs * weights[0].shape[1] >= LARGE


def rows_that_pay(packed: Sequence[PackedWeight], weights: Sequence[Tensor], linear: Linear) -> int:
    """Return up to how many rows `packed` products are faster than those with `weights`; or 0."""
    most = 0
    packed, weights = packed[:_MAX_WEIGHTS], weights[:_MAX_WEIGHTS]
    for rows in ROWS:
        states = weights[0].new_ones(rows, weights[0].shape[1])
        ways = (
            partial(_all, [partial(linear, states, weight, None) for weight in weights]),
            partial(_all, [partial(product, states, None) for product in packed]),
        )
        dense, few = fastest_of_each(ways, _TRIALS)
        if few > _MARGIN * dense:
            break
        most = rows
    return most


def can_pack(weight: Tensor) -> bool:
    """Tell whether products with `weight` could be computed with packed blocks."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
    )


def _rounded(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Return scales that bfloat16 holds, and zeros that leave the mean of each block as it is."""
    scales = blocks.scales.bfloat16().float()
    mean_codes = blocks.codes.view(*scales.shape, BLOCK).float().mean(-1) - 8
    return scales, blocks.zeros + mean_codes * (blocks.scales - scales)


def _all(works: Sequence[Callable[[], object]]) -> None:
    for work in works:
        work()
