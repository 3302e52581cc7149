"""Supervised fine-tuning of a new adapter on what the user wrote."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from langchain_cope.engine import Base
from langchain_cope.training.adapter import lora_config, save_adapter
from langchain_cope.training.encode import Encoded
from langchain_cope.training.progress import Watch
from langchain_cope.training.recipe import Recipe
from langchain_cope.training.trainer import (
    arguments,
    on_one_device,
    random_state_kept,
    tokenizer_copy,
    train,
)


def train_sft(
    base: Base, items: Sequence[Encoded], recipe: Recipe, folder: Path, watch: Watch
) -> None:
    """Train an adapter on ``items`` and leave it in ``folder`` as a plain peft folder. The base is not changed.

    Raises ``Cancelled`` at the next step after ``watch`` says so; ``folder`` is not written then.
    """
    with random_state_kept(), TemporaryDirectory(dir=folder.parent, prefix=".") as scratch:
        trainer = sft_trainer(base, items, recipe, scratch)
        train(trainer, watch)
        save_adapter(trainer.model, base.name, folder)


def sft_trainer(base: Base, items: Sequence[Encoded], recipe: Recipe, scratch: str) -> SFTTrainer:
    """TRL's trainer on a skeleton of the base; seeds the process's random states."""
    skeleton = base.skeleton()
    return SFTTrainer(
        model=skeleton,
        args=on_one_device(
            SFTConfig(**arguments(base, recipe.sft, len(items), recipe.seed, scratch))
        ),
        train_dataset=Dataset.from_list([_row(item) for item in items]),
        processing_class=tokenizer_copy(base),
        peft_config=lora_config(skeleton, recipe.sft),
    )


def _row(item: Encoded) -> dict[str, list[int]]:
    # TRL takes ready token ids and labels as they are; -100 marks what bears no loss
    return {
        "input_ids": item.prompt_ids + item.completion_ids,
        "labels": [-100] * len(item.prompt_ids) + item.completion_ids,
    }
