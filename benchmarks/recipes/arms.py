"""What the sweep compares: each arm says what it changes in `Recipe.for_model`."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from langchain_cope.engine import ADAPTER_ALONE, Adapter, Engine
from langchain_cope.evaluation.rouge import mean_rouge
from langchain_cope.training import negatives
from langchain_cope.training.encode import Encoded
from langchain_cope.training.negatives import Pair
from langchain_cope.training.progress import Monitor
from langchain_cope.training.recipe import Negatives, Recipe

KINDS = ("lowest", "random", "highest", "lowest-of-8", "lowest-total", "peers")
CANDIDATES = 8  # sampled an item
FEW = 3  # of them that are looked at, as in the paper; by `lowest-of-8` all


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    sft: dict[str, Any] | None = field(default_factory=dict)
    """What it changes in the recipe's `SFT`; None: no adapter at all."""
    dpo: dict[str, Any] | None = None
    """What it changes in the recipe's `DPO`; None: SFT alone."""
    rejected: str = "lowest"
    """Which candidate is rejected: of the `lowest`, a `random` or the `highest` reward."""


def _arms() -> list[Arm]:
    plain = {"dropout": 0.0, "learning_rate": 5e-4}
    arms = [Arm("base", None), Arm("today"), Arm("pilot", plain)]
    for rate in (1e-3, 2e-3, 4e-3):
        arms.append(Arm(f"lr{rate:.0e}".replace("e-0", "e-"), {**plain, "learning_rate": rate}))
    arms += [
        Arm("ep1", {**plain, "epochs": 1}),
        Arm("ep3", {**plain, "epochs": 3}),
        Arm("ep4", {**plain, "epochs": 4}),
        Arm("lr1e-3ep1", {**plain, "learning_rate": 1e-3, "epochs": 1}),
        Arm("lr1e-3ep3", {**plain, "learning_rate": 1e-3, "epochs": 3}),
        Arm("lr1e-3ep4", {**plain, "learning_rate": 1e-3, "epochs": 4}),
        Arm("r2", {**plain, "rank": 2, "lora_alpha": 2}),
        Arm("r16", {**plain, "rank": 16, "lora_alpha": 16}),
        Arm("r32", {**plain, "rank": 32, "lora_alpha": 32}),
        Arm("qv", {**plain, "targets": "attention"}),
        Arm("qv-lr1e-3", {**plain, "targets": "attention", "learning_rate": 1e-3}),
        Arm("drop", {**plain, "dropout": 0.05}),
        Arm("b8", {**plain, "batch_size": 8}),
        Arm("b2", {**plain, "batch_size": 2}),
        Arm("clip1", {**plain, "max_grad_norm": 1.0}),
    ]
    return arms


ARMS = {arm.name: arm for arm in _arms()}


def _dpo_arms() -> list[Arm]:
    plain = {"dropout": 0.0, "learning_rate": 5e-4}
    strong = {"learning_rate": 1e-4, "beta": 0.1}
    arms = [
        Arm("dpo-today", plain, {}),
        Arm("dpo-1e-4", plain, strong),
        Arm("dpo-5e-4", plain, {**strong, "learning_rate": 5e-4}),
        Arm("dpo-2e-4-b.03", plain, {"learning_rate": 2e-4, "beta": 0.03}),
        Arm("dpo-2e-4-ep2", plain, {**strong, "learning_rate": 2e-4, "epochs": 2}),
    ]
    arms += [Arm(f"dpo-1e-4-{kind}", plain, strong, kind) for kind in KINDS[1:]]
    return arms


def _starter_arms() -> list[Arm]:
    plain = {"dropout": 0.0}
    strong = {"learning_rate": 3e-4, "beta": 0.1}
    arms = [
        Arm("s-plain", plain),
        Arm("s-lr3e-3", {**plain, "learning_rate": 3e-3}),
        Arm("s-ep1", {**plain, "epochs": 1}),
        Arm("s-ep3", {**plain, "epochs": 3}),
        Arm("s-ep4", {**plain, "epochs": 4}),
        Arm("s-dpo-today", plain, {}),
        Arm("s-dpo-strong", plain, {**strong, "learning_rate": 1.5e-3}),
    ]
    arms += [Arm(f"s-dpo-{kind}", plain, strong, kind) for kind in KINDS]
    return arms


ARMS |= {arm.name: arm for arm in _dpo_arms() + _starter_arms()}


@dataclass(frozen=True)
class Candidate:
    """An answer that may be the rejected side of an item."""

    pair: Pair
    reward: float
    """Mean nats a token by which the SFT adapter finds it likelier than the base does."""
    total: float
    """The same, summed over its tokens."""
    likeness: float
    """ROUGE-L with what the user wrote."""


def candidates_of(
    engine: Engine,
    examples: Sequence[Encoded],
    recipe: Recipe,
    sft: Adapter,
    writer: Adapter | None,
) -> list[list[Candidate]]:
    """Return the usable answers to each item that `writer` samples, the base where it is None."""
    recipe = replace(recipe, negatives=Negatives(candidates=CANDIDATES))
    after_end = tuple(negatives.closing_ids(engine.base)[1:])
    requests = [
        replace(request, adapter=writer, contrast=ADAPTER_ALONE)
        for example in examples
        for request in negatives._requests(engine.base, example, recipe, after_end)
    ]
    answers = iter(engine.generate(requests))
    found = [
        negatives._candidates(engine.base, example, list(islice(answers, CANDIDATES)), recipe)
        for example in examples
    ]
    flat = [candidate for of_item in found for candidate in of_item]
    sequences = [(candidate.prompt_ids, candidate.completion_ids) for candidate in flat]
    by_user, by_base = engine.score(sequences, sft), engine.score(sequences, None)
    gains = iter([(user - base).tolist() for user, base in zip(by_user, by_base, strict=True)])
    return [
        [_candidate(example, candidate, next(gains)) for candidate in of_item]
        for example, of_item in zip(examples, found, strict=True)
    ]


def _candidate(example: Encoded, candidate: Any, gains: Sequence[float]) -> Candidate:
    total = sum(gains)
    reward = total / len(gains)
    pair = replace(negatives._pair(example, candidate, reward), rejected_base_log_prob=None)
    likeness = mean_rouge([example.item.completion], [candidate.text])["rougeL"]
    return Candidate(pair, reward, total, likeness)


def chosen(candidates: Sequence[Candidate], kind: str, chance: random.Random) -> Candidate:
    """Return the one of an item's candidates that this kind rejects."""
    few = candidates[:FEW]
    if kind == "lowest-of-8":
        return min(candidates, key=lambda each: each.reward)
    if kind == "lowest-total":
        return min(few, key=lambda each: each.total)
    if kind == "highest":
        return max(few, key=lambda each: each.reward)
    if kind == "random":
        return chance.choice(few)
    return min(few, key=lambda each: each.reward)


def pairs_of(
    engine: Engine, candidates: Sequence[Sequence[Candidate]], kind: str, seed: int = 0
) -> list[Pair]:
    """Return a pair for every item, all kinds with as many."""
    chance = random.Random(seed)
    pairs = [chosen(of_item, kind, chance).pair for of_item in candidates if of_item]
    return negatives.with_base_log_probs(engine, pairs, Monitor())
