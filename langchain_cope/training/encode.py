"""From an item of a user's history to the token ids that everything here works on.

One rule serves both trainers, mining and evaluation: the chat template renders the prompt alone and the whole conversation; where
the two part, the completion begins (TRL's common-prefix rule), and it holds what the template adds after the text, the end of the
turn included. What does not fit is cut here and said, never by a trainer in silence.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from langchain_cope.engine import Base, Message

_WORD = re.compile(r"\S+")
CHARACTERS_A_TOKEN = (
    100  # more than any text has; what is beyond that need not be tokenized to be cut
)
SMALLEST_PROMPT_SHARE = (
    4  # a prompt gives way to a long completion down to this fraction (a quarter) of the limit
)


@dataclass(frozen=True)
class Example:
    """One item of a history: what was asked, as messages, and what the user wrote."""

    prompt: list[Message]
    completion: str
    rejected: tuple[str, ...] = ()
    """Answers that the user liked less: DPO's other sides, in place of a mined one."""


@dataclass(frozen=True)
class Encoded:
    """An example as token ids, ``prompt_ids + completion_ids`` being what the trainers see."""

    index: int
    """Place of the example among those given."""
    example: Example
    """The example as it was cut."""
    prompt_ids: list[int]
    completion_ids: list[int]
    cuts: frozenset[str] = frozenset()
    """What was cut: "characters" (a field was far longer than its tokens could be), "words" (longer than the recipe's
    ``max_words``), "prompt", "completion"."""


def encode(base: Base, messages: Sequence[Message], completion: str) -> tuple[list[int], list[int]]:
    """Prompt and completion as token ids by the common-prefix rule, nothing cut.

    Their concatenation is the whole conversation in the chat template. Where a template renders the end of the prompt
    otherwise once an answer follows, the prompt ends where the two part.
    """
    prompt = base.prompt_ids(list(messages))
    whole = base.conversation_ids([*messages, {"role": "assistant", "content": completion}])
    shared = common_prefix(prompt, whole)
    return whole[:shared], whole[shared:]


def common_prefix(ids: Sequence[int], other: Sequence[int]) -> int:
    """How many leading ids the two have in common."""
    return next(
        (i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b),
        min(len(ids), len(other)),
    )


def closing_ids(base: Base) -> list[int]:
    """What the chat template puts after an answer's text: the end of the turn and anything that trails it."""
    user: Message = {"role": "user", "content": "a"}
    first, second = (
        base.conversation_ids([user, {"role": "assistant", "content": text}]) for text in ("x", "7")
    )
    length = common_prefix(first[::-1], second[::-1])
    return first[len(first) - length :]


def encode_candidate(
    base: Base, item: Encoded, text: str, limit: int, *, closed: bool
) -> tuple[list[int], list[int]]:
    """A sampled answer to ``item``'s prompt, as the trainers would see it; not ``closed``: without the end of the turn.

    Cut where prompt and answer exceed ``limit`` tokens.
    """
    prompt, completion = encode(base, item.example.prompt, text)
    if not closed and (closing := closing_ids(base)) and completion[-len(closing) :] == closing:
        completion = completion[: -len(closing)]
    return prompt, completion[: limit - len(prompt)]


def fit(
    base: Base, examples: Sequence[Example], max_length: int, max_words: int
) -> tuple[list[Encoded], list[str]]:
    """The examples as token ids within ``min(max_length, base.context)``, and what had to be cut, in words for people.

    Each field keeps its first ``max_words`` words. A prompt that leaves too little room loses its oldest turns, then the end of
    its last message; a completion that is still too long loses its end (and then has no end of turn). An example of which
    no token of the completion is left is dropped.
    """
    limit = min(max_length, base.context)
    encoded = [
        _fit_one(base, index, example, limit, max_words) for index, example in enumerate(examples)
    ]
    kept = [item for item in encoded if item.prompt_ids and item.completion_ids]
    return kept, _say(kept, len(examples), limit, max_words)


def _fit_one(base: Base, index: int, example: Example, limit: int, max_words: int) -> Encoded:
    whole = replace(example, prompt=list(example.prompt))
    short = _each_text(whole, lambda text: text[: limit * CHARACTERS_A_TOKEN])
    cut = _each_text(short, lambda text: _first_words(text, max_words))
    cuts = {"characters"} if short != whole else set()
    cuts |= {"words"} if cut != short else set()
    prompt_ids, completion_ids = encode(base, cut.prompt, cut.completion)
    if len(prompt_ids) + len(completion_ids) > limit:
        room = max(limit - len(completion_ids), limit // SMALLEST_PROMPT_SHARE)
        shortened = _shorten(base, cut.prompt, room)
        if shortened != cut.prompt:
            cuts.add("prompt")
            cut = replace(cut, prompt=shortened)
            prompt_ids, completion_ids = encode(base, cut.prompt, cut.completion)
        if len(prompt_ids) + len(completion_ids) > limit:
            cuts.add("completion")
            completion_ids = completion_ids[: max(0, limit - len(prompt_ids))]
    return Encoded(index, cut, prompt_ids, completion_ids, frozenset(cuts))


def _each_text(example: Example, change: Callable[[str], str]) -> Example:
    prompt: list[Message] = [
        {**message, "content": change(message["content"])} for message in example.prompt
    ]
    return Example(prompt, change(example.completion), tuple(map(change, example.rejected)))


def _first_words(text: str, max_words: int) -> str:
    for number, word in enumerate(_WORD.finditer(text), start=1):
        if number > max_words:
            return text[: word.start()].rstrip()
    return text


def _shorten(base: Base, messages: list[Message], room: int) -> list[Message]:
    """The conversation's end within ``room`` tokens: oldest turns go first, then the end of the last message."""

    def fits(shorter: list[Message]) -> bool:
        return len(base.prompt_ids(shorter)) <= room

    system = [message for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]
    while len(turns) > 1 and not fits([*system, *turns]):
        turns = turns[1:]
        while (
            len(turns) > 1 and turns[0]["role"] != "user"
        ):  # templates want a conversation to open with the user
            turns = turns[1:]
    if fits([*system, *turns]):
        return [*system, *turns]
    last = turns[-1] if turns else system[-1]
    kept = [*system, *turns][:-1] if fits([*system, {**last, "content": ""}]) else []
    low, high = (
        0,
        len(last["content"]),
    )  # characters of the last message: `low` fits or is 0, more than `high` does not
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high)
            if fits([*kept, {**last, "content": last["content"][:middle]}])
            else (low, middle - 1)
        )
    return [*kept, {**last, "content": last["content"][:low]}]


def _say(kept: Sequence[Encoded], num_examples: int, limit: int, max_words: int) -> list[str]:
    counts = Counter(cut for item in kept for cut in item.cuts)
    meanings = {
        "characters": f"had a field of more than {limit * CHARACTERS_A_TOKEN} characters, cut there",
        "words": f"had a field of more than {max_words} words, cut there",
        "prompt": f"had a prompt too long for {limit} tokens in all, cut",
        "completion": f"had a completion too long for {limit} tokens in all, cut without its end of turn",
    }
    said = [
        f"{counts[cut]} of {num_examples} items {meaning}"
        for cut, meaning in meanings.items()
        if counts[cut]
    ]
    if len(kept) < num_examples:
        said.append(
            f"{num_examples - len(kept)} of {num_examples} items dropped: the chat template alone fills {limit} tokens"
        )
    return said
