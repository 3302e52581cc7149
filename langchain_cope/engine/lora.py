"""Many users' low-rank pairs in one batched product.

An `Adapter` is one user's peft folder as tensors. `LoraRows` hangs a forward hook on every linear layer that some adapter
changes and adds, for the rows that carry an adapter, ``x · A_rᵀ · B_rᵀ`` with row r's own A and B (scaling folded into B).
Rows with an adapter come first, so that rows of the base cost nothing extra.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from langchain_cope.errors import ModelError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that also rewrite the base's weights

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
    """One user's low-rank pairs, ready on the base's device and in its dtype.

    ``pairs`` maps a module's path to (down ``(in, rank)``, up ``(rank, out)``), transposed for ``x @ down @ up``;
    ``up`` holds the scaling (``alpha / rank``, or ``alpha / √rank`` for rsLoRA).
    """

    name: str
    pairs: dict[str, tuple[Tensor, Tensor]]


def read_adapter(folder: Path, name: str, model: nn.Module, dtype: torch.dtype, device: torch.device) -> Adapter:
    """Read a peft LoRA folder for ``model``.

    Raises ``ModelError`` for a folder that cannot be read, does not fit the model's layers, or asks for something other than plain
    LoRA on linear layers (DoRA, say): the message names it.
    """
    config, tensors = _read_files(folder)
    _refuse_what_is_not_plain_lora(config, tensors, folder)
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise ModelError(
                f"{folder / WEIGHTS}: tensor {key!r} is no LoRA matrix of a linear layer; only those can be served"
            )
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    modules = dict(model.named_modules())
    pairs = {}
    for path, side in sides.items():
        down, up = _checked_pair(path, side, modules.get(path), folder)
        try:
            scale = _scaling(config, path, rank=down.shape[0])
        except (TypeError, ValueError, AttributeError, re.error) as error:
            raise ModelError(f"{folder / CONFIG}: lora_alpha or alpha_pattern cannot be read: {error}") from error
        pairs[path] = (
            down.T.to(device, dtype).contiguous(),
            (up.float() * scale).T.to(device, dtype).contiguous(),
        )
    if not pairs:
        raise ModelError(f"{folder / WEIGHTS} holds no LoRA matrices")
    return Adapter(name, pairs)


def _read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"no adapter in {folder}: {CONFIG} and {WEIGHTS} are needed, {' and '.join(missing)} missing")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"the adapter in {folder} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder / CONFIG} must hold one JSON object")
    return config, tensors


def _refuse_what_is_not_plain_lora(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    refused = []
    if config.get("peft_type") != "LORA":
        refused.append(f"peft_type {config.get('peft_type')!r}")
    if config.get("use_dora") or any("lora_magnitude_vector" in key for key in tensors):
        refused.append("DoRA (use_dora)")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        refused.append("trained biases (bias, lora_bias)")
    if config.get("modules_to_save"):
        refused.append(f"fully trained modules (modules_to_save {config['modules_to_save']})")
    initialisation = str(config.get("init_lora_weights", True)).lower()
    if initialisation.startswith(_CHANGES_BASE):
        refused.append(f"an initialisation that changes the base (init_lora_weights {config['init_lora_weights']!r})")
    refused += [option for option in _VARIANTS if config.get(option)]
    if any("lora_embedding_" in key for key in tensors):
        refused.append("LoRA on embeddings")
    if refused:
        raise ModelError(
            f"the adapter in {folder} uses {', '.join(refused)}, which the engine does not serve: "
            "train it as plain LoRA on linear layers"
        )


def _checked_pair(path: str, side: dict[str, Tensor], module: nn.Module | None, folder: Path) -> tuple[Tensor, Tensor]:
    sizes = _linear_sizes(module)
    if sizes is None:
        what = "which this base does not have" if module is None else f"a {type(module).__name__}, not a linear layer"
        raise ModelError(f"the adapter in {folder} changes {path!r}, {what}: it was made for another base")
    if set(side) != {"A", "B"}:
        raise ModelError(
            f"the adapter in {folder} holds only lora_{next(iter(side))} for {path!r}; both A and B are needed"
        )
    down, up = side["A"], side["B"]
    fits = down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1] and (down.shape[1], up.shape[0]) == sizes
    if not fits:
        raise ModelError(
            f"the adapter in {folder} has A {tuple(down.shape)} and B {tuple(up.shape)} for {path!r}, "
            f"a layer of {sizes[0]} inputs and {sizes[1]} outputs: it was made for another base"
        )
    return down, up


def _linear_sizes(module: Any) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, quantized or not, or None."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)
    if hasattr(module, "nx") and hasattr(module, "nf"):  # transformers' Conv1D (GPT-2)
        return int(module.nx), int(module.nf)
    return None


def _scaling(config: dict[str, Any], path: str, rank: int) -> float:
    alpha = float(config.get("lora_alpha", 8))
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            alpha = float(value)
            break
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


class LoraRows:
    """The adapters of the rows of the next forward of ``model``: row i < len(adapters) carries adapters[i], later rows none."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._stacks: dict[str, tuple[Tensor, Tensor] | None] = {}
        self._rows: tuple[Adapter, ...] = ()
        self.shape = (0, 0)
        """(rows, positions) of the next forward."""

    def set(self, adapters: Sequence[Adapter]) -> None:
        """Stack the pairs of these rows; free when they are the same as before."""
        rows = tuple(adapters)
        if rows == self._rows:
            return
        self._rows = rows
        paths = {path for adapter in rows for path in adapter.pairs}
        for path in paths - self._stacks.keys():
            self._modules[path].register_forward_hook(self._hook(path))
        self._stacks = {path: _stack(rows, path) if path in paths else None for path in self._stacks.keys() | paths}

    def _hook(self, path: str) -> Any:
        def add_low_rank_product(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            stack = self._stacks[path]
            if stack is not None:
                down, up = stack
                num_rows = down.shape[0]
                states, result = self._by_row(inputs[0], path), self._by_row(output, path)
                result[:num_rows].baddbmm_(torch.bmm(states[:num_rows], down), up)
            return output

        return add_low_rank_product

    def _by_row(self, states: Tensor, path: str) -> Tensor:
        """``(rows, positions, width)``; layers behind a router, say, see rows and positions as one dimension."""
        if states.ndim == 3:
            return states
        rows, positions = self.shape
        if states.shape[0] != rows * positions:
            raise ModelError(
                f"an adapter changes {path!r}, which does not see every token: it cannot be served in a batch"
            )
        return states.view(rows, positions, -1)


def _stack(rows: tuple[Adapter, ...], path: str) -> tuple[Tensor, Tensor]:
    """(down ``(rows, in, rank)``, up ``(rows, rank, out)``), ranks padded with zeros to the widest."""
    if len(rows) == 1:
        down, up = rows[0].pairs[path]
        return down.unsqueeze(0), up.unsqueeze(0)
    pairs = [adapter.pairs.get(path) for adapter in rows]
    some = next(pair for pair in pairs if pair is not None)
    rank = max(pair[0].shape[1] for pair in pairs if pair is not None)
    down = some[0].new_zeros(len(rows), some[0].shape[0], rank)
    up = some[1].new_zeros(len(rows), rank, some[1].shape[1])
    for row, pair in enumerate(pairs):
        if pair is not None:
            width = pair[0].shape[1]
            down[row, :, :width], up[row, :width] = pair
    return down, up
