"""How much one user gains: train on the history, judge on the queries, publish nothing."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_cope.errors import HistoryError
from langchain_cope.history.items import Item, UserHistory
from langchain_cope.training.progress import Progress, never, unheard
from langchain_cope.training.recipe import Recipe

if TYPE_CHECKING:
    from langchain_cope.engine import Engine
    from langchain_cope.evaluation.evaluate import Evaluation
    from langchain_cope.training.encode import Example
    from langchain_cope.training.pipeline import TrainingResult


@dataclass(frozen=True)
class UserEvaluation:
    """One user's row of the comparison."""

    user_id: str | None
    metrics: dict[str, dict[str, float]]
    """``metrics["base" | "sft" | "dpo" | "cope"]``: ``rouge1``, ``rougeL`` and, except for cope, ``nll`` on the queries."""
    timings: dict[str, float]
    """Seconds of each stage."""
    num_trained: int
    num_queries: int
    adapter_bytes: int
    """Size of the final adapter's file."""
    notes: list[str]


def evaluate_user(
    engine: "Engine",
    history: UserHistory,
    recipe: Recipe | None = None,
    *,
    on_progress: Callable[[Progress], None] = unheard,
    should_stop: Callable[[], bool] = never,
) -> UserEvaluation:
    """Train on ``history.items``, all of them, and compare base, SFT, DPO and CoPe on ``history.queries``.

    ``recipe`` None: ``Recipe.for_model``. Raises ``HistoryError`` where items or queries are missing, ``Cancelled``.
    """
    if not history.items or not history.queries:
        raise HistoryError(
            f"user {history.user_id!r} has {len(history.items)} history items and {len(history.queries)} queries; both are needed: "
            "one line a user with user_id, history and queries"
        )
    from langchain_cope.engine import WEIGHTS

    timings: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        timings[name] = round(time.monotonic() - started, 3)

    recipe = recipe or Recipe.for_model(engine.base, history.items)
    with tempfile.TemporaryDirectory(prefix="cope-") as folder:
        training, evaluation = train_and_evaluate(
            engine,
            history.items,
            history.queries,
            recipe,
            Path(folder),
            on_progress,
            should_stop,
            stage,
        )
        adapter_bytes = (training.dpo / WEIGHTS).stat().st_size
    return UserEvaluation(
        history.user_id,
        evaluation.metrics,
        timings,
        len(history.items),
        len(history.queries),
        adapter_bytes,
        [*history.notes, *training.notes, *evaluation.notes],
    )


def train_and_evaluate(
    engine: "Engine",
    trained: Sequence[Item],
    judged: Sequence[Item],
    recipe: Recipe,
    folder: Path,
    on_progress: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    stage: Callable[[str], Any],
) -> "tuple[TrainingResult, Evaluation]":
    """Train on the one list of items in ``folder``, then compare base, SFT, DPO and CoPe on the other.

    Stages that ``folder`` holds the work of are not run again.
    """
    from langchain_cope.evaluation.evaluate import Evaluation, evaluate
    from langchain_cope.training.atomic_files import read_json, write_json
    from langchain_cope.training.pipeline import train_user

    training = train_user(
        engine,
        as_examples(trained),
        recipe,
        folder,
        on_progress=on_progress,
        should_stop=should_stop,
        stage=stage,
    )
    judgement = folder / "evaluation.json"
    if not judgement.exists():
        with stage("evaluate"):
            evaluation = evaluate(
                engine,
                as_examples(judged),
                training.recipe,
                sft=training.sft,
                dpo=training.dpo,
                on_progress=on_progress,
                should_stop=should_stop,
            )
            write_json(judgement, asdict(evaluation))
    return training, Evaluation(**read_json(judgement))


def as_examples(items: Sequence[Item]) -> "list[Example]":
    """The items as the training chain takes them."""
    from langchain_cope.training.encode import Example

    return [Example(item.messages, item.completion, item.rejected) for item in items]
