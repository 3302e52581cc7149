"""Forces JSON to close in time: near the token budget only closing tokens stay allowed.

How many tokens closing takes is tried on a copy of the parser, seldom while there is room to spare
and more often as it shrinks. A reserve is kept for what may still be opened meanwhile: an object in
a list, or another call.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from langchain_cope.engine.grammar.json_scan import JsonScan

_SPARE = 8  # tokens kept beside what closing takes
_MOST_TRIED = 768  # tokens of one try to close, at most
_MOST_WAYS = 8  # ways on that are tried one by one, at most
_NEVER = 1 << 30
# Ranks of tokens. While JSON is closed, those of the lowest rank that the grammar allows are left.
_END, _CLOSES, _CONTINUES, _NULL, _OTHER, _STRING, _ARRAY, _OBJECT = range(8)
_RANKS_OUTSIDE = {
    "}": _CONTINUES,
    "]": _CONTINUES,
    ",": _CONTINUES,
    ":": _CONTINUES,
    "n": _NULL,
    "-": _STRING,
    '"': _STRING,
    "[": _ARRAY,
    "{": _OBJECT,
}
"""By the first character of a token outside strings."""
_NUMBER = "0123456789.+-eE"
_SEPARATORS = "@.:/-"  # what most texts of a format have somewhere


class TokenRanks:
    """For each token of a vocabulary how far it leads from the end, within a string and outside."""

    def __init__(self, tokenizer: Any, eos_ids: Collection[int]) -> None:
        """Rank the tokens of `tokenizer`, llguidance's."""
        self.texts: list[str] = [
            tokenizer.decode_str([token]) for token in range(tokenizer.vocab_size)
        ]
        """Text of each token."""
        self.outside = torch.tensor([_rank_outside(text) for text in self.texts], dtype=torch.uint8)
        """Ranks outside JSON strings, uint8 `(V,)`."""
        self.inside = torch.tensor([_rank_inside(text) for text in self.texts], dtype=torch.uint8)
        """Ranks within JSON strings, uint8 `(V,)`."""
        ended = torch.tensor(sorted(eos_ids))
        self.outside[ended] = self.inside[ended] = _END
        self.order = torch.tensor([_order(text) for text in self.texts], dtype=torch.uint8)
        """What is tried first where a string must go on before it may end, uint8 `(V,)`."""


def _rank_outside(text: str) -> int:
    if text and not text.strip("}] \n"):
        return _CLOSES
    return _RANKS_OUTSIDE.get(text.lstrip()[:1], _OTHER)


def _rank_inside(text: str) -> int:
    return _CLOSES if text[:1] == '"' and not text[1:].strip("}]") else _OTHER


def _order(text: str) -> int:
    if len(text) != 1 or not text.isprintable() or not text.isascii():
        return 255
    if text in _SEPARATORS:
        return _SEPARATORS.find(text)
    return 128 if text.isalnum() else 192


def allowed_tokens(matcher: Any) -> Tensor:
    """Return which tokens the grammar allows next: bool `(V,)` on the CPU."""
    return torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8).bool()


