"""From an item of a user's history to the token ids that training and evaluation work on.

One rule serves both trainers, mining and evaluation: the chat template renders the prompt alone and
the whole conversation; where the two part, the completion begins (TRL's common-prefix rule), and it
holds what the template adds after the text, the end of the turn included. What does not fit is cut
here and reported, never by a trainer in silence.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from langchain_cope.engine import Base, Message, ReplyParts
from langchain_cope.history.items import Item

_WORD = re.compile(r"\S+")
# More than any text has: what is beyond that need not be tokenized to be cut.
CHARACTERS_A_TOKEN = 100
# A prompt gives way to a long completion down to this fraction (a quarter) of the limit.
SMALLEST_PROMPT_SHARE = 4


@dataclass(frozen=True)
class Encoded:
    """An item as token ids: `prompt_ids + completion_ids` is what the trainers see."""

    index: int
    """Index of the item in the list that was encoded."""
    item: Item
    """The item as it was cut, its prompt as messages."""
    prompt_ids: list[int]
    completion_ids: list[int]
    cuts: frozenset[str] = frozenset()
    """What was cut: any of "characters", "words", "prompt" and "completion".

    Characters: a field was far longer than its tokens could be; words: it was longer than the
    recipe's `max_words`.
    """


def encode(base: Base, messages: Sequence[Message], completion: str) -> tuple[list[int], list[int]]:
    """Return prompt and completion as token ids by the common-prefix rule, nothing cut.

    Their concatenation is the whole conversation in the chat template. Where a template renders the
    end of the prompt otherwise once an answer follows, the prompt ends where the two part.
    """
    prompt = base.prompt_ids(list(messages))
    conversation = base.conversation_ids([*messages, {"role": "assistant", "content": completion}])
    shared = common_prefix(prompt, conversation)
    return conversation[:shared], conversation[shared:]


def common_prefix(ids: Sequence[int], other: Sequence[int]) -> int:
    """Return how many leading ids the two have in common."""
    for index, (one, another) in enumerate(zip(ids, other, strict=False)):
        if one != another:
            return index
    return min(len(ids), len(other))


def closing_ids(base: Base) -> list[int]:
    """Return what the chat template puts after an answer's text, the end of the turn included."""
    user: Message = {"role": "user", "content": "a"}
    first, second = (
        base.conversation_ids([user, {"role": "assistant", "content": text}]) for text in ("x", "7")
    )
    length = common_prefix(first[::-1], second[::-1])
    return first[len(first) - length :]


def parts_of_reply(base: Base, prompt: Sequence[int]) -> ReplyParts:
    """Return how a reply to `prompt` is taken apart: as in a chat, thoughts are not its text."""
    return ReplyParts(opened=base.thought_opened_by(prompt))


def encode_candidate(
    base: Base, example: Encoded, text: str, limit: int, *, closed: bool
) -> tuple[list[int], list[int]]:
    """Return a sampled answer to the prompt of `example` as the trainers would see it.

    Not `closed`: without the end of the turn. Cut where prompt and answer exceed `limit` tokens.
    """
    prompt, completion = encode(base, example.item.messages, text)
    if not closed:
        closing = closing_ids(base)
        if closing and completion[-len(closing) :] == closing:
            completion = completion[: -len(closing)]
    return prompt, completion[: limit - len(prompt)]


def usual_length(examples: Sequence[Encoded]) -> int:
    """Return the tokens of the longest completion, but not far more than 19 of 20 have.

    A quarter more at most: one essay among short replies would otherwise let every answer that
    never ends run as long.
    """
    lengths = sorted(len(example.completion_ids) for example in examples) or [1]
    of_most = lengths[math.ceil(0.95 * len(lengths)) - 1]
    return min(lengths[-1], math.ceil(1.25 * of_most))


def fit(
    base: Base, items: Sequence[Item], max_length: int, max_words: int
) -> tuple[list[Encoded], list[str]]:
    """Return the items as token ids, and in words for people what was cut.

    Prompt and completion fit `min(max_length, base.context)` tokens. Each field keeps its first
    `max_words` words. A prompt that leaves too little room loses its oldest turns, then the end of
    its last message; a completion that is still too long loses its end (and then has no end of
    turn). An item of which no token of the completion is left is dropped.
    """
    limit = min(max_length, base.context)
    examples = []
    for index, item in enumerate(items):
        example = _fit_one(base, index, item, limit, max_words)
        if example.prompt_ids and example.completion_ids:
            examples.append(example)
    return examples, _notes(examples, len(items), limit, max_words)


