"""The pairs that DPO trains on: what the user wrote, and an answer unlike the user.

Where the history says what was rejected, that is taken as it is. For all other items it is mined:
of a few answers that the base samples, the one least like the user. The reward of an answer y to a
prompt x is the mean over its tokens of `log π_SFT(y|x) − log π_base(y|x)`, in nats (Bu et al.,
EMNLP 2025, with α = 1); the lowest becomes the rejected side.
"""

import hashlib
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import islice

from langchain_cope.engine import Adapter, Base, Completion, Engine, Request, Sampling
from langchain_cope.training.encode import (
    Encoded,
    closing_ids,
    common_prefix,
    encode,
    encode_candidate,
    parts_of_reply,
)
from langchain_cope.training.progress import Monitor
from langchain_cope.training.recipe import Negatives, Recipe

NEAR_COPY = 0.8  # share of the tokens of both that are the same, in the same order
ITEMS_A_BATCH = 8  # items of which candidates are scored together; a step of the stage


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
    chosen_base_log_prob: float | None = None
    """Nats, summed over `chosen_ids` after `prompt_ids`, under the base; None: not computed."""
    rejected_base_log_prob: float | None = None
    """Likewise of `rejected_ids`."""


@dataclass(frozen=True)
class _Candidate:
    text: str
    prompt_ids: list[int]
    completion_ids: list[int]
    base_log_probs: list[float] | None = None
    """Nats, of each token of the completion under the base; None: not known."""


def make_pairs(
    engine: Engine, examples: Sequence[Encoded], recipe: Recipe, sft: Adapter, monitor: Monitor
) -> tuple[list[Pair], list[str]]:
    """Return the pairs of all items in order, and in words for people what was left out.

    They are the pairs that the history gives, and a mined one for every item without any, unless
    the recipe mines none.
    """
    mined: list[Pair] = []
    mining_notes: list[str] = []
    if recipe.negatives is not None:
        unpaired = [example for example in examples if not example.item.rejected]
        mined, mining_notes = mine_negatives(engine, unpaired, recipe, sft, monitor)
    ready, notes = given_pairs(engine.base, examples, recipe)
    ready = with_base_log_probs(engine, ready, monitor)
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
    against the adapter `sft`. Empty ones and near-copies of the user's own text are dropped; one
    cut at the limit is scored, and trained on, without the end of the turn. The recipe must have
    `negatives` and `max_new_tokens`. Raises `Cancelled` within one forward of the model after
    `monitor` asks for a stop.
    """
    pairs: list[Pair] = []
    num_usable, number = 0, _settings(recipe).candidates
    after_end = tuple(closing_ids(engine.base)[1:])
    requests = (
        request
        for example in examples
        for request in _requests(engine.base, example, recipe, after_end)
    )
    # All items are answered in one run; those that are done are scored meanwhile.
    with closing(engine.generate_each(requests, monitor.should_stop)) as answers:
        for start in range(0, len(examples), ITEMS_A_BATCH):
            monitor.raise_if_stopped()
            batch = examples[start : start + ITEMS_A_BATCH]
            candidates = [
                _candidates(engine.base, example, list(islice(answers, number)), recipe)
                for example in batch
            ]
            num_usable += sum(len(of_item) for of_item in candidates)
            pairs += _least_like_user(engine, batch, candidates, sft, monitor)
            monitor.step_done(start + len(batch), len(examples))
    num_sampled = number * len(examples)
    notes = []
    if num_usable < num_sampled:
        notes.append(
            f"{num_sampled - num_usable} of {num_sampled} candidates dropped: "
            "empty or nearly the user's own text"
        )
    if len(pairs) < len(examples):
        num_skipped = len(examples) - len(pairs)
        notes.append(f"{num_skipped} of {len(examples)} items skip DPO: no usable candidate")
    return pairs, notes


def _settings(recipe: Recipe) -> Negatives:
    if recipe.negatives is None:
        raise ValueError("the recipe mines no negatives: Recipe.negatives is None")
    return recipe.negatives


def _requests(
    base: Base, example: Encoded, recipe: Recipe, after_end: tuple[int, ...]
) -> list[Request]:
    """Return a request for each candidate of an item; `after_end` follows the end of its turn."""
    prompt = base.prompt_ids(example.item.messages)
    parts = parts_of_reply(base, prompt)
    settings = _settings(recipe)
    requests = []
    for draw in range(settings.candidates):
        # A seed for every draw: the candidates do not depend on how items are batched.
        digest = hashlib.sha256(f"{recipe.seed} {example.index} {draw}".encode()).digest()
        sampling = Sampling(
            max_tokens=recipe.max_new_tokens or base.context,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=int.from_bytes(digest[:7], "big"),
        )
        requests.append(
            Request(
                prompt,
                sampling=sampling,
                logprobs=True,
                closing=after_end,
                parts=parts,
                offline=True,
            )
        )
    return requests


def _candidates(
    base: Base, example: Encoded, answers: Sequence[Completion], recipe: Recipe
) -> list[_Candidate]:
    """Return the usable ones of an item's answers."""
    limit = min(recipe.max_length, base.context)
    prompt = base.prompt_ids(example.item.messages)
    usable = []
    for answer in answers:
        own = example.item.completion
        if not answer.text.strip() or is_near_copy(base, answer.text, own):
            continue
        closed = answer.finish_reason == "stop"
        prompt_ids, completion_ids = encode_candidate(
            base, example, answer.text, limit, closed=closed
        )
        if completion_ids:
            by_base = _sampled_log_probs(answer, prompt, prompt_ids, completion_ids)
            usable.append(_Candidate(answer.text, prompt_ids, completion_ids, by_base))
    return usable


