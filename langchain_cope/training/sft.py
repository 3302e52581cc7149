"""Supervised fine-tuning of a new adapter on what the user wrote."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from langchain_cope.atomic_files import write_json
from langchain_cope.engine import Base
from langchain_cope.training.adapter import lora_config, save_adapter
from langchain_cope.training.encode import Encoded
from langchain_cope.training.fast import speed_up
from langchain_cope.training.first_sight import FIRST_SIGHT, FirstSights
from langchain_cope.training.progress import Monitor
from langchain_cope.training.recipe import Recipe
from langchain_cope.training.trainer import (
    arguments,
    on_one_device,
    tokenizer_copy,
    train,
    undisturbed,
)


def train_sft(
    base: Base, examples: Sequence[Encoded], recipe: Recipe, folder: Path, monitor: Monitor
) -> None:
    """Train an adapter on `examples` and leave it in `folder` as a plain peft folder.

    What `first_sight.py` keeps of each item is left beside it before. The base is not changed.
    Raises `Cancelled` at the next step after `monitor` asks for a stop;
    `folder` is then not written.
    """
    with undisturbed(folder) as scratch:
        trainer = sft_trainer(base, examples, recipe, scratch)
        first = FirstSights(trainer.model, examples)
        train(trainer, monitor)
        write_json(folder.parent / FIRST_SIGHT, [asdict(sight) for sight in first.sights])
        save_adapter(trainer.model, base.name, folder)


def sft_trainer(
    base: Base, examples: Sequence[Encoded], recipe: Recipe, scratch: str
) -> SFTTrainer:
    """Return TRL's trainer on a skeleton of the base; seeds the process's random states."""
    skeleton = base.skeleton()
    config = SFTConfig(**arguments(base, recipe.sft, len(examples), recipe.seed, scratch))
    trainer = SFTTrainer(
        model=skeleton,
        args=on_one_device(config),
        train_dataset=Dataset.from_list([_row(example) for example in examples]),
        processing_class=tokenizer_copy(base),
        peft_config=lora_config(skeleton, recipe.sft),
    )
    speed_up(trainer.model)
    return trainer


def _row(example: Encoded) -> dict[str, list[int]]:
    # TRL takes ready token ids and labels as they are; -100 marks what bears no loss.
    return {
        "input_ids": example.prompt_ids + example.completion_ids,
        "labels": [-100] * len(example.prompt_ids) + example.completion_ids,
    }
