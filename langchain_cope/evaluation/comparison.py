"""One user's training and the four ways on held-out items, as a personalization runs them.

Many users and all ways, without publishing, are `users.py`.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from langchain_cope.errors import HistoryError
from langchain_cope.history.items import Item, UserHistory
from langchain_cope.training.progress import Monitor, Stage
from langchain_cope.training.recipe import Recipe

if TYPE_CHECKING:
    from langchain_cope.engine import Engine
    from langchain_cope.evaluation.evaluate import Evaluation
    from langchain_cope.training.pipeline import TrainingResult


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
