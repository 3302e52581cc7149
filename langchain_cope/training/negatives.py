"""The pairs that DPO trains on: what the user wrote, and an answer that the user rejected or would not have written.

Where the history says what was rejected, that is taken as it is. For all other items it is mined: of a few answers that the base
gives, the one least like the user. The reward of an answer is the mean over its tokens of ``log π_SFT − log π_base``; the lowest
becomes the rejected side of a pair.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from langchain_cope.engine import Adapter, Base, Completion, Engine, Request, Sampling
from langchain_cope.training.encode import Encoded, common_prefix, encode, encode_candidate
from langchain_cope.training.progress import Watch
from langchain_cope.training.recipe import Recipe

ITEMS_A_BATCH = 16  # whose candidates are sampled together; between two batches progress is said


@dataclass(frozen=True)
class Pair:
    """An item with its negative, as DPO trains on it."""

    index: int
    """Place of the item in the history."""
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    rejected: str
    """The negative as text."""
    reward: float | None = None
    """Of a mined negative: mean nats a token by which SFT finds it likelier than the base does."""


@dataclass(frozen=True)
class _Candidate:
    text: str
    prompt_ids: list[int]
    completion_ids: list[int]


def make_pairs(
    engine: Engine, items: Sequence[Encoded], recipe: Recipe, sft: Adapter, watch: Watch
) -> tuple[list[Pair], list[str]]:
    """The pairs of all items, in order: those that are given, and a mined one for every item of which none is."""
    unpaired = [item for item in items if not item.example.rejected]
    mined, notes = mine_negatives(engine, unpaired, recipe, sft, watch)
    given, also = given_pairs(engine.base, items, recipe)
    return sorted([*mined, *given], key=lambda pair: pair.index), [*notes, *also]


def given_pairs(
    base: Base, items: Sequence[Encoded], recipe: Recipe
) -> tuple[list[Pair], list[str]]:
    """A pair for every answer that the items say was rejected, in order, and in words for people what was left out.

    A rejected answer is cut like a completion: where it fills the room, it has no end of the turn.
    """
    limit = min(recipe.max_length, base.context)
    pairs = []
    for item in items:
        for text in item.example.rejected:
            prompt_ids, whole = encode(base, item.example.prompt, text)
            completion_ids = whole[: max(0, limit - len(prompt_ids))]
            if completion_ids:
                pairs.append(_pair(item, _Candidate(text, prompt_ids, completion_ids)))
    num_given = sum(len(item.example.rejected) for item in items)
    said = [
        f"{num_given} pairs of a chosen and a rejected answer were given; no negative is mined for their items"
    ]
    dropped = [
        f"{num_given - len(pairs)} of them dropped: the prompt leaves no room for the rejected answer"
    ]
    return pairs, said * (num_given > 0) + dropped * (len(pairs) < num_given)


def mine_negatives(
    engine: Engine, items: Sequence[Encoded], recipe: Recipe, sft: Adapter, watch: Watch
) -> tuple[list[Pair], list[str]]:
    """A pair for every item that has a usable candidate, in order, and in words for people what was left out.

    Sampled from the base, scored against the adapter ``sft``. Empty candidates and copies of the user's own text are dropped;
    one cut at the limit is scored, and trained on, without the end of the turn. Needs ``recipe.max_new_tokens``.
    Raises ``Cancelled`` within one forward of the model after ``watch`` says so.
    """
    pairs: list[Pair] = []
    num_dropped = 0
    for start in range(0, len(items), ITEMS_A_BATCH):
        watch.raise_if_stopped()
        batch = items[start : start + ITEMS_A_BATCH]
        candidates = _sample(engine, batch, recipe, watch)
        num_dropped += recipe.negatives.candidates * len(batch) - sum(map(len, candidates))
        pairs += _least_like_user(engine, batch, candidates, sft, watch)
        watch.report(start + len(batch), len(items))
    said = [
        f"{num_dropped} of {recipe.negatives.candidates * len(items)} candidates dropped: empty or the user's own text"
    ]
    skipped = [f"{len(items) - len(pairs)} of {len(items)} items skip DPO: no usable candidate"]
    return pairs, said * (num_dropped > 0) + skipped * (len(pairs) < len(items))


def _sample(
    engine: Engine, items: Sequence[Encoded], recipe: Recipe, watch: Watch
) -> list[list[_Candidate]]:
    """Usable candidates of each item."""
    number = recipe.negatives.candidates
    requests = [_request(engine, item, recipe, draw) for item in items for draw in range(number)]
    answers = engine.generate(requests, watch.should_stop)
    limit = min(recipe.max_length, engine.base.context)
    found = []
    for place, item in enumerate(items):
        usable = [a for a in answers[place * number : (place + 1) * number] if _usable(a, item)]
        encoded = [
            encode_candidate(engine.base, item, a.text, limit, closed=a.finish_reason == "stop")
            for a in usable
        ]
        found.append(
            [_Candidate(a.text, *ids) for a, ids in zip(usable, encoded, strict=True) if ids[1]]
        )
    return found


def _request(engine: Engine, item: Encoded, recipe: Recipe, draw: int) -> Request:
    # A seed of its own for every draw: the candidates do not depend on how items are batched.
    seed = int.from_bytes(
        hashlib.sha256(f"{recipe.seed} {item.index} {draw}".encode()).digest()[:7], "big"
    )
    sampling = Sampling(
        max_tokens=recipe.max_new_tokens or engine.base.context,
        temperature=recipe.negatives.temperature,
        top_p=recipe.negatives.top_p,
        seed=seed,
    )
    return Request(
        prompt=engine.base.prompt_ids(item.example.prompt), sampling=sampling, keep_for_reuse=False
    )


def _usable(answer: Completion, item: Encoded) -> bool:
    text = answer.text.strip()
    return bool(text) and text != item.example.completion.strip()


def _least_like_user(
    engine: Engine,
    items: Sequence[Encoded],
    candidates: Sequence[Sequence[_Candidate]],
    sft: Adapter,
    watch: Watch,
) -> list[Pair]:
    sequences = [(c.prompt_ids, c.completion_ids) for several in candidates for c in several]
    if not sequences:
        return []
    scored = zip(
        *(engine.score(sequences, adapter, watch.should_stop) for adapter in (sft, None)),
        strict=True,
    )
    rewards = iter([float((user - base).mean()) for user, base in scored])
    pairs = []
    for item, several in zip(items, candidates, strict=True):
        ranked = [(next(rewards), candidate) for candidate in several]
        if ranked:
            reward, lowest = min(ranked, key=lambda pair: pair[0])
            pairs.append(_pair(item, lowest, reward))
    return pairs


def _pair(item: Encoded, negative: _Candidate, reward: float | None = None) -> Pair:
    # Where a template renders two answers' prompts differently, DPO's prompt is what the two share, as in TRL.
    shared = common_prefix(item.prompt_ids, negative.prompt_ids)
    return Pair(
        index=item.index,
        prompt_ids=item.prompt_ids[:shared],
        chosen_ids=item.prompt_ids[shared:] + item.completion_ids,
        rejected_ids=negative.prompt_ids[shared:] + negative.completion_ids,
        rejected=negative.text,
        reward=reward,
    )