def _sampled_log_probs(
    answer: Completion, prompt: list[int], prompt_ids: list[int], completion_ids: list[int]
) -> list[float] | None:
    """Return the base's log-probabilities of `completion_ids`, as they were when it sampled them.

    None where the trainers see the answer to `prompt` as other tokens than were sampled.
    """
    seen = prompt_ids + completion_ids
    sampled = prompt + [token.token_id for token in answer.logprobs]
    if len(prompt_ids) < len(prompt) or sampled[: len(seen)] != seen:
        return None
    by_base = [token.log_p_base for token in answer.logprobs]
    return by_base[len(prompt_ids) - len(prompt) : len(seen) - len(prompt)]


def is_near_copy(base: Base, text: str, own: str) -> bool:
    """Return whether `text` is `own` but for a few tokens, which tell it in every language.

    As the rejected side it would have DPO unlearn what the user wrote.
    """
    ids, own_ids = (
        base.tokenizer(each.strip(), add_special_tokens=False, verbose=False)["input_ids"]
        for each in (text, own)
    )
    return SequenceMatcher(None, ids, own_ids, autojunk=False).ratio() >= NEAR_COPY


def _least_like_user(
    engine: Engine,
    examples: Sequence[Encoded],
    candidates: Sequence[Sequence[_Candidate]],
    sft: Adapter,
    monitor: Monitor,
) -> list[Pair]:
    """Return a pair with the candidate of the lowest reward for each item that has candidates."""
    flat = [candidate for of_item in candidates for candidate in of_item]
    sequences = [(candidate.prompt_ids, candidate.completion_ids) for candidate in flat]
    by_sft = engine.score(sequences, sft, monitor.should_stop)
    others = [index for index, each in enumerate(flat) if each.base_log_probs is None]
    scored = engine.score([sequences[index] for index in others], None, monitor.should_stop)
    by_base = {index: tensor.tolist() for index, tensor in zip(others, scored, strict=True)}
    ranked = iter(
        [
            _rank(candidate, user.tolist(), by_base.get(index))
            for index, (candidate, user) in enumerate(zip(flat, by_sft, strict=True))
        ]
    )
    pairs = []
    for example, of_item in zip(examples, candidates, strict=True):
        if of_item:
            reward, candidate = min(islice(ranked, len(of_item)), key=lambda pair: pair[0])
            pairs.append(_pair(example, candidate, reward))
    return with_base_log_probs(engine, pairs, monitor)


def _rank(
    candidate: _Candidate, by_sft: list[float], by_base: list[float] | None
) -> tuple[float, _Candidate]:
    """Return the reward of a candidate, and the candidate with its log-probabilities."""
    base = candidate.base_log_probs or by_base or []
    reward = math.fsum(user - of_base for user, of_base in zip(by_sft, base, strict=True)) / len(
        by_sft
    )
    return reward, replace(candidate, base_log_probs=base)


def with_base_log_probs(engine: Engine, pairs: Sequence[Pair], monitor: Monitor) -> list[Pair]:
    """Return the pairs with the log-probabilities of both sides, those that lack them scored."""
    missing: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    for pair in pairs:
        for ids, known in (
            (pair.chosen_ids, pair.chosen_base_log_prob),
            (pair.rejected_ids, pair.rejected_base_log_prob),
        ):
            if known is None:
                missing[tuple(pair.prompt_ids), tuple(ids)] = math.nan
    scores = engine.score(list(missing), None, monitor.should_stop)
    sums = dict(zip(missing, (math.fsum(score.tolist()) for score in scores), strict=True))

    def log_prob(pair: Pair, ids: list[int], known: float | None) -> float:
        return sums[tuple(pair.prompt_ids), tuple(ids)] if known is None else known

    return [
        replace(
            pair,
            chosen_base_log_prob=log_prob(pair, pair.chosen_ids, pair.chosen_base_log_prob),
            rejected_base_log_prob=log_prob(pair, pair.rejected_ids, pair.rejected_base_log_prob),
        )
        for pair in pairs
    ]


def _pair(example: Encoded, negative: _Candidate, reward: float | None = None) -> Pair:
    # Where a template renders two answers' prompts differently, DPO's prompt is what the two
    # share, as in TRL.
    shared = common_prefix(example.prompt_ids, negative.prompt_ids)
    known = negative.base_log_probs if shared == len(negative.prompt_ids) else None
    return Pair(
        index=example.index,
        prompt_ids=example.prompt_ids[:shared],
        chosen_ids=example.prompt_ids[shared:] + example.completion_ids,
        rejected_ids=negative.prompt_ids[shared:] + negative.completion_ids,
        rejected=negative.text,
        reward=reward,
        rejected_base_log_prob=math.fsum(known) if known else None,
    )
