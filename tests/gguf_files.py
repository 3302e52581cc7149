"""GGUF files written here from tiny real models, the way llama.cpp's converter lays them out.

Independent of what is tested: names and layouts stand here once more.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, AutoTokenizer

_LLAMA = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA = {
    **_LLAMA,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_PHI3 = {**_LLAMA, "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
_MOE = {
    **_LLAMA,
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
_FAMILIES = {  # architecture of the file, names
    "llama": ("llama", _LLAMA),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", _LLAMA),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3_text": ("gemma3", _GEMMA),
    "phi3": ("phi3", _PHI3),
    "qwen2_moe": ("qwen2moe", _MOE),
}


@dataclass
class Written:
    """A GGUF file, and the model that it was written from, with the weights it can hold."""

    path: Path
    source: Any
    tokenizer: Any
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    def logits(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.source(input_ids=torch.tensor([ids])).logits[0]


def write_gguf(
    path: Path,
    folder: Path,
    kind: Kind = Kind.F32,
    *,
    permuted: bool = True,
    fields: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> Written:
    """Write the tiny model in `folder` to the GGUF file `path`, its matrices packed as `kind`.

    `fields` replace metadata; None leaves one out. `extra` are further tensors.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    arch, names = _FAMILIES[model.config.model_type]
    writer = gguf.GGUFWriter(path, arch)
    stated = {**_metadata(arch, model.config), **_vocabulary(tokenizer), **(fields or {})}
    for name, value in stated.items():
        _add(writer, name, value)
    written = Written(path, model.eval(), tokenizer)
    state = model.state_dict()
    for name, values in _tensors(model, arch, names, permuted=permuted):
        packed, held, used = _packed(values, kind)
        writer.add_tensor(name, packed, raw_dtype=used)
        written.tensors[name] = held
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with torch.no_grad():
        for name, values in _as_held(model, arch, names, written.tensors, permuted=permuted):
            state[name].copy_(values)
    return written


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of each head from halves (transformers) to pairs (llama.cpp)."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weights.shape)


def unpermute(weights: np.ndarray, heads: int) -> np.ndarray:
    """Undo `permute`."""
    pairs = weights.reshape(heads, weights.shape[0] // heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weights.shape)


def _heads(config: Any, name: str) -> int | None:
    if name.endswith("attn_q.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("attn_k.weight") else None


def _tensors(model: Any, arch: str, names: dict[str, str], *, permuted: bool) -> Any:
    """Yield (name, values) of every tensor of the file."""
    for hf_name, tensor in model.state_dict().items():
        values = tensor.float().numpy().copy()
        if hf_name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if hf_name.endswith("experts.gate_up_proj"):
            block = hf_name.split(".")[2]
            half = values.shape[1] // 2
            yield f"blk.{block}.ffn_gate_exps.weight", values[:, :half].copy()
            yield f"blk.{block}.ffn_up_exps.weight", values[:, half:].copy()
            continue
        name = _name(hf_name, names)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        heads = _heads(model.config, name)
        if arch == "llama" and heads and permuted:
            values = permute(values, heads)
        yield name, values.reshape(-1) if name.endswith("inp_shexp.weight") else values


def _as_held(
    model: Any, arch: str, names: dict[str, str], held: dict[str, np.ndarray], *, permuted: bool
) -> Any:
    """Yield (name, values) of the source's weights as the file holds them."""
    for hf_name in model.state_dict():
        if hf_name.endswith("experts.gate_up_proj"):
            block = hf_name.split(".")[2]
            parts = [held[f"blk.{block}.ffn_{part}_exps.weight"] for part in ("gate", "up")]
            yield hf_name, torch.from_numpy(np.concatenate(parts, axis=1))
            continue
        name = _name(hf_name, names)
        if name not in held:
            continue
        values = held[name]
        heads = _heads(model.config, name)
        if arch == "llama" and heads and permuted:
            values = unpermute(values, heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values - 1
        yield hf_name, torch.from_numpy(values.copy()).view_as(model.state_dict()[hf_name])


def _name(hf_name: str, names: dict[str, str]) -> str:
    stem, _, suffix = hf_name.rpartition(".")
    if suffix not in {"weight", "bias"}:
        stem, suffix = hf_name, "weight"
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if layer:
        return f"blk.{layer[1]}.{names[layer[2]]}.{suffix}"
    return f"{names[stem]}.{suffix}"


def _packed(values: np.ndarray, kind: Kind) -> tuple[np.ndarray, np.ndarray, Kind]:
    """Return the bytes, the values that they hold, and the kind; vectors stay float32."""
    if values.ndim == 1 or values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = Kind.F32
    packed = (
        _random_blocks(values.shape, kind) if _only_unpacks(kind) else gguf.quantize(values, kind)
    )
    return packed, np.array(gguf.dequantize(packed, kind)).reshape(values.shape), kind


def _only_unpacks(kind: Kind) -> bool:
    return kind in {Kind.Q4_K, Kind.Q6_K}


def _random_blocks(shape: tuple[int, ...], kind: Kind) -> np.ndarray:
    """Return random blocks of a kind that gguf unpacks but does not pack, with small scales."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    generator = np.random.default_rng(shape[0])
    blocks = generator.integers(0, 256, (*shape[:-1], shape[-1] // 256, size), dtype=np.uint8)
    scale = np.frombuffer(np.array([1e-4, 1e-4], np.float16).tobytes(), np.uint8)
    if kind is Kind.Q6_K:
        blocks[..., -2:] = scale[:2]
    else:
        blocks[..., :4] = scale
    return blocks.reshape(*shape[:-1], -1)


def _metadata(arch: str, config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": head,
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "expert_count": getattr(config, "num_experts", None),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
        "expert_shared_feed_forward_length": getattr(
            config, "shared_expert_intermediate_size", None
        ),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "vocab_size": config.vocab_size,
    }
    return {f"{arch}.{name}": value for name, value in fields.items()}


def _vocabulary(tokenizer: Any) -> dict[str, Any]:
    import json

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens) | {"<|im_start|>"}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.chat_template": tokenizer.chat_template,
    }


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    elif isinstance(value, list):
        writer.add_array(name, value)
