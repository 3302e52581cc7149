"""One user's low-rank matrices: a peft LoRA folder, read and checked against the base it is for.

Read `read_adapter` first: it reads the two files of the folder, refuses everything but plain LoRA
on linear layers by name, and returns an `Adapter` whose matrices are ready to multiply with.
"""

import json
import math
import re
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from langchain_cope.errors import ModelError

RECENT_TOKENS = 2048
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
# Initialisations that also rewrite the base's weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Options of peft that make something else of plain LoRA.
_VARIANTS = (
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)


@dataclass(frozen=True, eq=False)
class Adapter:
    """One user's low-rank matrices, ready on the base's device, in `low_rank_dtype`."""

    name: str | None
    """Stands for these very matrices, for good (a user's version, say); None: no such name."""
    pairs: dict[str, tuple[Tensor, Tensor]]
    """A module's path to (down `(in, rank)`, up `(rank, out)`), transposed for `x @ down @ up`.

    `up` holds the scaling: `alpha / rank`, or `alpha / √rank` for rsLoRA.
    """
    recent: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT_TOKENS))
    """The newest tokens of its user's prompts and answers: what the next answer may quote."""
    scale: float = 1.0
    """What the products are multiplied with where the adapter is put to use."""
    _token: object = field(default_factory=object, repr=False)

    @property
    def owner(self) -> Hashable:
        """Key of what was computed with these matrices, multiplied with `scale`."""
        return (self._token if self.name is None else self.name, self.scale)

    def scaled(self, scale: float) -> "Adapter":
        """Return the same matrices, to be multiplied with `scale`; nothing of them is copied."""
        return self if scale == self.scale else replace(self, scale=scale)


def low_rank_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of low-rank products beside a base that computes in `dtype`.

    On a CPU small batched products take five times as long in bfloat16 as in float32.
    """
    return torch.float32 if device.type == "cpu" else dtype


def read_adapter(
    folder: Path, name: str | None, model: nn.Module, dtype: torch.dtype, device: torch.device
) -> Adapter:
    """Read a peft LoRA folder for `model`.

    Raises ModelError for a folder that cannot be read, does not fit the model's layers, holds NaN
    or infinite values, or asks for something other than plain LoRA on linear layers (DoRA, say):
    the message names it.
    """
    config, tensors = _read_files(folder)
    _refuse_what_is_not_plain_lora(config, tensors, folder)
    _refuse_what_is_no_number(tensors, folder)
    modules = dict(model.named_modules())
    pairs = {}
    for path, sides in _by_module(tensors, folder).items():
        down, up = _checked_pair(path, sides, modules.get(path), folder)
        try:
            scale = _scaling(config, path, rank=down.shape[0])
        except (TypeError, ValueError, ArithmeticError, AttributeError, re.error) as error:
            raise ModelError(
                f"{folder / CONFIG}: lora_alpha or alpha_pattern cannot be read: {error}"
            ) from error
        pairs[path] = (
            down.T.to(device, dtype).contiguous(),
            (up.float() * scale).T.to(device, dtype).contiguous(),
        )
    if not pairs:
        raise ModelError(f"{folder / WEIGHTS} holds no LoRA matrices")
    return Adapter(name, pairs)


def linear_sizes(module: Any) -> tuple[int, int] | None:
    """Return (inputs, outputs) of a linear layer, quantized or not, or None."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)
    if hasattr(module, "nx") and hasattr(module, "nf"):  # transformers' Conv1D (GPT-2)
        return int(module.nx), int(module.nf)
    return None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of the adapter in `folder`, by and in the order of their names.

    Raises OSError and SafetensorError where the file cannot be read.
    """
    # Not `load_file`: safetensors 0.8 leaks two objects a tensor there, for good. `load` returns
    # another order each time, and an error about them should name the same one.
    return dict(sorted(load((folder / WEIGHTS).read_bytes()).items()))


def _read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"no adapter in {folder}: {CONFIG} and {WEIGHTS} are needed, "
            f"{' and '.join(missing)} missing"
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = read_weights(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"the adapter in {folder} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder / CONFIG} must hold one JSON object")
    return config, tensors


def _refuse_what_is_not_plain_lora(
    config: dict[str, Any], tensors: dict[str, Tensor], folder: Path
) -> None:
    refused = []
    if config.get("peft_type") != "LORA":
        refused.append(f"peft_type {config.get('peft_type')!r}")
    if config.get("use_dora") or any("lora_magnitude_vector" in key for key in tensors):
        refused.append("DoRA (use_dora)")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        refused.append("trained biases (bias, lora_bias)")
    if config.get("modules_to_save"):
        refused.append(f"fully trained modules (modules_to_save {config['modules_to_save']})")
    initialisation = config.get("init_lora_weights", True)
    if str(initialisation).lower().startswith(_CHANGES_BASE):
        refused.append(
            f"an initialisation that changes the base (init_lora_weights {initialisation!r})"
        )
    refused += [option for option in _VARIANTS if config.get(option)]
    if any("lora_embedding_" in key for key in tensors):
        refused.append("LoRA on embeddings")
    if refused:
        raise ModelError(
            f"the adapter in {folder} uses {', '.join(refused)}, which the engine does not serve: "
            "train it as plain LoRA on linear layers"
        )


def _refuse_what_is_no_number(tensors: dict[str, Tensor], folder: Path) -> None:
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor.float()).all()):
            raise ModelError(
                f"the adapter in {folder} cannot be served: tensor {key!r} holds NaN or infinite "
                "values: train it again, with a lower learning rate"
            )


def _by_module(tensors: dict[str, Tensor], folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return per module's path its matrices by side, A and B."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise ModelError(
                f"{folder / WEIGHTS}: tensor {key!r} is no LoRA matrix of a linear layer; "
                "only those can be served"
            )
        modules.setdefault(match["module"], {})[match["side"]] = tensor
    return modules


def _checked_pair(
    path: str, sides: dict[str, Tensor], module: nn.Module | None, folder: Path
) -> tuple[Tensor, Tensor]:
    """Return A and B of `module`, which is at `path` of the base, if they fit it."""
    sizes = linear_sizes(module)
    if sizes is None:
        if module is None:
            what = "which this base does not have"
        else:
            what = f"a {type(module).__name__}, not a linear layer"
        raise ModelError(
            f"the adapter in {folder} changes {path!r}, {what}: it was made for another base"
        )
    if set(sides) != {"A", "B"}:
        raise ModelError(
            f"the adapter in {folder} holds only lora_{next(iter(sides))} for {path!r}; "
            "both A and B are needed"
        )
    down, up = sides["A"], sides["B"]
    one_rank = down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1]
    if not (one_rank and (down.shape[1], up.shape[0]) == sizes):
        raise ModelError(
            f"the adapter in {folder} has A {tuple(down.shape)} and B {tuple(up.shape)} "
            f"for {path!r}, a layer of {sizes[0]} inputs and {sizes[1]} outputs: "
            "it was made for another base"
        )
    return down, up


def _scaling(config: dict[str, Any], path: str, rank: int) -> float:
    """Return what the product is multiplied with: `alpha / rank`, or `alpha / √rank` (rsLoRA)."""
    alpha = float(config.get("lora_alpha", 8))
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            alpha = float(value)
            break
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    if not math.isfinite(scale):
        raise ValueError(f"{alpha} is no scale")
    return scale
