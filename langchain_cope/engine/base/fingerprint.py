"""What an adapter is bound to: the parts of a base that decide what it computes.

The parts are kept apart, so that a refusal can name what differs. A re-save of the same tensors
into other shards changes nothing; another value, dtype, tokenizer or template does. Device,
attention kernel and dtype of the computation do not count (the latter counts for a checkpoint that
is not safetensors, because its tensors are known only as they were loaded). The weights of a GGUF
file are known by the content of that file, wherever it lies and whatever it was unpacked to.
"""

import hashlib
import json
import mmap
import struct
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from langchain_cope._collector import collector_paused
from langchain_cope.engine.adapter import CONFIG, WEIGHTS
from langchain_cope.engine.base.digests import cached_digest

# Fields of a configuration that say where it came from or how it is run, not what it computes.
_NOT_ARCHITECTURE = {
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "architectures",
    "quantization_config",
}


class LoadedBase(Protocol):
    """What a fingerprint is computed from: the fields of `Base` that it needs."""

    name: str
    source: str
    revision: str | None
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    task_adapter: Path | None
    quantization: str | None

    @property
    def weights_digest(self) -> str | None:
        """Digest of the file that the weights were unpacked from, if there is one."""


@collector_paused()
def fingerprint_of(base: LoadedBase) -> dict[str, str]:
    """Return the fingerprint of `base`, part by part.

    `architecture`, `weights`, `tokenizer`, `chat_template` and `task_adapter` are sha256 digests in
    hex (`task_adapter` is `none` without one). `model` and `quantization` are text, recorded for
    people and not compared.
    """
    task_adapter = "none" if base.task_adapter is None else _folder_digest(base.task_adapter)
    return {
        "model": base.name,
        "architecture": _architecture_digest(base.model.config),
        "weights": base.weights_digest or _weights_digest(base),
        "tokenizer": _tokenizer_digest(base.tokenizer),
        "chat_template": hashlib.sha256(str(base.tokenizer.chat_template).encode()).hexdigest(),
        "task_adapter": task_adapter,
        "quantization": base.quantization or "none",
    }


def _sha256_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _architecture_digest(config: Any) -> str:
    fields = {"model_type": config.model_type}
    for name, value in config.to_diff_dict().items():
        if not name.startswith("_") and name not in _NOT_ARCHITECTURE:
            fields[name] = value
    return _sha256_json(fields)


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings = json.loads(backend.to_str()) if backend is not None else {}
    # Truncation and padding are left out: they are what the latest call set.
    kept = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    rules = {name: settings.get(name) for name in kept}
    model = dict(settings.get("model", {}))
    if not isinstance(model.get("vocab"), list):  # a list has scores, else it is `vocabulary`
        model.pop("vocab", None)
    return _sha256_json([vocabulary, special, rules, model])


def _weights_digest(base: LoadedBase) -> str:
    """Return the sha256 over the sorted (name, shape, dtype, bytes) of the checkpoint's tensors."""
    files = _checkpoint_files(base)
    if files:
        return cached_digest(files, lambda: _files_digest(files))
    digest = hashlib.sha256()
    for name, tensor in sorted(base.model.state_dict().items()):
        digest.update(f"{name}\0{list(tensor.shape)}\0{tensor.dtype}\0".encode())
        plain = tensor.detach().cpu().contiguous().view(-1)
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _files_digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for name, shape, dtype, data in sorted(_tensors(files), key=lambda tensor: tensor[0]):
        digest.update(f"{name}\0{shape}\0{dtype}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def _checkpoint_files(base: LoadedBase) -> list[Path]:
    """Return the safetensors files of the base's checkpoint; empty where it has another format."""
    folder = Path(base.source)
    if not folder.is_dir():
        revision = getattr(base.model.config, "_commit_hash", None) or base.revision
        config_file = cached_file(
            base.source, "config.json", revision=revision, local_files_only=True
        )
        folder = Path(str(config_file)).parent
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
        return [folder / name for name in sorted(names)]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else []


def _tensors(files: list[Path]) -> list[tuple[str, list[int], str, memoryview]]:
    """Return (name, shape, dtype, bytes) of every tensor of safetensors files, read in place."""
    tensors = []
    for path in files:
        with path.open("rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        (header_size,) = struct.unpack("<Q", view[:8])
        data = view[8 + header_size :]
        for name, entry in json.loads(bytes(view[8 : 8 + header_size])).items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                tensors.append((name, entry["shape"], entry["dtype"], data[start:end]))
    return tensors


def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()
