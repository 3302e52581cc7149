"""How near each way of answering comes to what the user wrote, on items that were not trained on.

NLL is nats per token of the user's own completions (their sum over the sum of tokens), lower is
better; ROUGE compares greedy generations with them (f-measures, 0 to 1), higher is better.
`ways.py` says which ways there are, and which of them have an NLL.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from langchain_cope._environment import a_home
from langchain_cope.engine import ADAPTER_ALONE, Adapter, Contrast, Engine, Request, Sampling
from langchain_cope.errors import HistoryError
from langchain_cope.evaluation.ways import WAYS, Way
from langchain_cope.history.items import Item
from langchain_cope.strength import Strength, strength_for
from langchain_cope.training.encode import Encoded, fit, parts_of_reply
from langchain_cope.training.pipeline import trained_by
from langchain_cope.training.progress import Monitor, Stage
from langchain_cope.training.recipe import Recipe

Adapters = Mapping[Stage | None, Adapter | None]
"""The adapters that answer, by the stage that trained each; under None the base, which has none."""
Asked = tuple[Adapter | None, float, Contrast]
"""What answers: an adapter, its scale and the contrast."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics, and the texts that they were computed from."""

    metrics: dict[str, dict[str, float]]
    """By the name of each of `WAYS`: `rouge1`, `rougeL` and, where it has one, `nll`.

    Without both ROUGE figures where they could not be had, as a note says.
    """
    indices: list[int]
    """Index of each evaluated item in `held_out`: one that fits no context is left out."""
    texts: list[dict[str, str]]
    """For each evaluated item its `reference`, and under the name of each way what it wrote."""
    notes: list[str]
    """In words for people: what was cut, dropped, or could not be measured."""
    item_nll: dict[str, list[float]]
    """By the name of each way that has an NLL: nats per completion token of each evaluated item."""

    def on(self, rows: Sequence[int]) -> "Evaluation":
        """Return the same of some evaluated items, numbered anew; the metrics stay those of all."""
        return replace(
            self,
            indices=list(range(len(rows))),
            texts=[self.texts[row] for row in rows],
            item_nll={name: [nll[row] for row in rows] for name, nll in self.item_nll.items()},
        )


def evaluate(
    engine: Engine, held_out: Sequence[Item], recipe: Recipe, folder: Path, monitor: Monitor
) -> Evaluation:
    """Compare all `WAYS` on the items `held_out`.

    The adapters are those that a training left in `folder`, and `recipe` is the one as used
    (`TrainingResult.recipe`). Raises `Cancelled` within one forward of the model after `monitor`
    asks for a stop, and `HistoryError` where no item is left to evaluate on.
    """
    examples, notes = _encode(engine, held_out, recipe)
    adapters = _load_adapters(engine, folder)
    with_nll = [way for way in WAYS if way.has_nll]
    of_adapter = {
        adapter: _scores(engine, examples, adapter, monitor.should_stop)
        for adapter in dict.fromkeys(adapters[way.adapter] for way in with_nll)
    }
    scores = {way.name: of_adapter[adapters[way.adapter]] for way in with_nll}
    texts = _generate(engine, examples, recipe, adapters, monitor)
    metrics, rouge_notes = rouge_of_ways(texts, [way.name for way in WAYS])
    for name, of_items in scores.items():
        metrics[name]["nll"] = over_all_tokens(of_items)
    item_nll = {name: by_item(of_items) for name, of_items in scores.items()}
    indices = [example.index for example in examples]
    return Evaluation(metrics, indices, texts, [*notes, *rouge_notes], item_nll)


def check_evaluable(engine: Engine, held_out: Sequence[Item], recipe: Recipe) -> None:
    """Raise `HistoryError` where `evaluate` would for want of items: before hours of training."""
    _encode(engine, held_out, recipe)


