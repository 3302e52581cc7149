"""How near base, SFT, DPO and CoPe come to what the user wrote, on items that were not trained on.

NLL is nats per token of the user's own completions (their sum over the sum of tokens); ROUGE compares greedy generations with them.
CoPe has no NLL: about half of the true next tokens of a small model lie outside its plausible head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from langchain_cope.engine import ADAPTER_ALONE, Adapter, Engine, Request, Sampling
from langchain_cope.errors import HistoryError
from langchain_cope.training.encode import Encoded, Example, fit
from langchain_cope.training.progress import Progress, Watch, never, unheard
from langchain_cope.training.recipe import Recipe

ITEMS_A_BATCH = 16  # whose four generations share a batch


@dataclass(frozen=True)
class Evaluation:
    """Metrics and the texts that they were computed from."""

    metrics: dict[str, dict[str, float]]
    """``["base" | "sft" | "dpo" | "cope"]`` holds ``rouge1``, ``rougeL`` (f-measures, 0 to 1) and, except for cope, ``nll``."""
    indices: list[int]
    """Place of each evaluated item among the examples given: one that fits no context is left out."""
    texts: list[dict[str, str]]
    """Per item its ``reference`` and what ``base``, ``sft``, ``dpo`` and ``cope`` wrote."""
    notes: list[str]
    """What was cut or dropped."""


def evaluate(
    engine: Engine,
    examples: Sequence[Example],
    recipe: Recipe,
    *,
    sft: Path,
    dpo: Path,
    on_progress: Callable[[Progress], None] = unheard,
    should_stop: Callable[[], bool] = never,
) -> Evaluation:
    """Compare the base, the adapters in the folders ``sft`` and ``dpo``, and CoPe on ``examples``, which were not trained on.

    ``recipe`` is the one as used (``TrainingResult.recipe``). Raises ``Cancelled`` within one forward of the model
    after ``should_stop`` says so, ``HistoryError`` where no example is left to evaluate on.
    """
    watch = Watch("evaluate", on_progress, should_stop)
    items, notes = _encode(engine, examples, recipe)
    adapters = {"base": None, "sft": engine.load_adapter(sft), "dpo": engine.load_adapter(dpo)}
    likelihoods = {
        name: negative_log_likelihood(engine, items, adapter, should_stop)
        for name, adapter in adapters.items()
    }
    texts = _generate(engine, items, recipe, adapters, watch)
    metrics = _rouge(texts)
    for name, nll in likelihoods.items():
        metrics[name]["nll"] = nll
    return Evaluation(metrics, [item.index for item in items], texts, notes)


def mean_nll(
    engine: Engine,
    examples: Sequence[Example],
    recipe: Recipe,
    adapter: Adapter | None = None,
    should_stop: Callable[[], bool] = never,
) -> float:
    """Nats per completion token of ``examples`` under the base, or under ``adapter``: what the gate compares.

    Raises ``HistoryError`` where no example is left to evaluate on, ``Cancelled``.
    """
    return negative_log_likelihood(
        engine, _encode(engine, examples, recipe)[0], adapter, should_stop
    )


def negative_log_likelihood(
    engine: Engine,
    items: Sequence[Encoded],
    adapter: Adapter | None = None,
    should_stop: Callable[[], bool] = never,
) -> float:
    """Nats per completion token over all ``items`` together."""
    scored = engine.score(
        [(item.prompt_ids, item.completion_ids) for item in items], adapter, should_stop
    )
    return -sum(float(logps.double().sum()) for logps in scored) / sum(
        len(logps) for logps in scored
    )


def _encode(
    engine: Engine, examples: Sequence[Example], recipe: Recipe
) -> tuple[list[Encoded], list[str]]:
    items, notes = fit(engine.base, examples, recipe.max_length, recipe.max_words)
    if not items:
        raise HistoryError(
            f"none of {len(examples)} items can be evaluated on: {'; '.join(notes) or 'there are none'}"
        )
    return items, notes


def _generate(
    engine: Engine,
    items: Sequence[Encoded],
    recipe: Recipe,
    adapters: dict[str, Adapter | None],
    watch: Watch,
) -> list[dict[str, str]]:
    """Greedy answers; CoPe is the DPO adapter with the contrast on, the others have it off."""
    ways = [(name, adapter, ADAPTER_ALONE) for name, adapter in adapters.items()] + [
        ("cope", adapters["dpo"], recipe.contrast)
    ]
    texts: list[dict[str, str]] = []
    limit = recipe.max_new_tokens or max(len(item.completion_ids) for item in items)
    sampling = Sampling(max_tokens=limit, repetition_penalty=recipe.repetition_penalty)
    for start in range(0, len(items), ITEMS_A_BATCH):
        watch.raise_if_stopped()
        batch = items[start : start + ITEMS_A_BATCH]
        requests = [
            Request(
                engine.base.prompt_ids(item.example.prompt),
                adapter=adapter,
                contrast=contrast,
                sampling=sampling,
                keep_for_reuse=False,
            )
            for item in batch
            for _, adapter, contrast in ways
        ]
        answers = iter(engine.generate(requests, watch.should_stop))
        for item in batch:
            texts.append(
                {
                    "reference": item.example.completion,
                    **{name: next(answers).text for name, _, _ in ways},
                }
            )
        watch.report(start + len(batch), len(items))
    return texts


def _rouge(texts: Sequence[dict[str, str]]) -> dict[str, dict[str, float]]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    metrics = {}
    for name in ("base", "sft", "dpo", "cope"):
        scores = [scorer.score(text["reference"], text[name]) for text in texts]
        metrics[name] = {
            kind: sum(score[kind].fmeasure for score in scores) / len(scores)
            for kind in ("rouge1", "rougeL")
        }
    return metrics
