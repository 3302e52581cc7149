"""What an adapter is bound to: the parts of a base that decide what it computes.

The parts are kept apart, so that a refusal can name what differs. A re-save of the same tensors into other shards changes
nothing; another value, dtype, tokenizer or template does. Device, attention kernel and the dtype of computation are no part
(the latter only of a checkpoint that is not safetensors, whose tensors are known as they were loaded).
"""

import hashlib
import json
import mmap
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.hub import cached_file

from langchain_cope.engine.adapter import CONFIG, WEIGHTS
from langchain_cope.engine.base.digests import remembered

if TYPE_CHECKING:
    from langchain_cope.engine.base.base import Base

# Fields of a configuration that say where it came from or how it is run, not what it computes.
_NOT_ARCHITECTURE = {
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "architectures",
    "quantization_config",
}


def fingerprint_of(base: "Base") -> dict[str, str]:
    """The parts: ``architecture``, ``weights``, ``tokenizer``, ``chat_template`` and ``task_adapter`` as sha256.

    ``model`` and ``quantization`` are text, recorded for people and not compared.
    """
    config = {
        k: v
        for k, v in base.model.config.to_diff_dict().items()
        if not k.startswith("_") and k not in _NOT_ARCHITECTURE
    }
    return {
        "model": base.name,
        "architecture": _sha256_json({"model_type": base.model.config.model_type, **config}),
        "weights": _weights_digest(base),
        "tokenizer": _tokenizer_digest(base),
        "chat_template": hashlib.sha256(str(base.tokenizer.chat_template).encode()).hexdigest(),
        "task_adapter": _folder_digest(base.task_adapter) if base.task_adapter else "none",
        "quantization": base.quantization or "none",
    }


def _sha256_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _tokenizer_digest(base: "Base") -> str:
    tokenizer = base.tokenizer
    vocabulary = sorted(tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = json.loads(backend.to_str()) if backend is not None else {}
    # Truncation and padding are set by whoever called last.
    rules = {k: whole.get(k) for k in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}
    # A vocabulary that is a list has scores; else it is the one above.
    model = {k: v for k, v in whole.get("model", {}).items() if k != "vocab" or isinstance(v, list)}
    return _sha256_json([vocabulary, special, rules, model])


def _weights_digest(base: "Base") -> str:
    """sha256 over the sorted (name, shape, dtype, bytes) of the checkpoint's tensors."""
    files = _checkpoint_files(base)
    if files:
        return remembered(files, lambda: _files_digest(files))
    digest = hashlib.sha256()
    for name, tensor in sorted(base.model.state_dict().items()):
        digest.update(f"{name}\0{list(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def _files_digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for name, shape, dtype, data in sorted(_tensors(files), key=lambda tensor: tensor[0]):
        digest.update(f"{name}\0{shape}\0{dtype}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def _checkpoint_files(base: "Base") -> list[Path]:
    """The safetensors files that the base was loaded from; none where it came in another format."""
    folder = Path(base.source)
    if not folder.is_dir():
        revision = getattr(base.model.config, "_commit_hash", None) or base.revision
        config_file = cached_file(
            base.source, "config.json", revision=revision, local_files_only=True
        )
        folder = Path(str(config_file)).parent
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [
            folder / name
            for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
        ]
    return [file for file in [folder / "model.safetensors"] if file.is_file()]


def _tensors(files: list[Path]) -> list[tuple[str, list[int], str, memoryview]]:
    """(name, shape, dtype, bytes) of every tensor of safetensors files, read in place."""
    found = []
    for path in files:
        with path.open("rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        (header_size,) = struct.unpack("<Q", view[:8])
        data = view[8 + header_size :]
        for name, entry in json.loads(bytes(view[8 : 8 + header_size])).items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                found.append((name, entry["shape"], entry["dtype"], data[start:end]))
    return found


def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()
