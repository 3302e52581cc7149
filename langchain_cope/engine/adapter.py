"""Many users' low-rank pairs in one batched product.

An `Adapter` is one user's peft folder as tensors. `LoraRows` holds those of a batch's rows, stacked, and adds for every row with an
adapter ``x · A_rᵀ · B_rᵀ`` with row r's own A and B (scaling folded into B). Layers that read the same input make up a `Site` and
share the first product. Rows with an adapter come first, so that rows of the base cost nothing extra.
"""

import json
import math
import re
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from langchain_cope.errors import ModelError

RECENT_TOKENS = 2048
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
_CHANGES_BASE = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
)  # initialisations that also rewrite the base's weights

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
    """One user's low-rank pairs, ready on the base's device, in `low_rank_dtype`.

    ``pairs`` maps a module's path to (down ``(in, rank)``, up ``(rank, out)``), transposed for ``x @ down @ up``;
    ``up`` holds the scaling (``alpha / rank``, or ``alpha / √rank`` for rsLoRA).
    """

    name: str | None
    """What stands for these very matrices, for good (a user's version, say); None where nothing does."""
    pairs: dict[str, tuple[Tensor, Tensor]]
    recent: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT_TOKENS))
    """The newest tokens of its user's prompts and answers: what the next answer may quote."""
    _token: object = field(default_factory=object, repr=False)

    @property
    def owner(self) -> Hashable:
        """Key of what was computed with these matrices."""
        return self._token if self.name is None else self.name


