"""The tensors of a GGUF file as safetensors: unpacked one after another, straight into the file.

Names and layouts differ between llama.cpp and transformers. transformers knows both ways for every
architecture that it reads; its tables are used here, its loader is not: that one holds all weights
in memory at once, several times over.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from langchain_cope.engine.base.gguf.header import GgufHeader, PackedTensor
from langchain_cope.engine.base.gguf.rope import FREQUENCIES
from langchain_cope.errors import ModelError

_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
_ALIGNMENT = 64  # bytes of a cache line: products with mapped tensors that begin at one are faster
_PIECE = 1 << 20  # weights that are converted at once
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class Unpacking:
    """How the tensors of one GGUF file become the weights of a transformers model."""

    def __init__(self, path: Path, header: GgufHeader, model: PreTrainedModel) -> None:
        """Find out which tensors make which weight.

        Args:
            path: the GGUF file.
            header: its header.
            model: the model, with or without data (`model_without_data`).

        Raises:
            ModelError: the architecture is not known, or tensors and weights do not match.
        """
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        self._path = path
        # transformers' functions have no types.
        processor: Any = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)
        self._processor: Any = processor(config=model.config.to_dict())
        self.weights = _own_weights(model)
        """What the model needs, by name: tensors without data. Tied ones are there once."""
        try:
            self._names = get_gguf_hf_weights_map(_Names(model, depth=1), self._processor)
        except NotImplementedError as error:
            raise ModelError(
                f"transformers cannot unpack the architecture {header.architecture!r} of {path}"
            ) from error
        self._parts = self._parts_of_weights(header)

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of all weights in `dtype`."""
        return sum(weight.numel() for weight in self.weights.values()) * dtype.itemsize

    def write(self, path: Path, dtype: torch.dtype) -> None:
        """Write all weights in `dtype` to the safetensors file `path`.

        Raises ModelError where a tensor cannot be unpacked, or has another shape than the weight.
        """
        with self._path.open("rb") as packed, path.open("xb") as file:
            shapes = {name: (dtype, weight.shape) for name, weight in self.weights.items()}
            file.write(safetensors_header(shapes))
            for name, weight in self.weights.items():
                values = self._unpacked(packed, name)
                if values.shape != weight.shape:
                    raise ModelError(
                        f"the weight {name} in {self._path} has the shape {tuple(values.shape)}, "
                        f"but its configuration asks for {tuple(weight.shape)}"
                    )
                flat = values.contiguous().view(-1)
                for start in range(0, len(flat), _PIECE):
                    piece = flat[start : start + _PIECE].to(dtype)
                    piece.view(_BITS[dtype]).numpy().tofile(file)

    def whole(self, name: str) -> tuple[PackedTensor, Tensor] | None:
        """Return the tensor of the weight `name`, and which of its rows is each of the weight's.

        None where the weight is no matrix of its own.
        """
        if len(self._parts[name]) != 1 or self.weights[name].ndim != 2:
            return None
        (tensor,) = self._parts[name]
        numbers = np.arange(tensor.shape[0], dtype=np.int64).reshape(-1, 1)
        collected: dict[str, Tensor] = {}
        processed = self._processor.process(
            weights=numbers,
            name=tensor.name,
            tensor_key_mapping=self._names,
            parsed_parameters={"tensors": collected},
        )
        if processed.name is None or collected or processed.weights.shape != numbers.shape:
            return None
        return tensor, torch.from_numpy(processed.weights.reshape(-1).copy())

    def _parts_of_weights(self, header: GgufHeader) -> dict[str, list[PackedTensor]]:
        """Return the tensors of the file that make each weight."""
        parts: dict[str, list[PackedTensor]] = {name: [] for name in self.weights}
        unknown = []
        for tensor in header.tensors:
            # Experts are plain parameters, whose names have no suffix in transformers.
            stem = tensor.name.removesuffix(".weight")
            name = self._names.get(tensor.name) or self._names.get(stem)
            if name in parts:
                parts[name].append(tensor)
            elif tensor.name != FREQUENCIES:
                unknown.append(tensor.name)
        missing = [name for name, tensors in parts.items() if not tensors]
        if missing or unknown:
            raise ModelError(
                f"the architecture {header.architecture!r} of {self._path} is not read as "
                f"transformers has it:{_some(missing, 'missing')}"
                f"{_some(unknown, 'left over')} give the model as safetensors"
            )
        return parts

    def _unpacked(self, packed: IO[bytes], name: str) -> Tensor:
        """Return the weight `name`, in float32."""
        # Several tensors may make one weight: the processor then collects it here.
        collected: dict[str, Tensor] = {}
        values: Tensor | None = None
        for tensor in self._parts[name]:
            processed = self._processor.process(
                weights=_dequantized(packed, tensor),
                name=tensor.name,
                tensor_key_mapping=self._names,
                parsed_parameters={"tensors": collected},
            )
            if processed.name is not None:
                values = torch.from_numpy(np.ascontiguousarray(processed.weights))
        result = collected.get(name, values)
        if result is None:
            raise ModelError(f"the weight {name} in {self._path} cannot be unpacked")
        return result


def model_without_data(config: Any) -> PreTrainedModel:
    """Return a model of that configuration whose tensors hold nothing."""
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config, trust_remote_code=False)
    return model


class _Names:
    """A model's names for `get_gguf_hf_weights_map`, down to the children of `depth` levels.

    That function asks every module of the tree, which takes seconds; names differ only by whether
    they begin at the model or at its first child.
    """

    def __init__(self, model: nn.Module, depth: int) -> None:
        self._model = model
        self._depth = depth
        self.config = model.config

    def state_dict(self) -> dict[str, Tensor]:
        return self._model.state_dict()

    def named_children(self) -> list[tuple[str, "_Names"]]:
        if not self._depth:
            return []
        children = self._model.named_children()
        return [
            (name, _Names(child, self._depth - 1))
            for name, child in children
            if isinstance(child, PreTrainedModel)
        ]


def _own_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the model's state; those that are one under two names once."""
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            weights[name] = tensor
    return weights


def _dequantized(packed: IO[bytes], tensor: PackedTensor) -> Any:
    """Return the values of a tensor, in float32."""
    import gguf

    packed.seek(tensor.start)
    kind = gguf.GGMLQuantizationType(tensor.kind)
    width = tensor.shape[-1]
    row_bytes = tensor.num_bytes // (tensor.num_elements // width)
    values = np.empty((tensor.num_elements // width, width), np.float32)
    step = max(1, _PIECE // width)
    for start in range(0, len(values), step):
        rows = values[start : start + step]
        # Read, not mapped: pages of a mapped file would count as memory of this process.
        data = np.fromfile(packed, np.uint8, len(rows) * row_bytes).reshape(len(rows), row_bytes)
        try:
            rows[:] = gguf.dequantize(data, kind)
        except NotImplementedError as error:
            raise ModelError(
                f"the package gguf cannot unpack the quantization {kind.name} of {tensor.name}"
            ) from error
    return values.reshape(tensor.shape)


def safetensors_header(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Return what a safetensors file of `tensors` (dtype, shape) begins with.

    Their bytes follow in the same order. The first begins at a multiple of a cache line, and with
    it every further one where sizes are such multiples.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _some(names: list[str], what: str) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f" {shown} {what} ({len(names)});"