def _fit_one(base: Base, index: int, item: Item, limit: int, max_words: int) -> Encoded:
    cuts = set()
    whole = _each_text(item, lambda text: text)
    short = _each_text(whole, lambda text: text[: limit * CHARACTERS_A_TOKEN])
    if short != whole:
        cuts.add("characters")
    cut = _each_text(short, lambda text: _first_words(text, max_words))
    if cut != short:
        cuts.add("words")
    prompt_ids, completion_ids = encode(base, cut.messages, cut.completion)
    if len(prompt_ids) + len(completion_ids) > limit:
        room = max(limit - len(completion_ids), limit // SMALLEST_PROMPT_SHARE)
        shortened = _shorten(base, cut.messages, room)
        if shortened != cut.messages:
            cuts.add("prompt")
            cut = cut.model_copy(update={"prompt": shortened})
            prompt_ids, completion_ids = encode(base, cut.messages, cut.completion)
        if len(prompt_ids) + len(completion_ids) > limit:
            cuts.add("completion")
            completion_ids = completion_ids[: max(0, limit - len(prompt_ids))]
    return Encoded(index, cut, prompt_ids, completion_ids, frozenset(cuts))


def _each_text(item: Item, change: Callable[[str], str]) -> Item:
    """Return `item` with `change` applied to each of its texts, its prompt as messages."""
    changed = {
        "prompt": [{**message, "content": change(message["content"])} for message in item.messages],
        "completion": change(item.completion),
        "rejected": tuple(change(answer) for answer in item.rejected),
    }
    return item.model_copy(update=changed)


def _first_words(text: str, max_words: int) -> str:
    for number, word in enumerate(_WORD.finditer(text), start=1):
        if number > max_words:
            return text[: word.start()].rstrip()
    return text


def _shorten(base: Base, messages: list[Message], room: int) -> list[Message]:
    """Return the end of a conversation within `room` tokens.

    The oldest turns go first, then the end of the last message.
    """

    def fits(shorter: list[Message]) -> bool:
        return len(base.prompt_ids(shorter)) <= room

    system = [message for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]
    while len(turns) > 1 and not fits([*system, *turns]):
        turns = turns[1:]
        # Templates want a conversation to open with the user.
        while len(turns) > 1 and turns[0]["role"] != "user":
            turns = turns[1:]
    if fits([*system, *turns]):
        return [*system, *turns]
    last = turns[-1] if turns else system[-1]
    before: list[Message] = []
    if fits([*system, {**last, "content": ""}]):
        before = [*system, *turns][:-1]
    # Bisect the characters of the last message: `low` fit, or are none; more than `high` do not.
    low, high = 0, len(last["content"])
    while low < high:
        middle = (low + high + 1) // 2
        if fits([*before, {**last, "content": last["content"][:middle]}]):
            low = middle
        else:
            high = middle - 1
    return [*before, {**last, "content": last["content"][:low]}]


def _notes(examples: Sequence[Encoded], num_items: int, limit: int, max_words: int) -> list[str]:
    """Return in words for people what was cut and how much was dropped."""
    counts = Counter(cut for example in examples for cut in example.cuts)
    characters = limit * CHARACTERS_A_TOKEN
    meanings = {
        "characters": f"had a field of more than {characters} characters, cut there",
        "words": f"had a field of more than {max_words} words, cut there",
        "prompt": f"had a prompt too long for {limit} tokens in all, cut",
        "completion": f"had a completion too long for {limit} tokens in all, "
        "cut without its end of turn",
    }
    notes = [
        f"{counts[cut]} of {num_items} items {meaning}"
        for cut, meaning in meanings.items()
        if counts[cut]
    ]
    num_dropped = num_items - len(examples)
    if num_dropped:
        notes.append(
            f"{num_dropped} of {num_items} items dropped: "
            f"the chat template alone fills {limit} tokens"
        )
    return notes
