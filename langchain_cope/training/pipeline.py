"""The chain for one user: SFT, negatives, DPO. In goes a history, out come two plain peft folders on the engine's own base.

    examples → encode.fit → sft → folder/sft → negatives → folder/negatives.json → dpo → folder/dpo

What a stage leaves in the folder is whole, and a stage that finds its own work there is not run again: so a training goes on
where another process stopped.

Read on in `recipe.py` (the numbers), `encode.py` (what is trained on), then the stages. The trainers are imported when a training
starts, not before.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from langchain_cope.errors import HistoryError, ModelError
from langchain_cope.training.atomic_files import read_json, whole_folder, write_json
from langchain_cope.training.progress import Progress, Watch, never, unheard
from langchain_cope.training.recipe import Recipe

if TYPE_CHECKING:
    from langchain_cope.engine import Engine
    from langchain_cope.training.encode import Encoded, Example
    from langchain_cope.training.negatives import Pair


@dataclass(frozen=True)
class Negative:
    """What DPO preferred the item at ``index`` of the history to."""

    index: int
    text: str
    reward: float | None
    """Mean nats a token by which SFT finds it likelier than the base does, the lowest of the item's candidates; None where the
    history itself said what was rejected."""


@dataclass(frozen=True)
class TrainingResult:
    """What a training left behind."""

    sft: Path
    """Plain peft folder of the adapter after SFT."""
    dpo: Path
    """Plain peft folder of the adapter after DPO: the one to publish."""
    recipe: Recipe
    """As used: ``max_new_tokens`` is filled in."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds of each stage that was run."""
    negatives: list[Negative] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """In words for people: what was cut, dropped or skipped."""


def train_user(
    engine: "Engine",
    examples: "Sequence[Example]",
    recipe: Recipe,
    folder: Path,
    *,
    on_progress: Callable[[Progress], None] = unheard,
    should_stop: Callable[[], bool] = never,
    stage: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> TrainingResult:
    """Train one user's adapter on ``examples`` and leave it in ``folder/sft`` and ``folder/dpo``.

    Where an example says what was rejected, DPO takes those pairs as they are; for the others a negative is mined.
    The base is neither copied nor changed, and the process's random state is as it was. ``on_progress`` is called on this thread.
    ``stage`` is entered with the name of each stage ("sft", "negatives", "dpo") and left when it ends.
    Where no item has a usable negative, DPO is skipped and both folders hold the same adapter. Stages that ``folder`` holds the
    work of are not run again: it must be of the same base, examples and recipe.

    Raises:
        Cancelled: ``should_stop`` returned True; ``folder`` then holds the work of the stages before, and is the caller's.
        HistoryError: no item is left to train on.
        ModelError: the base is quantized.
    """
    from langchain_cope.training.encode import fit

    if engine.base.quantization is not None:
        raise ModelError(
            f"the base {engine.base.name!r} is quantized ({engine.base.quantization}), and adapters are trained on weights that "
            "are not: load it without quantization_config to train"
        )
    items, notes = fit(engine.base, examples, recipe.max_length, recipe.max_words)
    if not items:
        raise HistoryError(
            f"none of the history's {len(examples)} items can be trained on: {'; '.join(notes) or 'it is empty'}"
        )
    if recipe.max_new_tokens is None:
        recipe = replace(recipe, max_new_tokens=max(len(item.completion_ids) for item in items))
    folder.mkdir(parents=True, exist_ok=True)
    result = TrainingResult(folder / "sft", folder / "dpo", recipe, notes=notes)
    _run(engine, items, result, lambda name: Watch(name, on_progress, should_stop), stage)
    return result


def _run(
    engine: "Engine",
    items: "Sequence[Encoded]",
    result: TrainingResult,
    watch: Callable[[str], Watch],
    stage: Callable[[str], AbstractContextManager[object]],
) -> None:
    from langchain_cope.engine import give_back
    from langchain_cope.training.dpo import train_dpo
    from langchain_cope.training.sft import train_sft

    if not result.sft.exists():
        with stage("sft"), _timed(result, "sft"):
            train_sft(engine.base, items, result.recipe, result.sft, watch("sft"))
        give_back(
            engine.base.device
        )  # before each stage that follows: its peak does not stand on the last one's
    negatives = result.sft.with_name("negatives.json")
    if not negatives.exists():
        with stage("negatives"), _timed(result, "negatives"):
            _mine(engine, items, result, watch("negatives"), negatives)
        give_back(engine.base.device)
    pairs = _read_pairs(negatives, result)
    if not result.dpo.exists():
        with stage("dpo"), _timed(result, "dpo"):
            if pairs:
                train_dpo(engine.base, pairs, result.recipe, result.sft, result.dpo, watch("dpo"))
            else:
                with whole_folder(result.dpo) as part:
                    shutil.copytree(result.sft, part, dirs_exist_ok=True)
    if not pairs:
        result.notes.append(
            "DPO was skipped, as no item has a usable negative: the adapter is the one of SFT"
        )


def _mine(
    engine: "Engine", items: "Sequence[Encoded]", result: TrainingResult, watch: Watch, file: Path
) -> None:
    from langchain_cope.training.negatives import make_pairs

    pairs, notes = make_pairs(engine, items, result.recipe, engine.load_adapter(result.sft), watch)
    write_json(file, {"pairs": [asdict(pair) for pair in pairs], "notes": notes})


def _read_pairs(file: Path, result: TrainingResult) -> "list[Pair]":
    """The pairs to train on; ``result`` is told of them."""
    from langchain_cope.training.negatives import Pair

    mined = read_json(file)
    pairs = [Pair(**pair) for pair in mined["pairs"]]
    result.notes.extend(mined["notes"])
    result.negatives.extend(Negative(pair.index, pair.rejected, pair.reward) for pair in pairs)
    return pairs


@contextmanager
def _timed(result: TrainingResult, stage: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    result.timings[stage] = round(time.monotonic() - started, 3)
