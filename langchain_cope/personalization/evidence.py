"""What is known of one training when it is judged: likelihoods of items, one pair an item.

All are nats per completion token, the mean over the tokens of one item: so a long text counts no
more than a short one. Items of one conversation are no independent witnesses, and count as one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from langchain_cope.history.items import Item
from langchain_cope.personalization.certainty import Prior

if TYPE_CHECKING:
    from langchain_cope.engine import Engine
    from langchain_cope.training.encode import Encoded
    from langchain_cope.training.recipe import Recipe

PAIRED_ITEMS = 24  # at most, the newest; each is scored after its own prompt and after another's


@dataclass(frozen=True)
class Evidence:
    """What the base says of the items that were trained on, and of their order."""

    first_sights: list[float]
    """Gain over the base of each item that training came to in the later half of its first epoch.

    Each was measured before the first step that trained on it (`training/first_sight.py`).
    """
    trained_pairing: list[float]
    """Nats by which the base finds a trained item likelier after its own prompt than another's."""
    held_out_pairing: list[float]
    """The same for held-out items, among themselves; empty where the base is known to tell."""


NO_EVIDENCE = Evidence([], [], [])
"""What is known where nobody asks."""


def gather(
    engine: "Engine",
    trained: Sequence[Item],
    held_out: Sequence[Item],
    recipe: "Recipe",
    first_sights: Sequence[dict[str, float]],
    held_out_nll: Sequence[float],
    prior: Prior,
    should_stop: Callable[[], bool] | None = None,
) -> Evidence:
    """Return what the base says of a training on `trained` that is judged by `held_out`.

    `first_sights` are the rows of `training/first_sight.py`, `held_out_nll` the base's NLL of each
    held-out item that fits the context, and `prior` is the base's. Raises `Cancelled`.
    """
    from langchain_cope.training.encode import fit

    examples, _ = fit(engine.base, trained, recipe.max_length, recipe.max_words)
    late = _later_half(first_sights)
    newest = examples[-PAIRED_ITEMS:]
    seen = {example.index: example for example in examples}
    needed = {example.index: example for example in newest}
    needed |= {int(row["index"]): seen[int(row["index"])] for row in late}
    sequences = [(example.prompt_ids, example.completion_ids) for example in needed.values()]
    own = dict(zip(needed, _mean_nll(engine, sequences, should_stop), strict=True))
    held_out_pairing: list[float] = []
    if not prior.reads_prompts:
        judges, _ = fit(engine.base, held_out, recipe.max_length, recipe.max_words)
        held_out_pairing = _pairing(engine, judges, held_out_nll, should_stop)
    return Evidence(
        first_sights=mean_of_each(
            units_of([seen[int(row["index"])].item for row in late]),
            [own[int(row["index"])] - row["nll"] for row in late],
        ),
        trained_pairing=_pairing(
            engine, newest, [own[example.index] for example in newest], should_stop
        ),
        held_out_pairing=held_out_pairing,
    )


def units_of(items: Sequence[Item]) -> list[object]:
    """Return for each item what it counts with: its conversation, else itself alone."""
    return [
        position if item.conversation is None else item.conversation
        for position, item in enumerate(items)
    ]


def mean_of_each(units: Sequence[object], values: Sequence[float]) -> list[float]:
    """Return the mean of the values of each unit, in the order in which the units come."""
    groups: dict[object, list[float]] = {}
    for unit, value in zip(units, values, strict=True):
        groups.setdefault(unit, []).append(value)
    return [fmean(group) for group in groups.values()]


def _later_half(first_sights: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Return those of the steps in which the adapter was no longer nearly the base."""
    last = max((row["step"] for row in first_sights), default=0)
    return [row for row in first_sights if row["step"] > last / 2]


def _pairing(
    engine: "Engine",
    examples: "Sequence[Encoded]",
    own: Sequence[float],
    should_stop: Callable[[], bool] | None,
) -> list[float]:
    """Return for each example by how much its own prompt makes it likelier than its neighbour's.

    Where the neighbour's prompt is the same there is nothing to tell.
    """
    limit = engine.base.context
    sequences, of_own = [], []
    for position, (example, nll) in enumerate(zip(examples, own, strict=True)):
        other = examples[position - 1].prompt_ids
        fits = len(other) + len(example.completion_ids) <= limit
        if fits and other != example.prompt_ids:
            sequences.append((other, example.completion_ids))
            of_own.append(nll)
    others = _mean_nll(engine, sequences, should_stop)
    return [other - mine for other, mine in zip(others, of_own, strict=True)]


def _mean_nll(
    engine: "Engine",
    sequences: Sequence[tuple[list[int], list[int]]],
    should_stop: Callable[[], bool] | None,
) -> list[float]:
    from langchain_cope.evaluation.evaluate import by_item

    scores = engine.score(sequences, None, should_stop)
    return by_item([of_item.tolist() for of_item in scores])
