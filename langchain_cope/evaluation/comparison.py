"""How much one user gains: train on some items, compare the ways on others. Publishes nothing."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from langchain_cope.errors import HistoryError
from langchain_cope.history.items import Item, UserHistory
from langchain_cope.training.progress import Monitor, Stage
from langchain_cope.training.recipe import Recipe, RecipeChoice, recipe_for

if TYPE_CHECKING:
    from langchain_cope.engine import Engine
    from langchain_cope.evaluation.evaluate import Evaluation
    from langchain_cope.training.pipeline import TrainingResult


@dataclass(frozen=True)
class UserEvaluation:
    """One user's figures."""

    user_id: str | None
    metrics: dict[str, dict[str, float]]
    """By the name of each of `WAYS`: `rouge1`, `rougeL` and, where it has one, `nll`."""
    timings: dict[str, float]
    """Seconds of each stage, by its name."""
    num_trained: int
    num_queries: int
    adapter_bytes: int
    """Size of the final adapter's weights file."""
    notes: list[str]
    """In words for people: what was cut, dropped or skipped."""


def evaluate_user(
    engine: "Engine",
    history: UserHistory,
    recipe: RecipeChoice = None,
    *,
    monitor: Monitor | None = None,
) -> UserEvaluation:
    """Train on all of `history.items` and compare the ways on `history.queries`.

    Args:
        engine: The engine of the base.
        history: One user's items and queries.
        recipe: None: `Recipe.for_model`.
        monitor: Hears of stages and steps, and may stop them.

    Raises:
        HistoryError: Items or queries are missing.
        Cancelled: `monitor` asked for a stop.
    """
    check_has_queries(history, f"user {history.user_id!r:.80}")
    from langchain_cope.engine import WEIGHTS

    monitor = monitor or Monitor()
    chosen = recipe_for(recipe, engine.base, history.items)
    with tempfile.TemporaryDirectory(prefix="cope-") as folder:
        training, evaluation = train_and_evaluate(
            engine, history.items, history.queries, chosen, Path(folder), monitor
        )
        adapter_bytes = (training.dpo / WEIGHTS).stat().st_size
    return UserEvaluation(
        user_id=history.user_id,
        metrics=evaluation.metrics,
        timings=dict(monitor.timings),
        num_trained=len(history.items),
        num_queries=len(history.queries),
        adapter_bytes=adapter_bytes,
        notes=[*history.notes, *training.notes, *evaluation.notes],
    )


def check_has_queries(user: UserHistory, name: str) -> None:
    """Raise `HistoryError` unless `user`, called `name`, has items to train on and queries."""
    if not user.items or not user.queries:
        raise HistoryError(
            f"{name} has {len(user.items)} items to train on and {len(user.queries)} queries to "
            "judge by, and both are needed: user_id, history and queries on one line"
        )


def train_and_evaluate(
    engine: "Engine",
    trained: Sequence[Item],
    held_out: Sequence[Item],
    recipe: Recipe,
    folder: Path,
    monitor: Monitor,
) -> "tuple[TrainingResult, Evaluation]":
    """Train on the items `trained` in `folder`, then compare the ways on `held_out`.

    A stage that finds its own work in `folder` is not run again. Raises what `train_user` and
    `evaluate` raise.
    """
    from langchain_cope.atomic_files import read_json, write_json
    from langchain_cope.engine import give_back
    from langchain_cope.evaluation.evaluate import Evaluation, check_evaluable, evaluate
    from langchain_cope.training.pipeline import train_user

    check_evaluable(engine, held_out, recipe)
    training = train_user(engine, trained, recipe, folder, monitor)
    file = folder / Stage.EVALUATE.file
    if not file.exists():
        with monitor.stage(Stage.EVALUATE):
            evaluation = evaluate(engine, held_out, training.recipe, folder, monitor)
            write_json(file, asdict(evaluation))
        give_back(engine.base.device)
    return training, Evaluation(**read_json(file))
