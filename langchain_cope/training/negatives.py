"""The pairs that DPO trains on: what the user wrote, and an answer unlike the user.

Where the history says what was rejected, that is taken as it is. For all other items it is mined:
of a few answers that the base samples, the one least like the user. The reward of an answer y to a
prompt x is the mean over its tokens of `log π_SFT(y|x) − log π_base(y|x)`, in nats (Bu et al.,
EMNLP 2025, with α = 1); the lowest becomes the rejected side.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from langchain_cope.engine import Adapter, Base, Completion, Engine, Request, Sampling
from langchain_cope.training.encode import (
    Encoded,
    common_prefix,
    encode,
    encode_candidate,
    parts_of_reply,
)
from langchain_cope.training.progress import Monitor
from langchain_cope.training.recipe import Recipe

ITEMS_A_BATCH = 16  # items of which candidates are sampled together; a step of the stage


@dataclass(frozen=True)
class Pair:
    """An item with its negative, as DPO trains on it."""

    index: int
    """Index of the item in the history."""
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    rejected: str
    """The negative as text."""
    reward: float | None = None
    """Mean nats a token by which SFT finds the mined negative likelier than the base does.

    The lowest of the item's candidates; None where the history itself says what was rejected.
    """


@dataclass(frozen=True)
class _Candidate:
    text: str
    prompt_ids: list[int]
    completion_ids: list[int]


def make_pairs(
    engine: Engine, examples: Sequence[Encoded], recipe: Recipe, sft: Adapter, monitor: Monitor
) -> tuple[list[Pair], list[str]]:
    """Return the pairs of all items in order, and in words for people what was left out.

    They are the pairs that the history gives, and a mined one for every item without any.
    """
    unpaired = [example for example in examples if not example.item.rejected]
    mined, mining_notes = mine_negatives(engine, unpaired, recipe, sft, monitor)
    ready, notes = given_pairs(engine.base, examples, recipe)
    pairs = sorted([*mined, *ready], key=lambda pair: pair.index)
    return pairs, [*mining_notes, *notes]


def given_pairs(
    base: Base, examples: Sequence[Encoded], recipe: Recipe
) -> tuple[list[Pair], list[str]]:
    """Return a pair for every answer that the history says was rejected, in order, and notes.

    A rejected answer is cut like a completion: where it fills the room, it has no end of the turn.
    """
    limit = min(recipe.max_length, base.context)
    num_given = 0
    pairs = []
    for example in examples:
        for text in example.item.rejected:
            num_given += 1
            prompt_ids, answer_ids = encode(base, example.item.messages, text)
            completion_ids = answer_ids[: max(0, limit - len(prompt_ids))]
            if completion_ids:
                pairs.append(_pair(example, _Candidate(text, prompt_ids, completion_ids)))
    notes = []
    if num_given:
        notes.append(
            f"{num_given} pairs of a chosen and a rejected answer were given; "
            "no negative is mined for their items"
        )
    if len(pairs) < num_given:
        notes.append(
            f"{num_given - len(pairs)} of them dropped: "
            "the prompt leaves no room for the rejected answer"
        )
    return pairs, notes


def mine_negatives(
    engine: Engine, examples: Sequence[Encoded], recipe: Recipe, sft: Adapter, monitor: Monitor
) -> tuple[list[Pair], list[str]]:
    """Return a pair for every item with a usable candidate, in order, and notes.

    Candidates are sampled from the base, without what it thinks before it answers, and scored
    against the adapter `sft`. Empty ones and copies of the user's own text are dropped; one cut at
    the limit is scored, and trained on, without the end of the turn. `recipe.max_new_tokens` must
    be set. Raises `Cancelled` within one forward of the model after `monitor` asks for a stop.
    """
    pairs: list[Pair] = []
    num_usable = 0
    for start in range(0, len(examples), ITEMS_A_BATCH):
        monitor.raise_if_stopped()
        batch = examples[start : start + ITEMS_A_BATCH]
        candidates = _sample(engine, batch, recipe, monitor)
        num_usable += sum(len(of_item) for of_item in candidates)
        pairs += _least_like_user(engine, batch, candidates, sft, monitor)
        monitor.step_done(start + len(batch), len(examples))
    num_sampled = recipe.negatives.candidates * len(examples)
    notes = []
    if num_usable < num_sampled:
        notes.append(
            f"{num_sampled - num_usable} of {num_sampled} candidates dropped: "
            "empty or the user's own text"
        )
    if len(pairs) < len(examples):
        num_skipped = len(examples) - len(pairs)
        notes.append(f"{num_skipped} of {len(examples)} items skip DPO: no usable candidate")
    return pairs, notes


def _sample(
    engine: Engine, examples: Sequence[Encoded], recipe: Recipe, monitor: Monitor
) -> list[list[_Candidate]]:
    """Return the usable candidates of each item."""
    number = recipe.negatives.candidates
    requests = [
        _request(engine, example, recipe, draw) for example in examples for draw in range(number)
    ]
    answers = engine.generate(requests, monitor.should_stop)
    limit = min(recipe.max_length, engine.base.context)
    candidates = []
    for index, example in enumerate(examples):
        usable = []
        for answer in answers[index * number : (index + 1) * number]:
            if not _is_usable(answer, example):
                continue
            closed = answer.finish_reason == "stop"
            prompt_ids, completion_ids = encode_candidate(
                engine.base, example, answer.text, limit, closed=closed
            )
            if completion_ids:
                usable.append(_Candidate(answer.text, prompt_ids, completion_ids))
        candidates.append(usable)
    return candidates


def _request(engine: Engine, example: Encoded, recipe: Recipe, draw: int) -> Request:
    # A seed for every draw: the candidates do not depend on how items are batched.
    digest = hashlib.sha256(f"{recipe.seed} {example.index} {draw}".encode()).digest()
    sampling = Sampling(
        max_tokens=recipe.max_new_tokens or engine.base.context,
        temperature=recipe.negatives.temperature,
        top_p=recipe.negatives.top_p,
        seed=int.from_bytes(digest[:7], "big"),
    )
    prompt = engine.base.prompt_ids(example.item.messages)
    parts = parts_of_reply(engine.base, prompt)
    return Request(prompt=prompt, sampling=sampling, parts=parts, offline=True)


def _is_usable(answer: Completion, example: Encoded) -> bool:
    text = answer.text.strip()
    return bool(text) and text != example.item.completion.strip()


def _least_like_user(
    engine: Engine,
    examples: Sequence[Encoded],
    candidates: Sequence[Sequence[_Candidate]],
    sft: Adapter,
    monitor: Monitor,
) -> list[Pair]:
    """Return a pair with the candidate of the lowest reward for each item that has candidates."""
    sequences = [
        (candidate.prompt_ids, candidate.completion_ids)
        for of_item in candidates
        for candidate in of_item
    ]
    if not sequences:
        return []
    by_sft = engine.score(sequences, sft, monitor.should_stop)
    by_base = engine.score(sequences, None, monitor.should_stop)
    rewards = iter(
        [float((user - base).mean()) for user, base in zip(by_sft, by_base, strict=True)]
    )
    pairs = []
    for example, of_item in zip(examples, candidates, strict=True):
        ranked = [(next(rewards), candidate) for candidate in of_item]
        if ranked:
            reward, candidate = min(ranked, key=lambda pair: pair[0])
            pairs.append(_pair(example, candidate, reward))
    return pairs


def _pair(example: Encoded, negative: _Candidate, reward: float | None = None) -> Pair:
    # Where a template renders two answers' prompts differently, DPO's prompt is what the two
    # share, as in TRL.
    shared = common_prefix(example.prompt_ids, negative.prompt_ids)
    return Pair(
        index=example.index,
        prompt_ids=example.prompt_ids[:shared],
        chosen_ids=example.prompt_ids[shared:] + example.completion_ids,
        rejected_ids=negative.prompt_ids[shared:] + negative.completion_ids,
        rejected=negative.text,
        reward=reward,
    )
