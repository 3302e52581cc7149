"""The user's LoRA adapter: which layers carry it, and how it is written as a plain peft folder."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from langchain_cope.atomic_files import atomic_folder
from langchain_cope.engine import CONFIG, WEIGHTS, read_weights
from langchain_cope.errors import InputError
from langchain_cope.training.recipe import SFT


def lora_config(model: PreTrainedModel, recipe: SFT) -> LoraConfig:
    """Return the configuration of a new adapter for `model`, a tree that carries none yet.

    It does not name the base: `save_adapter` adds that. Raises `InputError` where the recipe names
    modules that the model does not have.
    """
    targets = target_modules(model, recipe.targets)
    carriers = [
        module for name, module in model.named_modules() if name.rpartition(".")[2] in targets
    ]
    # Conv1D, GPT-2's layer, stores its weights transposed.
    transposed = any(isinstance(module, Conv1D) for module in carriers)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.dropout,
        target_modules=targets,
        fan_in_fan_out=transposed,
    )


def target_modules(model: PreTrainedModel, targets: str | tuple[str, ...]) -> list[str]:
    """Return the last names of the layers that get an adapter, sorted; never the output head's."""
    output_head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    linear = set()
    for name, module in model.named_modules():
        last_name = name.rpartition(".")[2]
        # peft matches by last name, and "0" is also the name of a whole layer.
        if (
            isinstance(module, (torch.nn.Linear, Conv1D))
            and module is not output_head
            and not last_name.isdigit()
        ):
            linear.add(last_name)
    if isinstance(targets, tuple):
        missing = sorted(set(targets) - linear)
        if missing:
            raise InputError(
                f"SFT.targets names {missing}, but this base's linear layers are {sorted(linear)}: "
                "name some of these"
            )
        return sorted(targets)
    if targets == "linear":
        return sorted(linear)
    if {"q_proj", "v_proj"} <= linear:
        return ["q_proj", "v_proj"]
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type, ())
    return sorted(linear.intersection(known)) or sorted(linear)


def save_adapter(model: PeftModel, base_name: str, folder: Path) -> None:
    """Write the adapter of `model` as safetensors and configuration.

    The same weights give the same bytes. `folder` must be new and appears whole or not at all.
    Written by hand, because `save_pretrained` asks the hub whether the base's vocabulary has grown,
    and adds a model card.
    """
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    config: dict[str, Any] = {}
    for name, value in model.peft_config["default"].to_dict().items():
        config[name] = sorted(value) if isinstance(value, set) else value
    config["base_model_name_or_path"] = base_name
    config["inference_mode"] = True
    config["target_modules"] = sorted(config["target_modules"])
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with atomic_folder(folder) as unfinished:
        save_file(weights, unfinished / WEIGHTS, {"format": "pt"})
        (unfinished / CONFIG).write_text(text, encoding="utf-8")


def load_weights(model: PeftModel, folder: Path) -> None:
    """Put the weights of the adapter in `folder` into the adapter of `model`.

    Raises `ValueError` where the two do not match name by name.
    """
    report = set_peft_model_state_dict(model, read_weights(folder))
    missing = [name for name in report.missing_keys if "lora_" in name]
    if missing or report.unexpected_keys:
        raise ValueError(
            f"the adapter in {folder} does not match its model: {missing or report.unexpected_keys}"
        )
