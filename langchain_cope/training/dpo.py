"""Preference optimization (DPO) of the SFT adapter; the reference is the base, adapter off."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from langchain_cope.engine import Base
from langchain_cope.training.adapter import load_weights, lora_config, save_adapter
from langchain_cope.training.fast import speed_up
from langchain_cope.training.negatives import Pair
from langchain_cope.training.progress import Monitor
from langchain_cope.training.recipe import Recipe
from langchain_cope.training.trainer import (
    arguments,
    on_one_device,
    tokenizer_copy,
    train,
    undisturbed,
)


def train_dpo(
    base: Base, pairs: Sequence[Pair], recipe: Recipe, sft: Path, folder: Path, monitor: Monitor
) -> None:
    """Train the adapter in the folder `sft` on `pairs` and leave the result in `folder`.

    Neither the base nor `sft` is changed. Raises `Cancelled` at the next step after `monitor` asks
    for a stop; `folder` is then not written.
    """
    with undisturbed(folder) as scratch:
        trainer = dpo_trainer(base, pairs, recipe, sft, scratch)
        train(trainer, monitor)
        save_adapter(trainer.model, base.name, folder)


def dpo_trainer(
    base: Base, pairs: Sequence[Pair], recipe: Recipe, sft: Path, scratch: str
) -> DPOTrainer:
    """Return TRL's trainer on a skeleton of the base, its adapter filled from `sft`.

    It minimizes `−log σ(β · (r(x, chosen) − r(x, rejected)))`, where r is the log-ratio
    `log π_user(y|x) − log π_base(y|x)` of the whole completion, in nats (Rafailov et al., 2023).
    Seeds the process's random states.

    The order is what makes the base the reference. Given a model that already carries an adapter,
    `DPOTrainer` copies it under the name "ref" and takes that for the reference. Given the bare
    tree and a configuration, it makes none and switches its own adapter off instead; the weights of
    SFT go in afterwards.
    """
    skeleton = base.skeleton()
    config = DPOConfig(
        **arguments(base, recipe.dpo, len(pairs), recipe.seed, scratch),
        beta=recipe.dpo.beta,
        loss_type=["sigmoid"],
        # TRL would run the forwards that mining has run already, and hash the model.
        precompute_ref_log_probs=False,
    )
    trainer = _PairTrainer(
        model=skeleton,
        args=on_one_device(config),
        train_dataset=_dataset(pairs),
        processing_class=tokenizer_copy(base),
        peft_config=lora_config(skeleton, recipe.sft),
    )
    # Known from mining, the reference needs no forwards of its own.
    trainer.precompute_ref_logps = "ref_chosen_logps" in trainer.train_dataset.column_names
    load_weights(trainer.model, sft)
    speed_up(trainer.model)
    return trainer


class _PairTrainer(DPOTrainer):  # type: ignore[misc]
    """DPOTrainer on token ids.

    Unlike SFTTrainer, TRL's own would tokenize anew, and could not leave a cut answer without its
    end of turn.
    """

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def _dataset(pairs: Sequence[Pair]) -> Dataset:
    """Return the pairs under TRL's names, with the reference's log-probabilities where known."""
    columns: dict[str, list[Any]] = {
        "prompt_ids": [pair.prompt_ids for pair in pairs],
        "chosen_ids": [pair.chosen_ids for pair in pairs],
        "rejected_ids": [pair.rejected_ids for pair in pairs],
    }
    reference = {
        "ref_chosen_logps": [pair.chosen_base_log_prob for pair in pairs],
        "ref_rejected_logps": [pair.rejected_base_log_prob for pair in pairs],
    }
    if not any(None in log_probs for log_probs in reference.values()):
        columns |= reference
    return Dataset.from_dict(columns)
