"""The user's LoRA adapter: which layers carry it, and how it is written as a plain peft folder."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from langchain_cope.engine import CONFIG, WEIGHTS
from langchain_cope.errors import InputError
from langchain_cope.training.atomic_files import whole_folder
from langchain_cope.training.recipe import SFT


def lora_config(model: PreTrainedModel, recipe: SFT) -> LoraConfig:
    """The configuration of a new adapter for ``model``, a tree that carries none yet; `save_adapter` adds the base's name.

    Raises ``InputError`` where the recipe names modules that the model does not have.
    """
    targets = target_modules(model, recipe.targets)
    carriers = [
        module for name, module in model.named_modules() if name.rpartition(".")[2] in targets
    ]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.dropout,
        target_modules=targets,
        fan_in_fan_out=any(
            isinstance(module, Conv1D) for module in carriers
        ),  # GPT-2 stores its weights transposed
    )


def target_modules(model: PreTrainedModel, wanted: str | tuple[str, ...]) -> list[str]:
    """Last names of the linear layers that get an adapter, sorted; the output head is never among them."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    }
    linear = {
        name for name in linear if not name.isdigit()
    }  # peft matches by last name, and "0" is also a whole layer
    if isinstance(wanted, tuple):
        missing = sorted(set(wanted) - linear)
        if missing:
            raise InputError(
                f"SFT.targets names {missing}, but this base's linear layers are {sorted(linear)}"
            )
        return sorted(wanted)
    if wanted == "linear":
        return sorted(linear)
    if {"q_proj", "v_proj"} <= linear:
        return ["q_proj", "v_proj"]
    mapped = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type, ())
    return sorted(linear.intersection(mapped)) or sorted(linear)


def save_adapter(model: PeftModel, base_name: str, folder: Path) -> None:
    """Write the adapter of ``model`` as safetensors and configuration; the same weights give the same bytes.

    ``folder`` must be new and appears whole or not at all. By hand, because ``save_pretrained`` asks the hub whether the
    base's vocabulary has grown, and adds a model card.
    """
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    config = model.peft_config["default"].to_dict()
    config.update(
        base_model_name_or_path=base_name,
        inference_mode=True,
        target_modules=sorted(config["target_modules"]),
    )
    plain = {
        name: sorted(value) if isinstance(value, set) else value for name, value in config.items()
    }
    with whole_folder(folder) as part:
        save_file(weights, part / WEIGHTS, {"format": "pt"})
        (part / CONFIG).write_text(
            json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )


def load_weights(model: PeftModel, folder: Path) -> None:
    """Put the weights of an adapter's folder into ``model``'s adapter.

    Raises ``ValueError`` where the two do not match name by name.
    """
    outcome = set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    absent = [name for name in outcome.missing_keys if "lora_" in name]
    if absent or outcome.unexpected_keys:
        raise ValueError(
            f"the adapter in {folder} does not match its model: {absent or outcome.unexpected_keys}"
        )