def item_nll(
    engine: Engine,
    held_out: Sequence[Item],
    recipe: Recipe,
    adapter: Adapter | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[float]:
    """Return the nats per completion token of each item, as `Evaluation.item_nll` has them.

    This is what the gate compares. Raises `HistoryError` where no item is left to evaluate on, and
    `Cancelled`.
    """
    examples, _ = _encode(engine, held_out, recipe)
    return by_item(_scores(engine, examples, adapter, should_stop))


def _scores(
    engine: Engine,
    examples: Sequence[Encoded],
    adapter: Adapter | None,
    should_stop: Callable[[], bool] | None,
) -> list[list[float]]:
    """Return the log-probability of each completion token of each example."""
    sequences = [(example.prompt_ids, example.completion_ids) for example in examples]
    return [of_item.tolist() for of_item in engine.score(sequences, adapter, should_stop)]


def over_all_tokens(scores: Sequence[Sequence[float]]) -> float:
    """Return the NLL, nats a token, of items together, from each one's log-probabilities."""
    total = math.fsum(math.fsum(of_item) for of_item in scores)
    return -total / sum(map(len, scores))


def by_item(scores: Sequence[Sequence[float]]) -> list[float]:
    """Return the NLL, nats a token, of each item, from its log-probabilities."""
    return [-math.fsum(of_item) / len(of_item) for of_item in scores]


def _encode(
    engine: Engine, held_out: Sequence[Item], recipe: Recipe
) -> tuple[list[Encoded], list[str]]:
    examples, notes = fit(engine.base, held_out, recipe.max_length, recipe.max_words)
    if not examples:
        raise HistoryError(
            f"none of {len(held_out)} items can be evaluated on: "
            f"{'; '.join(notes) or 'there are none'}"
        )
    return examples, notes


def _load_adapters(engine: Engine, folder: Path) -> Adapters:
    """Return the adapters of all ways; where DPO was skipped, one and the same under both stages.

    So nothing is scored or asked twice.
    """
    adapters: dict[Stage | None, Adapter | None] = {None: None}
    for way in WAYS:
        if way.adapter is not None and way.adapter not in adapters:
            stage = trained_by(folder, way.adapter)
            if stage not in adapters:
                adapters[stage] = engine.load_adapter(folder / stage.file)
            adapters[way.adapter] = adapters[stage]
    return adapters


def _generate(
    engine: Engine,
    examples: Sequence[Encoded],
    recipe: Recipe,
    adapters: Adapters,
    monitor: Monitor,
) -> list[dict[str, str]]:
    """Return for each example its reference and the greedy answer of each way."""
    longest = max(len(example.completion_ids) for example in examples)
    sampling = Sampling(
        max_tokens=recipe.max_new_tokens or longest,
        repetition_penalty=recipe.repetition_penalty,
    )
    strength = strength_for(engine.base.fingerprint(), recipe.alpha, recipe.tau)
    asked_by = {way.name: _asked(way, adapters, strength) for way in WAYS}
    asked = dict.fromkeys(asked_by.values())  # those that would be the same once
    requests = (
        request for example in examples for request in _requests(engine, example, asked, sampling)
    )
    texts: list[dict[str, str]] = []
    with closing(engine.generate_each(requests, monitor.should_stop)) as answers:
        for number, example in enumerate(examples, start=1):
            text_of = {each: next(answers).text for each in asked}
            answer_of_way = {name: text_of[each] for name, each in asked_by.items()}
            texts.append({"reference": example.item.completion, **answer_of_way})
            monitor.step_done(number, len(examples))
    return texts


def _requests(
    engine: Engine,
    example: Encoded,
    asked: Iterable[Asked],
    sampling: Sampling,
) -> list[Request]:
    """Return the question put to each of `asked`."""
    prompt = engine.base.prompt_ids(example.item.messages)
    parts = parts_of_reply(engine.base, prompt)
    return [
        Request(
            prompt,
            adapter=adapter,
            adapter_scale=scale,
            contrast=contrast,
            sampling=sampling,
            parts=parts,
            offline=True,
        )
        for adapter, scale, contrast in asked
    ]


def _asked(way: Way, adapters: Adapters, strength: Strength) -> Asked:
    """Return what answers for `way`."""
    if not way.contrastive:
        return adapters[way.adapter], 1.0, ADAPTER_ALONE
    return adapters[way.adapter], strength.adapter_scale, strength.contrast


def rouge_of_ways(
    texts: Sequence[dict[str, str]], names: Sequence[str]
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Return each way's ROUGE, and a note where there is none: no adapter is lost for that."""
    try:
        with a_home():  # nltk, which comes with it, does not load without
            from langchain_cope.evaluation.rouge import mean_rouge

        references = [text["reference"] for text in texts]
        rouge = {name: mean_rouge(references, [text[name] for text in texts]) for name in names}
    except Exception as error:
        note = f"ROUGE could not be computed ({type(error).__name__}: {error}); NLL stands"
        return {name: {} for name in names}, [note]
    return rouge, []
