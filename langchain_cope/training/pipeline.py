"""The chain for one user: a history becomes two plain peft folders on the engine's own base.

    items → encode.fit → sft → folder/sft → negatives → folder/negatives.json → dpo → folder/dpo

What a stage leaves in the folder is whole, and a stage that finds its own work there is not run
again: so a training goes on where another process stopped.

Read on in `recipe.py` (the numbers), `encode.py` (what is trained on), then the stages. The
trainers are imported when a training starts, not before.
"""

import filecmp
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from langchain_cope.atomic_files import atomic_folder, read_json, write_json
from langchain_cope.errors import HistoryError, ModelError
from langchain_cope.training.progress import Monitor, Stage
from langchain_cope.training.recipe import Recipe

if TYPE_CHECKING:
    from langchain_cope.engine import Base, Engine
    from langchain_cope.history.items import Item
    from langchain_cope.training.encode import Encoded
    from langchain_cope.training.negatives import Pair


@dataclass(frozen=True)
class TrainingResult:
    """What a training left behind."""

    folder: Path
    """Holds what each stage left, named by `Stage.file`."""
    recipe: Recipe
    """The recipe as used: `max_new_tokens` is filled in."""
    notes: list[str] = field(default_factory=list)
    """In words for people: what was cut, dropped or skipped."""

    @property
    def sft(self) -> Path:
        """Plain peft folder of the adapter after SFT."""
        return self.folder / Stage.SFT.file

    @property
    def dpo(self) -> Path:
        """Plain peft folder of the adapter after DPO: the one to publish."""
        return self.folder / Stage.DPO.file


def train_user(
    engine: "Engine",
    items: "Sequence[Item]",
    recipe: Recipe,
    folder: Path,
    monitor: Monitor | None = None,
    *,
    last: Stage = Stage.DPO,
) -> TrainingResult:
    """Train one user's adapter on `items` and leave it in `folder`.

    Where an item says what was rejected, DPO takes those pairs as they are; for the others a
    negative is mined, unless the recipe mines none. Where there is no pair, DPO is skipped and both
    adapters are the same. The base is neither copied nor changed, and the process's random state
    is as it was.

    Args:
        engine: The engine of the base, which also samples and scores the negatives.
        items: The history, oldest first.
        recipe: The numbers of all stages.
        folder: Where the stages leave their work. A stage that finds its own work there is not
            run again: it must be of the same base, items and recipe.
        monitor: Times the stages SFT, negatives and DPO, hears of their steps and may stop them.
        last: `Stage.SFT` leaves out the negatives and DPO.

    Raises:
        Cancelled: `monitor` asked for a stop; `folder` then holds the work of the stages before,
            and is the caller's.
        HistoryError: No item is left to train on.
        ModelError: The base is quantized.
    """
    from langchain_cope.training.encode import fit, usual_length

    check_trainable(engine.base)
    examples, notes = fit(engine.base, items, recipe.max_length, recipe.max_words)
    if not examples:
        raise HistoryError(
            f"none of the history's {len(items)} items can be trained on: "
            f"{'; '.join(notes) or 'it is empty'}"
        )
    if recipe.max_new_tokens is None:
        recipe = replace(recipe, max_new_tokens=usual_length(examples))
    folder.mkdir(parents=True, exist_ok=True)
    training = TrainingResult(folder, recipe, notes)
    _run_stages(engine, examples, training, monitor or Monitor(), last)
    return training


def trained_by(folder: Path, stage: Stage) -> Stage:
    """Return which stage trained the adapter that `stage` left in `folder`.

    That of DPO is SFT's where DPO was skipped.
    """
    from langchain_cope.engine import WEIGHTS

    if stage is Stage.DPO:
        of_sft, of_dpo = (folder / each.file / WEIGHTS for each in (Stage.SFT, Stage.DPO))
        if filecmp.cmp(of_sft, of_dpo, shallow=False):
            return Stage.SFT
    return stage


def check_trainable(base: "Base") -> None:
    """Raise `ModelError` for a quantized base."""
    if base.quantization is not None:
        raise ModelError(
            f"the base {base.name!r} is quantized ({base.quantization}), but "
            "adapters are trained on plain weights: load it without quantization_config to train"
        )


def _run_stages(
    engine: "Engine",
    examples: "Sequence[Encoded]",
    training: TrainingResult,
    monitor: Monitor,
    last: Stage,
) -> None:
    from langchain_cope.engine import give_back
    from langchain_cope.training.dpo import train_dpo
    from langchain_cope.training.sft import train_sft

    base, recipe = engine.base, training.recipe
    # Memory is given back after each stage: the peaks of two must not add up, nor those of users.
    if not training.sft.exists():
        with monitor.stage(Stage.SFT):
            train_sft(base, examples, recipe, training.sft, monitor)
        give_back(base.device)
    if last is Stage.SFT:
        return
    pairs_file = training.folder / Stage.NEGATIVES.file
    if not pairs_file.exists():
        with monitor.stage(Stage.NEGATIVES):
            _write_pairs(engine, examples, training, pairs_file, monitor)
        give_back(base.device)
    pairs, notes = _read_pairs(pairs_file)
    training.notes.extend(notes)
    if not training.dpo.exists():
        with monitor.stage(Stage.DPO):
            if pairs:
                train_dpo(base, pairs, recipe, training.sft, training.dpo, monitor)
            else:
                copy_folder(training.sft, training.dpo)
        give_back(base.device)
    if not pairs:
        reason = (
            "the recipe mines no negatives and the history has no rejected answers"
            if recipe.negatives is None
            else "no item has a usable negative"
        )
        training.notes.append(f"DPO was skipped, as {reason}: the adapter is the one of SFT")


def _write_pairs(
    engine: "Engine",
    examples: "Sequence[Encoded]",
    training: TrainingResult,
    file: Path,
    monitor: Monitor,
) -> None:
    from langchain_cope.training.negatives import make_pairs

    sft = engine.load_adapter(training.sft)
    pairs, notes = make_pairs(engine, examples, training.recipe, sft, monitor)
    write_json(file, {"pairs": [asdict(pair) for pair in pairs], "notes": notes})


def _read_pairs(file: Path) -> "tuple[list[Pair], list[str]]":
    from langchain_cope.training.negatives import Pair

    facts = read_json(file)
    return [Pair(**pair) for pair in facts["pairs"]], facts["notes"]


def copy_folder(source: Path, target: Path) -> None:
    """Copy what a stage left to `target`, whole or not at all."""
    with atomic_folder(target) as unfinished:
        shutil.copytree(source, unfinished, dirs_exist_ok=True)
