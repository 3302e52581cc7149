"""Which items are held out, and how a version remembers what it was trained on."""

import base64
import hashlib
from collections.abc import Iterable, Sequence

from langchain_cope.errors import HistoryError
from langchain_cope.history.items import Item

MIN_ITEMS = 5
HELD_OUT_SHARE = 0.2  # of the items
MIN_TRAINED = 3  # what 5 items leave when 2 are held out
LEAST_DIVIDED = 24  # held-out items: so that 16 judge. By 8 one adapter in seven less is published
LEAST_CHOOSING, MOST_CHOOSING = 8, 24  # items to choose a strength by
_MAX_FINGERPRINTS = 30_000  # of the newest items, the likeliest to be held out another time
_FINGERPRINT_BYTES = 4  # of an item's digest: enough to recognise it, too little to guess it from


def split(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """Return the items to train on and the held-out ones, both oldest first.

    Held out are the newest `max(2, round(0.2 n))` of n items. All items of a conversation fall on
    one side, so that more are held out where the border would cut one.

    Raises `HistoryError` for fewer than 5 items, and where conversations leave fewer than 3 to
    train on.
    """
    if len(items) < MIN_ITEMS:
        noun = "item" if len(items) == 1 else "items"
        raise HistoryError(
            f"the history holds {len(items)} different {noun}, and at least {MIN_ITEMS} are needed "
            f"({MIN_TRAINED} to train on and 2 to judge by): collect {MIN_ITEMS - len(items)} more"
        )
    num_newest = max(2, round(HELD_OUT_SHARE * len(items)))
    border = len(items) - num_newest
    cut = {item.conversation for item in items[border:]} - {None}
    trained, held_out = [], []
    for index, item in enumerate(items):
        if index >= border or item.conversation in cut:
            held_out.append(item)
        else:
            trained.append(item)
    if len(trained) < MIN_TRAINED:
        raise HistoryError(
            f"all but {len(trained)} of the history's {len(items)} items belong to the newest "
            f"conversations, which are held out whole; at least {MIN_TRAINED} items of other "
            "conversations are needed to train on: collect more"
        )
    return trained, held_out


def divide(held_out: Sequence[Item]) -> tuple[list[int], list[int]]:
    """Return indices of the held-out items to choose a strength by, and of those that judge.

    A choice flatters the items that it was made by, so that no item does both. To choose by are a
    third of 24 or more, but 8 at least and 24 at most, the oldest; else none. A conversation is
    never divided.
    """
    everything = list(range(len(held_out)))
    border = _num_choosing(len(held_out))
    judging_talks = {item.conversation for item in held_out[border:]} - {None}
    choosing = [
        index for index in everything[:border] if held_out[index].conversation not in judging_talks
    ]
    if len(choosing) < LEAST_CHOOSING:
        return [], everything
    chosen = set(choosing)
    return choosing, [index for index in everything if index not in chosen]


def items_for(num_judging: int, num_items: int) -> int:
    """Return about how many items, more than `num_items`, leave `num_judging` that judge."""
    num_held_out = round(HELD_OUT_SHARE * num_items)
    while num_held_out - _num_choosing(num_held_out) < num_judging:
        num_held_out += 1
    return max(round(num_held_out / HELD_OUT_SHARE), num_items + 1)


def _num_choosing(num_held_out: int) -> int:
    if num_held_out < LEAST_DIVIDED:
        return 0
    return min(MOST_CHOOSING, max(LEAST_CHOOSING, num_held_out // 3))


def fingerprint_items(items: Iterable[Item]) -> str:
    """Return what a version keeps of the items it was trained on.

    These are a few bytes of each one's digest, as base64.
    """
    newest = list(items)[-_MAX_FINGERPRINTS:]
    return base64.b64encode(b"".join(_fingerprint(item) for item in newest)).decode()


def count_trained_on(fingerprints: object, items: Iterable[Item]) -> int:
    """Return how many of `items` a version with those fingerprints was trained on.

    It is 0 where they are not of `fingerprint_items` but, say, another program's metadata.
    """
    if not isinstance(fingerprints, str):
        return 0
    try:
        data = base64.b64decode(fingerprints)
    except ValueError:
        return 0
    starts = range(0, len(data), _FINGERPRINT_BYTES)
    known = {data[start : start + _FINGERPRINT_BYTES] for start in starts}
    return len([item for item in items if _fingerprint(item) in known])


def _fingerprint(item: Item) -> bytes:
    return hashlib.sha256(item.key.encode()).digest()[:_FINGERPRINT_BYTES]