class _JsonPosition:
    """Whether the text so far ends in JSON, and where in it."""

    def __init__(self, marked: bool, begin: str, end: str) -> None:
        self._marked = marked
        self._begin, self._end = begin, end
        self.in_json = not marked
        self.scan = JsonScan()
        self._tail = ""

    def copy(self) -> "_JsonPosition":
        other = _JsonPosition(self._marked, self._begin, self._end)
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
    """When to close the JSON of one answer."""

    def __init__(
        self, ranks: TokenRanks, room: int, reserve: int, *, marked: bool, begin: str, end: str
    ) -> None:
        """Close an answer in time.

        Args:
            ranks: of the vocabulary.
            room: number of tokens of the answer, at most.
            reserve: number of tokens that the largest thing takes that may be opened.
            marked: JSON stands between `begin` and `end` in free text, which is never hurried.
            begin: mark before JSON in free text.
            end: mark after it.
        """
        self._ranks = ranks
        self._room = room
        self._reserve = reserve
        self._position = _JsonPosition(marked, begin, end)
        self._is_closing = False
        self._path: list[int] = []
        """The shortest way to the end from here; empty where it is not known."""
        self._next_check = room
        """Room left at which to look ahead again."""

    @property
    def in_json(self) -> bool:
        """Whether the answer so far ends within JSON, marks of a call included."""
        return self._position.in_json

    def safe_prefix(self, draft: list[int]) -> list[int]:
        """Return the beginning of `draft` within which there is no look ahead and no closing."""
        if self._position.in_json:
            return [] if self._is_closing else draft[: max(self._room - self._next_check - 1, 0)]
        for index, token in enumerate(draft):
            if ">" in self._ranks.texts[token]:  # a call may begin there
                return draft[:index]
        return draft

    def push(self, token: int) -> None:
        """Go on with `token`, the answer's next one."""
        self._room -= 1
        self._path = self._path[1:] if self._path[:1] == [token] else []
        was_in_json = self._position.in_json
        self._position.push(self._ranks.texts[token])
        if self._position.in_json and not was_in_json:
            self._next_check = self._room  # a call has begun
        if not self._position.in_json:
            self._is_closing = False

    def look_ahead(self, matcher: Any) -> None:
        """Decide whether the time to close has come; `matcher` is left as it is."""
        if self._is_closing or not self._position.in_json or self._room > self._next_check:
            return
        self._path = self._shortest_path(matcher)
        slack = self._room - len(self._path) - _SPARE - self._reserve
        self._is_closing = slack <= 0
        most_growth = max(self._reserve // 4, 4)  # a token: what opens takes a few of them
        self._next_check = self._room - max(slack // most_growth, 1)

    def restrict(self, allowed: Tensor, matcher: Any) -> Tensor:
        """Return the tokens of `allowed` `(V,)` that lead to the end in time, once JSON must close.

        Before that they are all returned. Where the way parts (values of an enumeration, names of
        tools) the model goes on choosing, among those that still fit.
        """
        if not self._is_closing:
            return allowed
        self._path = self._path or self._shortest_path(matcher)
        first_of_path = self._path[:1]
        if self._path and matcher.compute_ff_tokens():
            return _only(allowed, first_of_path)
        ranks = self._ranks.inside if self._position.scan.in_string else self._ranks.outside
        lowest = allowed & (ranks == ranks[allowed].min())
        tokens = lowest.nonzero().flatten().tolist()
        if not self._path:  # the end may come
            return lowest
        if len(tokens) > _MOST_WAYS:
            left = self._room - len(self._path) - _SPARE
            return lowest if left >= self._reserve else _only(allowed, first_of_path)
        fitting = [token for token in tokens if self._fits(matcher, token)]
        return _only(allowed, fitting or first_of_path)

    def _fits(self, matcher: Any, token: int) -> bool:
        """Return whether the end can be reached with `token` as the next one."""
        return len(self._shortest_path(matcher, [token])) <= self._room

    def _shortest_path(self, matcher: Any, first: Sequence[int] = ()) -> list[int]:
        """Return tokens that lead to the end: `first`, and then only such as close."""
        matcher, position = matcher.deep_copy(), self._position.copy()
        path: list[int] = []
        # Of this string or number: where a token could follow for ever, another one leads out.
        tried: Counter[int] = Counter()
        most = min(self._room, _MOST_TRIED)
        while len(path) <= most and position.in_json and not matcher.is_stopped():
            tokens = first if first and not path else matcher.compute_ff_tokens()
            tokens = list(tokens) or self._closing_token(matcher, position, tried)
            if not tokens:
                break
            matcher.consume_tokens(tokens)
            text = "".join(self._ranks.texts[token] for token in tokens)
            position.push(text)
            path += tokens
            if '"' not in text and (position.scan.in_string or not text.strip(_NUMBER)):
                tried.update(tokens)
            else:
                tried.clear()
        return path

    def _closing_token(
        self, matcher: Any, position: _JsonPosition, tried: Counter[int]
    ) -> list[int]:
        """Return one token of the lowest rank there is; none where the end itself may come."""
        ranks = self._ranks.inside if position.scan.in_string else self._ranks.outside
        allowed = allowed_tokens(matcher)
        if not allowed.any():
            return []
        lowest = ranks[allowed].min()
        if lowest == _END:
            return []
        order = torch.where(allowed & (ranks == lowest), self._ranks.order.int(), _NEVER)
        if tried:
            order[list(tried)] += 256 * torch.tensor(list(tried.values()), dtype=torch.int32)
        return [int(order.argmin())]


def _only(allowed: Tensor, tokens: list[int]) -> Tensor:
    """Return a mask like `allowed` that is true for `tokens` and nothing else."""
    mask = torch.zeros_like(allowed)
    mask[tokens] = True
    return mask
