"""What can be served, as far as two files tell it without a model: plain LoRA on linear layers.

An adapter of another kind, or with a number that is none, would be stored, activated, and then fail
every call. The engine refuses the same things in the same words when it loads an adapter, and
besides what does not fit its base.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from adapter_store.text import shorten

_KEY = re.compile(r"base_model\.model\..+\.lora_[AB]\.weight")
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


def check_plain_lora(config: Mapping[str, Any], tensors: Iterable[str]) -> None:
    """Raise ValueError, by name, unless config and tensors are those of plain LoRA."""
    names = list(tensors)
    uses = _other_than_plain_lora(config, names)
    if uses:
        raise ValueError(
            f"the adapter uses {', '.join(uses)}, which the engine does not serve: "
            "train it as plain LoRA on linear layers"
        )
    for name in names:
        if _KEY.fullmatch(name) is None:
            raise ValueError(
                f"tensor {shorten(name, 200)} is no LoRA matrix of a linear layer; "
                "only those can be served"
            )


def _other_than_plain_lora(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    uses = []
    if config.get("peft_type") != "LORA":
        uses.append(f"peft_type {shorten(config.get('peft_type'))}")
    if config.get("use_dora") or any("lora_magnitude_vector" in name for name in names):
        uses.append("DoRA (use_dora)")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        uses.append("trained biases (bias, lora_bias)")
    if config.get("modules_to_save"):
        uses.append(f"fully trained modules (modules_to_save {shorten(config['modules_to_save'])})")
    initialisation = config.get("init_lora_weights", True)
    if str(initialisation).lower().startswith(_CHANGES_BASE):
        uses.append(
            f"an initialisation that changes the base (init_lora_weights {shorten(initialisation)})"
        )
    uses += [option for option in _VARIANTS if config.get(option)]
    if any("lora_embedding_" in name for name in names):
        uses.append("LoRA on embeddings")
    return uses
