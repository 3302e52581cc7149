"""The 4-bit blocks of a GGUF file's matrices, as products with few rows take them.

Read once; what is made of them is kept (`packed.py`). A matrix of other values (a task adapter was
merged into it, say) is left alone.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import PreTrainedModel

from langchain_cope.engine.base.gguf.cache import GgufFile
from langchain_cope.engine.base.gguf.header import PackedTensor
from langchain_cope.engine.base.gguf.tensors import Unpacking
from langchain_cope.engine.forward.packed_weights import BLOCK, Blocks, PackedWeight

_log = logging.getLogger(__name__)


class FileBlocks:
    """The blocks of the parameters of a model that was unpacked from a GGUF file."""

    def __init__(self, file: GgufFile, model: PreTrainedModel) -> None:
        """Raises ModelError where the file has gone since."""
        self._path = file.path
        self._unpacking = Unpacking(file.path, file.header, model)
        self.changed: list[str] = []
        """Parameters that were found to have other values than their blocks."""

    def blocks(self, name: str, parameter: Tensor) -> Blocks | None:
        """Return the blocks of the parameter `name`, or None where it has no such values."""
        if name not in self._unpacking.weights:
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
        if blocks.equal(parameter):
            return blocks
        self.changed.append(name)
        return None

    def packed(self, names: Sequence[str], weights: Sequence[Tensor]) -> PackedWeight | None:
        """Return the packed product with those parameters side by side, or None without blocks."""
        parts = [self.blocks(*parameter) for parameter in zip(names, weights, strict=True)]
        present = [blocks for blocks in parts if blocks is not None]
        if len(present) < len(parts) or len({blocks.planes for blocks in present}) > 1:
            return None
        return PackedWeight.of(present)


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
