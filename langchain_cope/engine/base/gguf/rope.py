"""How positions turn (RoPE) in a GGUF file's model: the base, the share, the scaling.

transformers reads the base for some architectures and the rest for none. Any of it left out changes
every answer without a word, so all of it is taken from the file here, or refused by name.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from langchain_cope.engine.base.gguf.header import GgufHeader
from langchain_cope.errors import ModelError

FREQUENCIES = "rope_freqs.weight"
"""The tensor of Llama 3's scaling: what each frequency is divided by."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192  # of the training before the context was extended
_DEFAULT_BASE = 10_000.0
# What a file may scale besides, by the values that change nothing: -1 leaves it to llama.cpp.
_UNCHANGED: dict[str, tuple[float, ...]] = {
    "attn_factor": (1,),
    "yarn_attn_factor": (1,),
    "yarn_ext_factor": (1, -1),
    "yarn_beta_fast": (32,),
    "yarn_beta_slow": (1,),
    "yarn_log_multiplier": (0,),
}


def set_rope(path: Path, header: GgufHeader, config: Any) -> None:
    """Make the rotary positions of `config` those of the GGUF file `path`.

    Raises ModelError where they are of a kind that cannot be told to transformers.
    """
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return
    base_of_window = header.own("rope.freq_base_swa")
    if base_of_window is not None and "sliding_attention" in rope:
        rope["sliding_attention"]["rope_theta"] = base_of_window
    # Of an architecture with two kinds of layers, the other fields are about those that see all.
    rope = rope.get("full_attention", rope)
    base = header.own("rope.freq_base")
    if base is not None:
        rope["rope_theta"] = base
    turned, size = header.own("rope.dimension_count"), _head_size(config)
    if turned and turned != size and "partial_rotary_factor" in rope:
        rope["partial_rotary_factor"] = turned / size
    elif turned and turned != size * rope.get("partial_rotary_factor", 1):
        raise _refusal(path, f"turns {turned} of {size} values")
    rope.update(_scaling(path, header))
    if frequencies := _frequencies(path, header):
        rope.update(_llama3(path, header, frequencies, rope.get("rope_theta", _DEFAULT_BASE)))


def _head_size(config: Any) -> int:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(size)


def _scaling(path: Path, header: GgufHeader) -> dict[str, Any]:
    """Return the parameters of the scaling that the metadata names."""
    for name, unchanged in _UNCHANGED.items():
        value = header.own(f"rope.scaling.{name}")
        if value is not None and value not in unchanged:
            raise _refusal(path, f"are scaled by {name} {value}")
    kind = header.own("rope.scaling.type") or "none"
    factor = header.own("rope.scaling.factor") or header.own("rope.scale_linear") or 1.0
    if factor == 1 and kind in {"none", "linear", "yarn"}:
        return {}
    if kind in {"none", "linear"}:
        return {"rope_type": "linear", "factor": factor}
    trained = header.own("rope.scaling.original_context_length")
    if kind == "yarn" and trained:
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": trained,
        }
    raise _refusal(path, f"are scaled by {kind!r}")


def _frequencies(path: Path, header: GgufHeader) -> list[float]:
    """Return what each frequency is divided by; empty where all are left as they are."""
    for tensor in header.tensors:
        if tensor.name == FREQUENCIES:
            data = np.fromfile(path, np.float32, math.prod(tensor.shape), offset=tensor.start)
            return [] if (data == 1).all() else data.tolist()
    return []


def _llama3(path: Path, header: GgufHeader, divisors: list[float], base: float) -> dict[str, Any]:
    """Return the parameters of Llama 3's scaling that make these divisors."""
    factor = round(max(divisors), 3)
    trained = header.own("rope.scaling.original_context_length") or _LLAMA3_CONTEXT
    half = len(divisors)
    waves = 2 * math.pi * base ** (np.arange(half) / half)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    smooth = ((trained / waves - low) / (high - low)).clip(0, 1)
    if not np.allclose(1 / ((1 - smooth) / factor + smooth), divisors, rtol=1e-3):
        raise _refusal(path, "are divided in another way than Llama 3's")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "original_max_position_embeddings": trained,
        **_LLAMA3,
    }


def _refusal(path: Path, how: str) -> ModelError:
    return ModelError(
        f"the rotary positions of {path} {how}, which cannot be told to transformers: give the "
        "model as safetensors"
    )
