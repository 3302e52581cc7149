"""JSON brought to its end before the budget is: from some point on only tokens that close what is open are left.

How many tokens that takes is tried on a copy of the parser, seldom while there is room to spare and more often as it shrinks. What
may still be opened meanwhile, an object in a list or another call, takes a reserve.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from langchain_cope.engine.grammar.json_scan import JsonScan

_SPARE = 8  # tokens kept beside what closing takes
_MOST = 768  # tokens tried, at most
# The tokens left are those of the lowest rank that the grammar allows.
_END, _CLOSES, _GOES_ON, _NULL, _OTHER, _STRING, _ARRAY, _OBJECT = range(8)
_MOST_WAYS = 8  # of which each is tried
_NEVER = 1 << 30
_NUMBER = "0123456789.+-eE"
_SEPARATORS = "@.:/-"  # what most texts of a form have somewhere
_OUTSIDE = {
    ",": _GOES_ON,
    ":": _GOES_ON,
    "n": _NULL,
    "-": _STRING,
    '"': _STRING,
    "[": _ARRAY,
    "{": _OBJECT,
}


class TokenRanks:
    """For each token of a vocabulary how far it leads from the end: uint8 ``(V,)``, within a JSON string and outside."""

    def __init__(self, tokenizer: Any, eos_ids: Collection[int]) -> None:
        self.texts: list[str] = [
            tokenizer.decode_str([token]) for token in range(tokenizer.vocab_size)
        ]
        self.outside = torch.tensor([_rank_outside(text) for text in self.texts], dtype=torch.uint8)
        self.inside = torch.tensor([_rank_inside(text) for text in self.texts], dtype=torch.uint8)
        ended = torch.tensor(sorted(eos_ids))
        self.outside[ended] = self.inside[ended] = _END
        self.order = torch.tensor([_order(text) for text in self.texts], dtype=torch.uint8)
        """What is tried first where a string must go on before it may end."""


def _rank_outside(text: str) -> int:
    if text and not text.strip("}] \n"):
        return _CLOSES
    first = text.lstrip()[:1]
    return _GOES_ON if first in ("}", "]") else _OUTSIDE.get(first, _OTHER)


def _order(text: str) -> int:
    if len(text) != 1 or not text.isprintable() or not text.isascii():
        return 255
    return _SEPARATORS.find(text) if text in _SEPARATORS else 128 if text.isalnum() else 192


def _rank_inside(text: str) -> int:
    return _CLOSES if text[:1] == '"' and not text[1:].strip("}]") else _OTHER


class _Place:
    """Whether what was written so far ends in JSON, and where in it."""

    def __init__(self, marked: bool, begin: str, end: str) -> None:
        self._begin, self._end = begin, end
        self._marked = marked
        self.in_json = not marked
        self.scan = JsonScan()
        self._tail = ""

    def copy(self) -> "_Place":
        other = _Place(self._marked, self._begin, self._end)
        other.in_json, other.scan, other._tail = self.in_json, self.scan.copy(), self._tail
        return other

    def push(self, text: str) -> None:
        if not self._marked:
            self.scan.push(text)
            return
        for character in text:
            if self.in_json:
                self.scan.push(character)
            self._tail = (self._tail + character)[-len(self._end) :]
            if not self.in_json and self._tail.endswith(self._begin):
                self.in_json = True
            elif self.in_json and not self.scan.in_string and self._tail.endswith(self._end):
                self.in_json = False


class Closing:
    """When to close, for one answer of ``room`` tokens.

    ``reserve``: tokens that the largest thing takes that may be opened. ``marked``: JSON stands between ``begin`` and ``end`` in
    free text, which itself is never hurried.
    """

    def __init__(
        self, ranks: TokenRanks, room: int, reserve: int, *, marked: bool, begin: str, end: str
    ) -> None:
        self._ranks = ranks
        self._room = room
        self._reserve = reserve
        self._place = _Place(marked, begin, end)
        self._closes = False
        self._path: list[int] = []
        """The shortest way to the end from here, where it is known."""
        self._next_look = room  # room left at which to look ahead again

    @property
    def in_json(self) -> bool:
        """Whether the answer so far ends within JSON, marks of a call included."""
        return self._place.in_json

    def foreseeable(self, draft: list[int]) -> list[int]:
        """The beginning of ``draft`` after none of whose tokens this would look ahead or close."""
        if self._place.in_json:
            return [] if self._closes else draft[: max(self._room - self._next_look - 1, 0)]
        mark = next(
            (place for place, token in enumerate(draft) if ">" in self._ranks.texts[token]),
            len(draft),
        )
        return draft[:mark]  # a call may begin there

    def push(self, token: int) -> None:
        """The answer went on with ``token``."""
        self._room -= 1
        self._path = self._path[1:] if self._path[:1] == [token] else []
        before = self._place.in_json
        self._place.push(self._ranks.texts[token])
        if self._place.in_json and not before:
            self._next_look = self._room  # a call has begun
        if not self._place.in_json:
            self._closes = False

    def look_ahead(self, matcher: Any) -> None:
        """Decide whether the time to close has come; ``matcher`` is left as it is."""
        if self._closes or not self._place.in_json or self._room > self._next_look:
            return
        self._path = self._shortest(matcher)
        slack = self._room - len(self._path) - _SPARE - self._reserve
        self._closes = slack <= 0
        most_growth = max(self._reserve // 4, 4)  # a token: what opens takes a few of them
        self._next_look = self._room - max(slack // most_growth, 1)

    def narrowed(self, allowed: Tensor, matcher: Any) -> Tensor:
        """``allowed`` ``(V,)``, or once it closes those of them that lead to the end in time.

        Where the way parts (values of an enumeration, names of tools) the model goes on choosing, among those that still fit.
        """
        if not self._closes:
            return allowed
        self._path = self._path or self._shortest(matcher)
        if self._path and matcher.compute_ff_tokens():
            return self._only(allowed, self._path[:1])
        ranks = self._ranks.inside if self._place.scan.in_string else self._ranks.outside
        lowest = allowed & (ranks == ranks[allowed].min())
        tokens = lowest.nonzero().flatten().tolist()
        if not self._path:  # the end may come
            return lowest
        if len(tokens) > _MOST_WAYS:
            left = self._room - len(self._path) - _SPARE
            return lowest if left >= self._reserve else self._only(allowed, self._path[:1])
        return self._only(
            allowed, [token for token in tokens if self._fits(matcher, token)] or self._path[:1]
        )

    def _only(self, allowed: Tensor, tokens: list[int]) -> Tensor:
        only = torch.zeros_like(allowed)
        only[tokens] = True
        return only

    def _fits(self, matcher: Any, token: int) -> bool:
        """Whether the end can be reached with ``token`` as the next one."""
        return len(self._shortest(matcher, [token])) <= self._room

    def _shortest(self, matcher: Any, first: Sequence[int] = ()) -> list[int]:
        """Tokens to the end, ``first`` and then only such as close."""
        matcher, place = matcher.deep_copy(), self._place.copy()
        path: list[int] = []
        # In this string or number: where something could go on for ever, something else leads out of it.
        tried: Counter[int] = Counter()
        while len(path) <= min(self._room, _MOST) and place.in_json and not matcher.is_stopped():
            tokens = first if not path and first else matcher.compute_ff_tokens()
            tokens = list(tokens) or self._closing_token(matcher, place, tried)
            if not tokens:
                break
            matcher.consume_tokens(tokens)
            text = "".join(self._ranks.texts[token] for token in tokens)
            place.push(text)
            path += tokens
            if '"' not in text and (place.scan.in_string or not text.strip(_NUMBER)):
                tried.update(tokens)
            else:
                tried.clear()
        return path

    def _closing_token(self, matcher: Any, place: _Place, tried: Counter[int]) -> list[int]:
        """One token of the lowest rank there is; none where the end itself may come."""
        ranks = self._ranks.inside if place.scan.in_string else self._ranks.outside
        allowed = torch.frombuffer(
            bytearray(matcher.compute_logit_bias()), dtype=torch.uint8
        ).bool()
        if not allowed.any():
            return []
        lowest = ranks[allowed].min()
        if lowest == _END:
            return []
        order = torch.where(allowed & (ranks == lowest), self._ranks.order.int(), _NEVER)
        if tried:
            order[list(tried)] += 256 * torch.tensor(list(tried.values()), dtype=torch.int32)
        return [int(order.argmin())]
