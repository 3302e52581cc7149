"""The 4-bit blocks of a GGUF file's matrices, as products with few rows take them.

Read where an engine starts, and kept nowhere else: the file has them already. A matrix of other
values (a task adapter was merged into it, say) is left alone.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import PreTrainedModel

from langchain_cope.engine.base.cpu_dtype import cpu_features
from langchain_cope.engine.base.gguf.cache import GgufFile
from langchain_cope.engine.base.gguf.header import PackedTensor
from langchain_cope.engine.base.gguf.tensors import Unpacking
from langchain_cope.engine.base.user_cache import kept_fact
from langchain_cope.engine.forward.matmul_order import Linear
from langchain_cope.engine.forward.packed_weights import (
    BLOCK,
    ROWS,
    Blocks,
    PackedWeight,
    rows_that_pay,
)
from langchain_cope.errors import ModelError

_log = logging.getLogger(__name__)


class FileBlocks:
    """See `BlockSource`: those of a model that was unpacked from a GGUF file."""

    def __init__(self, file: GgufFile, model: PreTrainedModel) -> None:
        self._path = file.path
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._unpacking: Unpacking | None = None
        try:
            self._unpacking = Unpacking(file.path, file.header, model)
        except ModelError:  # the file has gone since
            _log.debug("no blocks of %s", file.path, exc_info=True)

    def blocks(self, parameter: Tensor) -> Blocks | None:
        """Return the blocks of a parameter of the model, or None where it has no such values."""
        name = self._names.get(id(parameter), "")
        if self._unpacking is None or name not in self._unpacking.weights:
            return None
        found = self._unpacking.whole(name)
        if found is None:
            return None
        tensor, order = found
        read = _READERS.get(tensor.kind)
        if read is None:
            return None
        try:
            blocks = read(_raw(self._path, tensor, order))
        except (OSError, ValueError):  # the file has gone or become shorter
            _log.debug("no blocks of %s in %s", name, self._path, exc_info=True)
            return None
        return blocks if blocks.equal(parameter) else None

    def most_rows(
        self, packed: Sequence[PackedWeight], weights: Sequence[Tensor], linear: Linear
    ) -> int:
        """Return up to how many rows packed products are the faster ones.

        Measured once a machine and kept, so that every process on it gives the same answers.
        """
        facts = (cpu_features(), torch.__version__, torch.get_num_threads())
        kind = f"{facts} {len(weights) > 1} {packed[0].planes} {tuple(weights[0].shape)}"
        known = {str(rows): rows for rows in (0, *ROWS)}

        def find() -> str:
            return str(rows_that_pay(packed, weights, linear))

        return known[kept_fact("packed", kind, known.__contains__, find)]


def _raw(path: Path, tensor: PackedTensor, order: Tensor) -> Tensor:
    """Return the bytes of a matrix, its rows in that order.

    Their shape is `(out, blocks of a row, bytes of a block)`.
    """
    num_outputs, num_inputs = tensor.shape
    data = np.fromfile(path, np.uint8, tensor.num_bytes, offset=tensor.start)
    raw = torch.from_numpy(data).view(num_outputs, num_inputs // BLOCK, -1)
    return raw if bool((order.diff() == 1).all()) else raw[order]


def _q4_0(raw: Tensor) -> Blocks:
    """Scale, then codes around 8."""
    scales = _halves(raw[..., :2])
    return Blocks(_codes(raw[..., 2:]), scales, torch.zeros_like(scales))


def _q4_1(raw: Tensor) -> Blocks:
    """Scale and minimum, then codes from 0."""
    scales = _halves(raw[..., :2])
    return Blocks(_codes(raw[..., 4:]), scales, _halves(raw[..., 2:4]) + 8 * scales)


def _q8_0(raw: Tensor) -> Blocks:
    """Scale, then signed bytes: 16 · (high half) + (low half)."""
    scales = _halves(raw[..., :2])
    values = raw[..., 2:].flatten(1) ^ 128  # signed values, from 0 to 255 now: 128 is 16 · 8
    return Blocks(
        torch.cat([values >> 4, values & 15], dim=1),
        torch.cat([16 * scales, scales], dim=1),
        torch.cat([torch.zeros_like(scales), 8 * scales], dim=1),
        planes=2,
    )


def _codes(raw: Tensor) -> Tensor:
    """Return the codes of blocks: value i is the low half of byte i, value 16 + i its high half."""
    codes = torch.empty(*raw.shape[:-1], BLOCK, dtype=torch.uint8)
    codes[..., : BLOCK // 2] = raw & 15
    codes[..., BLOCK // 2 :] = raw >> 4
    return codes.flatten(1)


def _halves(raw: Tensor) -> Tensor:
    """Return float16 numbers, two bytes each, as float32 `(out, blocks of a row)`."""
    return raw.contiguous().view(torch.float16).squeeze(-1).float()


_READERS: dict[int, Callable[[Tensor], Blocks]] = {
    Kind.Q4_0: _q4_0,
    Kind.Q4_1: _q4_1,
    Kind.Q8_0: _q8_0,
}
