"""What the sweep compares: ways to train, and the sides that DPO may reject."""

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

KINDS = ("lowest", "random", "highest", "lowest-of-8", "lowest-total", "lowest-cool", "peers")
CANDIDATES = 8  # sampled an item
FEW = 3  # of them that are looked at, as in the paper; by `lowest-of-8` all
COOL = 0.5  # temperature that `lowest-cool` samples at; the others at the paper's 1


@dataclass(frozen=True)
class Arm:
    """One way to train: what it changes in the recipe for a base and a history."""

    rate: float = 1.0
    """Times the sweep's learning rate of SFT."""
    sft: dict[str, Any] = field(default_factory=dict)
    """What else it changes in SFT, which here has no dropout otherwise."""
    dpo_rate: float | None = None
    """The learning rate of DPO, as a share of that of SFT; None: SFT alone."""
    dpo: dict[str, Any] = field(default_factory=dict)
    """What else it changes in DPO."""
    rejected: str = KINDS[0]
    """Which of an item's answers is the rejected side: one of `KINDS`."""
    trains: bool = True
    """Whether there is an adapter at all."""

    def recipe(self, reference: Recipe, rate: float) -> Recipe:
        """Return `reference` with the changes; `rate` is the sweep's."""
        sft_rate = _rounded(rate * self.rate)
        sft = replace(reference.sft, **{"dropout": 0.0, "learning_rate": sft_rate, **self.sft})
        dpo_rate = _rounded(sft_rate * (self.dpo_rate or 1))
        dpo = replace(reference.dpo, **{"learning_rate": dpo_rate, **self.dpo})
        return replace(reference, sft=sft, dpo=dpo)


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


_FIRM = {"beta": 0.1}
ARMS = {
    "base": Arm(trains=False),
    "plain": Arm(),
    "dropout": Arm(sft={"dropout": 0.05}),
    "rate-x2": Arm(2),
    "rate-x4": Arm(4),
    "1-epoch": Arm(sft={"epochs": 1}),
    "3-epochs": Arm(sft={"epochs": 3}),
    "4-epochs": Arm(sft={"epochs": 4}),
    "rank-2": Arm(sft={"rank": 2, "lora_alpha": 2}),
    "rank-32": Arm(sft={"rank": 32, "lora_alpha": 32}),
    "q-and-v": Arm(sft={"targets": "attention"}),
    "batch-2": Arm(sft={"batch_size": 2}),
    "batch-8": Arm(sft={"batch_size": 8}),
    "clip-1": Arm(sft={"max_grad_norm": 1.0}),
    "dpo-paper": Arm(dpo_rate=0.05),
    **{f"dpo-firm-{kind}": Arm(dpo_rate=0.2, dpo=_FIRM, rejected=kind) for kind in KINDS},
    "dpo-hard": Arm(dpo_rate=1, dpo=_FIRM),
}
"""`dpo-paper`: at the paper's distance from the rate of SFT; all `dpo-firm` take as many steps."""


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
    temperature: float,
) -> list[list[Candidate]]:
    """Return the usable answers to each item that `writer` samples, the base where it is None."""
    sampled = Negatives(candidates=CANDIDATES, temperature=temperature)
    recipe = replace(recipe, negatives=sampled)
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
