"""Speculation without a draft model: what the answer may quote is looked up, and checked in one forward.

`PromptLookup` proposes for one request what followed the newest tokens where they stood before: in the user's recent texts, in the
prompt or in the answer itself. `Speculation` decides how many tokens are worth checking, from how often proposals came true and how
long forwards of different sizes took. Proposals that are not checked are still compared with what came, which costs nothing.
"""

from collections.abc import Iterable, Sequence

LONGEST, SHORTEST = 3, 2  # tokens that must have stood together before
MAX_DRAFT = 8  # tokens proposed at a time
_LENGTHS = (1, 2, 4, MAX_DRAFT)
_TREND = 0.2  # weight of the newest observation
_GAIN = 1.25  # what a draft must promise: timings and hit rates are estimates, and a wrong guess costs everyone in the step
_FORGET = 256  # observations after which timings of other sizes are taken afresh
_TOKENS_FOR_DOUBLE = 32  # a first guess: this many tokens more take as long again


class PromptLookup:
    """What may come next in one answer to ``tokens``, of which there is at least one."""

    def __init__(self, tokens: Iterable[int], hit_rate: float) -> None:
        """``hit_rate``: how often proposals come true, as a first guess."""
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        """Where each short run of tokens went on, the newest time."""
        self._at: int | None = None
        """Where the next token may stand."""
        self.hit_rate = hit_rate
        """How often the first token proposed was the one that came, lately."""
        self.num_proposed = 0
        *before, last = tokens
        self._tokens += before
        for size in range(SHORTEST, LONGEST + 1):  # in bulk, for this is done while others wait
            runs = zip(*(before[start:] for start in range(size)), strict=False)
            self._after.update(zip(runs, range(size, len(before) + 1), strict=False))
        self._add(last)

    def push(self, token: int) -> None:
        """The answer went on with ``token``."""
        if self._at is not None:
            self.num_proposed += 1
            self.hit_rate += _TREND * ((token == self._tokens[self._at]) - self.hit_rate)
        self._add(token)

    def propose(self, most: int) -> list[int]:
        """Up to ``most`` tokens that may come next."""
        return [] if self._at is None else self._tokens[self._at : self._at + most]

    def _add(self, token: int) -> None:
        follows = self._at is not None and self._tokens[self._at] == token
        self._tokens.append(token)
        runs = [
            tuple(self._tokens[-size:])
            for size in range(LONGEST, SHORTEST - 1, -1)
            if len(self._tokens) >= size
        ]
        if follows and self._at is not None:
            self._at += 1
        else:
            self._at = next((self._after[run] for run in runs if run in self._after), None)
        for run in runs:
            self._after[run] = len(self._tokens)


class Speculation:
    """How many tokens to draft in a step."""

    def __init__(self) -> None:
        self.usual_hit_rate = 0.5
        """Of the answers so far; the first guess for the next one."""
        self._seconds: dict[int, float] = {}
        """How long a forward of that many tokens took, lately."""
        self._since = 0

    def length(self, hit_rates: Sequence[float], available: Sequence[int], num_rows: int) -> int:
        """Tokens to draft for a request, at most; 0 where it does not pay.

        Args:
            hit_rates: per request how often proposals come true.
            available: per request the tokens that could be proposed.
            num_rows: rows of the step; each is padded to the longest draft.
        """
        if not any(available):
            return 0
        best, best_rate = 0, _GAIN * len(available) / self._expected(num_rows)
        for length in _LENGTHS:
            tokens = sum(
                1 + sum(rate**place for place in range(1, min(length, most) + 1))
                for rate, most in zip(hit_rates, available, strict=True)
            )
            rate = tokens / self._expected(num_rows * (1 + length))
            if rate > best_rate:
                best, best_rate = length, rate
        return best

    def learn(self, lookup: PromptLookup) -> None:
        """An answer has ended."""
        if lookup.num_proposed:
            self.usual_hit_rate += _TREND * (lookup.hit_rate - self.usual_hit_rate)

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A forward of ``num_tokens``, padding included, took that long."""
        known = self._seconds.get(num_tokens, seconds)
        self._seconds[num_tokens] = known + _TREND * (seconds - known)
        self._since += 1
        if self._since >= _FORGET:
            self._since = 0
            self._seconds = {num_tokens: self._seconds[num_tokens]}

    def _expected(self, num_tokens: int) -> float:
        """Seconds; relative to nothing in particular before anything was observed."""
        if num_tokens in self._seconds:
            return self._seconds[num_tokens]
        smaller = max((known for known in self._seconds if known < num_tokens), default=None)
        if smaller is None:
            return 1 + num_tokens / _TOKENS_FOR_DOUBLE
        return self._seconds[smaller] * (
            1 + (num_tokens - smaller) / (smaller + _TOKENS_FOR_DOUBLE)
        )