def low_rank_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What low-rank products are computed in: on a CPU small batched products in bfloat16 take five times as long as in float32."""
    return torch.float32 if device.type == "cpu" else dtype


def read_adapter(
    folder: Path, name: str | None, model: nn.Module, dtype: torch.dtype, device: torch.device
) -> Adapter:
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


def _read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"no adapter in {folder}: {CONFIG} and {WEIGHTS} are needed, {' and '.join(missing)} missing"
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
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
    initialisation = str(config.get("init_lora_weights", True)).lower()
    if initialisation.startswith(_CHANGES_BASE):
        refused.append(
            f"an initialisation that changes the base (init_lora_weights {config['init_lora_weights']!r})"
        )
    refused += [option for option in _VARIANTS if config.get(option)]
    if any("lora_embedding_" in key for key in tensors):
        refused.append("LoRA on embeddings")
    if refused:
        raise ModelError(
            f"the adapter in {folder} uses {', '.join(refused)}, which the engine does not serve: "
            "train it as plain LoRA on linear layers"
        )


def _checked_pair(
    path: str, side: dict[str, Tensor], module: nn.Module | None, folder: Path
) -> tuple[Tensor, Tensor]:
    sizes = linear_sizes(module)
    if sizes is None:
        what = (
            "which this base does not have"
            if module is None
            else f"a {type(module).__name__}, not a linear layer"
        )
        raise ModelError(
            f"the adapter in {folder} changes {path!r}, {what}: it was made for another base"
        )
    if set(side) != {"A", "B"}:
        raise ModelError(
            f"the adapter in {folder} holds only lora_{next(iter(side))} for {path!r}; both A and B are needed"
        )
    down, up = side["A"], side["B"]
    fits = (
        down.ndim == up.ndim == 2
        and down.shape[0] == up.shape[1]
        and (down.shape[1], up.shape[0]) == sizes
    )
    if not fits:
        raise ModelError(
            f"the adapter in {folder} has A {tuple(down.shape)} and B {tuple(up.shape)} for {path!r}, "
            f"a layer of {sizes[0]} inputs and {sizes[1]} outputs: it was made for another base"
        )
    return down, up


def linear_sizes(module: Any) -> tuple[int, int] | None:
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


@dataclass(frozen=True)
class Site:
    """Linear layers that read the same input and whose outputs lie side by side; often just one."""

    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    """Outputs of each layer."""


class _Stack:
    """The pairs of one site for every row: ``down`` ``(rows, in, layers · rank)``, per layer ``up`` ``(rows, rank, out)``."""

    def __init__(
        self, site: Site, paths: tuple[str, ...], rank: int, rows: int, like: Tensor, width: int
    ) -> None:
        self.site, self.paths, self.rank = site, paths, rank
        ends = {path: sum(site.sizes[: place + 1]) for place, path in enumerate(site.paths)}
        self.columns = [
            slice(ends[path] - site.sizes[site.paths.index(path)], ends[path]) for path in paths
        ]
        self.down = like.new_zeros(rows, width, len(paths) * rank)
        self.ups = [
            like.new_zeros(rows, rank, column.stop - column.start) for column in self.columns
        ]

    def put(self, row: int, adapter: Adapter) -> None:
        self.down[row].zero_()
        for place, (path, up) in enumerate(zip(self.paths, self.ups, strict=True)):
            up[row].zero_()
            if pair := adapter.pairs.get(path):
                width = pair[0].shape[1]
                self.down[row, :, place * self.rank : place * self.rank + width] = pair[0]
                up[row, :width] = pair[1]

    def add(self, states: Tensor, output: Tensor, num_rows: int) -> None:
        """Add the products of the first ``num_rows`` rows of ``states`` ``(R, Q, in)`` to those of ``output`` ``(R, Q, out)``."""
        low = torch.bmm(states[:num_rows].to(self.down.dtype), self.down[:num_rows])
        for place, (columns, up) in enumerate(zip(self.columns, self.ups, strict=True)):
            part = low[..., place * self.rank : (place + 1) * self.rank]
            output[:num_rows, :, columns] += torch.bmm(part, up[:num_rows])


class LoraRows:
    """The adapters of the rows of a batch: row i < len(adapters) carries adapters[i], later rows none."""

    def __init__(self, sites: Mapping[str, Site], like: Tensor) -> None:
        """``sites``: the site of each path that an adapter may change. ``like``: dtype and device to compute in."""
        self._sites = sites
        self._like = like
        self._rows: list[Adapter] = []
        self._capacity = 0
        self._stacks: dict[Site, _Stack] = {}

    @property
    def paths(self) -> set[str]:
        """What some row's adapter changes."""
        return {path for stack in self._stacks.values() for path in stack.paths}

    def set(self, adapters: Sequence[Adapter]) -> None:
        """Take these rows; only what changed is copied."""
        if not self._has_room(adapters):
            self._build(adapters)
        else:
            for row, adapter in enumerate(adapters):
                if row >= len(self._rows) or self._rows[row] is not adapter:
                    for stack in self._stacks.values():
                        stack.put(row, adapter)
        self._rows = list(adapters)

    def clear(self) -> None:
        """Forget every adapter, and the room for them."""
        self._rows, self._stacks, self._capacity = [], {}, 0

    def add(self, site: Site, states: Tensor, output: Tensor) -> None:
        """Add what the adapters change at ``site`` to its ``output`` ``(R, Q, out)``, in place."""
        if self._rows and (stack := self._stacks.get(site)):
            stack.add(states, output, len(self._rows))

    def changes(self, site: Site) -> bool:
        """Whether some row's adapter changes this site."""
        return bool(self._rows) and site in self._stacks

    def _has_room(self, adapters: Sequence[Adapter]) -> bool:
        if len(adapters) > self._capacity:
            return False
        seen: set[int] = {id(adapter) for adapter in self._rows}
        for adapter in adapters:
            if id(adapter) not in seen:
                for path, (down, _) in adapter.pairs.items():
                    stack = self._stacks.get(self._sites[path])
                    if stack is None or path not in stack.paths or down.shape[1] > stack.rank:
                        return False
        return True

    def _build(self, adapters: Sequence[Adapter]) -> None:
        capacity = (
            self._capacity
            if len(adapters) <= self._capacity
            else max(len(adapters), 2 * self._capacity)
        )
        ranks: dict[Site, int] = {}
        widths: dict[Site, int] = {}
        for adapter in adapters:
            for path, (down, _) in adapter.pairs.items():
                site = self._sites[path]
                ranks[site], widths[site] = max(ranks.get(site, 0), down.shape[1]), down.shape[0]
        used = {path for adapter in adapters for path in adapter.pairs}
        stacks = {
            site: _Stack(
                site,
                tuple(p for p in site.paths if p in used),
                rank,
                capacity,
                self._like,
                widths[site],
            )
            for site, rank in ranks.items()
        }
        for stack in stacks.values():
            for row, adapter in enumerate(adapters):
                stack.put(row, adapter)
        self._stacks, self._capacity = stacks, capacity
