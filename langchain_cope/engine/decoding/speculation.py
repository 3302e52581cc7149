"""Speculation without a draft model: what an answer may quote is looked up and checked at once.

`PromptLookup` proposes for one request what followed the newest tokens where they stood before: in
the user's recent texts, in the prompt or in the answer itself. `Speculation` decides how many
tokens are worth checking in one forward, from how often proposals came true and how long forwards
of different sizes took. Proposals that are not checked are still compared with what came, which
costs nothing.
"""

from collections.abc import Iterable, Sequence

LONGEST, SHORTEST = 3, 2
"""Number of tokens that must have stood together before."""
MAX_DRAFT = 8
"""Number of tokens proposed at a time, at most."""
_LENGTHS = (1, 2, 4, MAX_DRAFT)
_SMOOTHING = 0.2  # weight of the newest observation in an average
# What a draft must promise. Timings and hit rates are estimates, and a wrong guess costs every
# request of the step.
_MIN_SPEEDUP = 1.25
_REMEASURE_AFTER = 256  # observations after which the timings of other sizes are taken anew
_TOKENS_FOR_DOUBLE = 32  # a first guess: this many tokens more take as long again


class PromptLookup:
    """What may come next in one answer to a prompt."""

    def __init__(self, tokens: Iterable[int], hit_rate: float) -> None:
        """Look up in `tokens`, of which there is at least one.

        Args:
            tokens: the user's recent texts and the prompt.
            hit_rate: a first guess of how often proposals come true, 0 to 1.
        """
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        """For each short run of tokens the index where it went on, the newest time."""
        self._next: int | None = None
        """Index of the token that may come next."""
        self.hit_rate = hit_rate
        """How often the first token proposed was the one that came, lately."""
        self.num_proposed = 0
        """Number of times that a token was proposed."""
        *before, last = tokens
        self._tokens += before
        for size in range(SHORTEST, LONGEST + 1):  # in bulk, because other requests wait meanwhile
            runs = zip(*(before[start:] for start in range(size)), strict=False)
            self._after.update(zip(runs, range(size, len(before) + 1), strict=False))
        self._add(last)

    def push(self, token: int) -> None:
        """Go on with `token`, the answer's next one."""
        if self._next is not None:
            self.num_proposed += 1
            hit = 1.0 if token == self._tokens[self._next] else 0.0
            self.hit_rate += _SMOOTHING * (hit - self.hit_rate)
        self._add(token)

    def propose(self, most: int) -> list[int]:
        """Return up to `most` tokens that may come next."""
        return [] if self._next is None else self._tokens[self._next : self._next + most]

    def _add(self, token: int) -> None:
        came_true = self._next is not None and self._tokens[self._next] == token
        self._tokens.append(token)
        runs = [
            tuple(self._tokens[-size:])
            for size in range(LONGEST, SHORTEST - 1, -1)
            if len(self._tokens) >= size
        ]
        if came_true and self._next is not None:
            self._next += 1
        else:
            self._next = next((self._after[run] for run in runs if run in self._after), None)
        for run in runs:
            self._after[run] = len(self._tokens)


class Speculation:
    """How many tokens to draft in a step."""

    def __init__(self) -> None:
        self.usual_hit_rate = 0.5
        """Average over the answers so far; the first guess for the next one."""
        self._seconds: dict[int, float] = {}
        """Per number of tokens, how long a forward of that size took, lately."""
        self._num_recorded = 0
        """Number of timings since other sizes were last forgotten."""

    def length(self, hit_rates: Sequence[float], available: Sequence[int], num_rows: int) -> int:
        """Return how many tokens to draft for a request, at most; 0 where drafting does not pay.

        Args:
            hit_rates: per request how often proposals come true.
            available: per request the number of tokens that could be proposed.
            num_rows: rows of the step; each is padded to the longest draft.
        """
        if not any(available):
            return 0
        best = 0
        best_rate = _MIN_SPEEDUP * len(available) / self._expected_seconds(num_rows)
        for length in _LENGTHS:
            tokens = sum(
                _expected_tokens(hit_rate, min(length, most))
                for hit_rate, most in zip(hit_rates, available, strict=True)
            )
            rate = tokens / self._expected_seconds(num_rows * (1 + length))
            if rate > best_rate:
                best, best_rate = length, rate
        return best

    def update_hit_rate(self, lookup: PromptLookup) -> None:
        """Count an answer that has ended into `usual_hit_rate`."""
        if lookup.num_proposed:
            self.usual_hit_rate += _SMOOTHING * (lookup.hit_rate - self.usual_hit_rate)

    def record_timing(self, num_tokens: int, seconds: float) -> None:
        """Record that a forward of `num_tokens`, padding included, took `seconds`."""
        average = self._seconds.get(num_tokens, seconds)
        self._seconds[num_tokens] = average + _SMOOTHING * (seconds - average)
        self._num_recorded += 1
        if self._num_recorded >= _REMEASURE_AFTER:
            self._num_recorded = 0
            self._seconds = {num_tokens: self._seconds[num_tokens]}

    def _expected_seconds(self, num_tokens: int) -> float:
        """Return the expected time of a forward, in an arbitrary unit before the first timing."""
        if num_tokens in self._seconds:
            return self._seconds[num_tokens]
        smaller = max((size for size in self._seconds if size < num_tokens), default=None)
        if smaller is None:
            return 1 + num_tokens / _TOKENS_FOR_DOUBLE
        growth = (num_tokens - smaller) / (smaller + _TOKENS_FOR_DOUBLE)
        return self._seconds[smaller] * (1 + growth)


def _expected_tokens(hit_rate: float, length: int) -> float:
    """Return how many tokens a step gives on average that checks a draft of `length`."""
    return 1 + sum(hit_rate**size for size in range(1, length + 1))
