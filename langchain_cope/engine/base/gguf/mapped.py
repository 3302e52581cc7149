"""The unpacked weights of a GGUF file, mapped as one piece of memory.

transformers maps each tensor by itself. In one piece, projections that lie side by side in the file
lie so in memory too, and need no copy (`forward/fused_weights.py`); and all processes share the
pages.
"""

import json
import struct
from pathlib import Path

import torch
from transformers import PreTrainedModel

# Bytes: products with tensors that begin elsewhere are slower, and a copy is better.
_ALIGNMENT = 64


def map_weights(model: PreTrainedModel, path: Path) -> None:
    """Let the parameters of `model` be parts of the safetensors file that it was loaded from.

    Those of another dtype or shape than in the file stay as they are. What is written to one goes
    to memory, never to the file.
    """
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
    begin = 8 + length
    whole = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    for name, parameter in model.named_parameters():
        start, end = entries.get(name, {}).get("data_offsets", (0, 0))
        is_same = (
            parameter.nbytes == end - start and list(parameter.shape) == entries[name]["shape"]
        )
        if is_same and (begin + start) % _ALIGNMENT == 0:
            data = whole[begin + start : begin + end].view(parameter.dtype)
            parameter.data = data.view(parameter.shape)
