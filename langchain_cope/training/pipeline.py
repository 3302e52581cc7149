"""The chain for one user: SFT, negatives, DPO. In goes a history, out come two plain peft folders on the engine's own base.

    examples → encode.fit → sft → folder/sft → negatives → dpo → folder/dpo

Read on in `recipe.py` (the numbers), `encode.py` (what is trained on), then the stages. The trainers are imported when a training
starts, not before.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from langchain_cope.errors import HistoryError, ModelError
from langchain_cope.training.progress import Progress, Watch, never, unheard
from langchain_cope.training.recipe import Recipe

if TYPE_CHECKING:
    from langchain_cope.engine.engine import Engine
    from langchain_cope.training.encode import Encoded, Example


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
    """Seconds of each stage."""
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
    Where no item has a usable negative, DPO is skipped and both folders hold the same adapter.

    Raises:
        Cancelled: ``should_stop`` returned True; what is in ``folder`` is then unfinished, and the caller's to remove.
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
    from langchain_cope.training.dpo import train_dpo
    from langchain_cope.training.negatives import make_pairs
    from langchain_cope.training.sft import train_sft

    with stage("sft"), _timed(result, "sft"):
        train_sft(engine.base, items, result.recipe, result.sft, watch("sft"))
    with stage("negatives"), _timed(result, "negatives"):
        adapter = engine.load_adapter(result.sft)
        pairs, said = make_pairs(engine, items, result.recipe, adapter, watch("negatives"))
    result.notes.extend(said)
    result.negatives.extend(Negative(pair.index, pair.rejected, pair.reward) for pair in pairs)
    with stage("dpo"), _timed(result, "dpo"):
        if pairs:
            train_dpo(engine.base, pairs, result.recipe, result.sft, result.dpo, watch("dpo"))
        else:
            shutil.copytree(result.sft, result.dpo)
            result.notes.append("DPO was skipped, as no item has a usable negative: the adapter is the one of SFT")


@contextmanager
def _timed(result: TrainingResult, stage: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    result.timings[stage] = round(time.monotonic() - started, 3)
