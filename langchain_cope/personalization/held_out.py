"""Which items are held out, and how a version remembers what it was trained on."""

import base64
import hashlib
from collections.abc import Iterable, Sequence

from langchain_cope.errors import HistoryError
from langchain_cope.history.items import Item

MIN_ITEMS = 5
MIN_TRAINED = 3  # what 5 items leave when 2 are held out
_MAX_MARKED = 30_000  # items; the newest, which are the likeliest to be held out another time
_MARK_BYTES = 4  # of each item's digest: enough to recognise it, too little to guess it from


def split(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """(to train on, held out), both oldest first. The held-out ones are the newest ``max(2, round(0.2 n))``.

    All items of a conversation fall on one side, so that more are held out where the border would cut one.
    Raises ``HistoryError`` for fewer than 5 items, and where conversations leave fewer than 3 to train on.
    """
    if len(items) < MIN_ITEMS:
        raise HistoryError(
            f"the history holds {len(items)} different item{'' if len(items) == 1 else 's'}, and at least {MIN_ITEMS} are needed "
            f"({MIN_TRAINED} to train on and 2 to judge by): collect more"
        )
    num_held_out = max(2, round(0.2 * len(items)))
    newest = {id(item) for item in items[-num_held_out:]}
    cut = {item.conversation for item in items[-num_held_out:]} - {None}
    held_out = [item for item in items if id(item) in newest or item.conversation in cut]
    trained = [item for item in items if id(item) not in newest and item.conversation not in cut]
    if len(trained) < MIN_TRAINED:
        raise HistoryError(
            f"all but {len(trained)} of the history's {len(items)} items belong to the newest conversations, which are held out "
            f"whole; at least {MIN_TRAINED} items of other conversations are needed to train on"
        )
    return trained, held_out


def mark(items: Iterable[Item]) -> str:
    """What a version keeps of the items it was trained on: a few bytes of each one's digest, as base64."""
    newest = list(items)[-_MAX_MARKED:]
    return base64.b64encode(b"".join(_digest(item) for item in newest)).decode()


def overlap(marked: object, items: Iterable[Item]) -> int:
    """How many of ``items`` a version with that mark was trained on."""
    if not isinstance(marked, str):
        return 0
    try:
        data = base64.b64decode(marked)
    except ValueError:  # another program's metadata
        return 0
    known = {data[start : start + _MARK_BYTES] for start in range(0, len(data), _MARK_BYTES)}
    return sum(_digest(item) in known for item in items)


def _digest(item: Item) -> bytes:
    return hashlib.sha256(item.key.encode()).digest()[:_MARK_BYTES]
