"""From scores to a token: penalty, temperature, top-k, top-p, min-p, then argmax or a sample.

The steps and their order are those of `transformers.generate`; they act on log-probabilities
(`contrast.py`), never on raw logits, so that base, adapter and CoPe can be compared under one
convention.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from langchain_cope.engine.checks import check_option, is_number, is_whole

_BLOCK = 256  # tokens of the vocabulary that share one noise at first
_ATTEMPTS = 4  # tokens drawn before those that are kept are looked for
_NARROW = 0.5  # top-p below which a draw is rejected too often
_LIKELIEST = 1024  # tokens among which those that top-p keeps are looked for first


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen and where it stops; ValueError for a value out of range."""

    max_tokens: int = 256
    """Number of tokens of the answer, at most."""
    temperature: float = 0.0
    """0: the likeliest token; above: a sample."""
    top_p: float = 1.0
    """The likeliest tokens are kept until they have this probability together; 1: every token."""
    top_k: int = 0
    """Number of the likeliest tokens that are kept; 0: every token."""
    min_p: float = 0.0
    """Tokens below this share of the likeliest one's probability are out; 0: none is."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of the prompt and of the answer so far less likely."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings; a special token's text stands for it."""
    seed: int = field(default_factory=lambda: secrets.randbits(63))
    """A seeded answer depends neither on its batch nor on what ran before."""

    def __post_init__(self) -> None:
        checks = (
            ("max_tokens", "an integer ≥ 1", is_whole(self.max_tokens, least=1)),
            ("temperature", "a finite number ≥ 0", is_number(self.temperature, least=0)),
            ("top_p", "a number in 0 < top_p ≤ 1", is_number(self.top_p, above=0, most=1)),
            ("top_k", "an integer ≥ 0", is_whole(self.top_k, least=0)),
            ("min_p", "a number in 0 ≤ min_p ≤ 1", is_number(self.min_p, least=0, most=1)),
            ("seed", "an integer", is_whole(self.seed)),
            ("repetition_penalty", "a number > 0", is_number(self.repetition_penalty, above=0)),
            ("stop", "strings that are not empty", _are_texts(self.stop)),
        )
        for name, expected, fits in checks:
            check_option(name, getattr(self, name), expected, fits)


def _are_texts(values: Sequence[object]) -> bool:
    return all(isinstance(value, str) and value for value in values)


def choose_tokens(
    scores: Tensor,
    samplings: Sequence[Sampling],
    seen: Sequence[Sequence[int]],
    steps: Sequence[int],
) -> Tensor:
    """Return the next token of every request.

    Args:
        scores: `(R, V)` float32 log-probabilities; −inf marks what may not be chosen.
        samplings: R settings.
        seen: per request the ids of its prompt and of its answer so far (read only where a
            repetition penalty is set).
        steps: per request the number of tokens answered so far; seed and step together fix the
            noise.

    Returns:
        `(R,)` token ids on the device of `scores`.
    """
    if any(s.repetition_penalty != 1.0 for s in samplings):
        scores = scores.clone()
        for row, (sampling, ids) in enumerate(zip(samplings, seen, strict=True)):
            if sampling.repetition_penalty != 1.0:
                _penalize(scores[row], ids, sampling.repetition_penalty)
    tokens = torch.zeros(len(samplings), dtype=torch.long, device=scores.device)
    greedy = [row for row, s in enumerate(samplings) if s.temperature == 0]
    if greedy:
        tokens[greedy] = _of_rows(scores, greedy).argmax(dim=-1)
    sampled = [row for row, s in enumerate(samplings) if s.temperature > 0]
    if sampled:
        settings, own_steps = [samplings[row] for row in sampled], [steps[row] for row in sampled]
        tokens[sampled] = _sample(_of_rows(scores, sampled), settings, own_steps)
    return tokens


def warp(scores: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Apply each row's temperature, top-k, top-p and min-p to `scores` `(R, V)`.

    What they exclude becomes −inf; tokens as likely as the last one that is kept stay, too. Every
    temperature is above 0.
    """
    return _restrict(_tempered(scores, samplings), samplings)


def _tempered(scores: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    if all(s.temperature == 1 for s in samplings):
        return scores
    return scores / _column([s.temperature for s in samplings], scores)


def _restrict(scores: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Return tempered `scores` with −inf for what top-k, top-p and min-p exclude."""
    rows = [row for row, s in enumerate(samplings) if s.top_k]
    if rows:
        number = torch.tensor([[samplings[row].top_k] for row in rows], device=scores.device)
        number = number.clamp_max(scores.shape[-1])
        likeliest = scores[rows].topk(int(number.max()), dim=-1).values
        scores = _without_less(scores, rows, scores[rows], likeliest.gather(-1, number - 1))
    rows = [row for row, s in enumerate(samplings) if s.top_p < 1]
    if rows:
        probability = scores[rows].softmax(dim=-1)
        top_p = _column([samplings[row].top_p for row in rows], scores)
        scores = _without_less(scores, rows, probability, _least_of_nucleus(probability, top_p))
    if any(s.min_p for s in samplings):
        scores = scores.masked_fill(scores < _least_by_min_p(scores, samplings), -math.inf)
    return scores


def _without_less(scores: Tensor, rows: list[int], values: Tensor, least: Tensor) -> Tensor:
    """Return `scores` with −inf in `rows` where their `values` are below `least` `(rows, 1)`."""
    scores = scores.clone()
    scores[rows] = scores[rows].masked_fill(values < least, -math.inf)
    return scores


def _least_of_nucleus(probability: Tensor, top_p: Tensor) -> Tensor:
    """Return the smallest probability `(R, 1)` that top-p keeps of each row `(R, V)`.

    The likeliest tokens do for most rows; to sort a whole vocabulary takes ten times as long.
    """
    least = torch.empty_like(top_p)
    rows = torch.arange(len(probability), device=probability.device)
    vocabulary = probability.shape[-1]
    for number in (min(_LIKELIEST, vocabulary), vocabulary):
        ordered = probability[rows].topk(number, dim=-1).values
        # A token stays while the mass before it is below top_p: the first one always stays.
        stays = ordered.cumsum(dim=-1) - ordered < top_p[rows]
        last = stays.sum(dim=-1, keepdim=True).clamp_min(1) - 1
        least[rows] = ordered.gather(-1, last)
        rows = rows[stays[:, -1]]  # those of which more may stay
        if number == vocabulary or not len(rows):
            break
    return least


def _least_by_min_p(scores: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Return the lowest score `(R, 1)` that min-p keeps of each row."""
    return scores.amax(dim=-1, keepdim=True) + _column([s.min_p for s in samplings], scores).log()


def _sample(scores: Tensor, samplings: Sequence[Sampling], steps: Sequence[int]) -> Tensor:
    """Return a token for each row `(R, V)`: an exact sample of what `warp` leaves of it.

    Whether a given token is among those that top-p keeps takes one pass over the row to tell; which
    ones all these are takes many. So tokens of the whole row are drawn until one is kept.
    """
    scores = _tempered(scores, samplings)
    narrow = [row for row, s in enumerate(samplings) if s.top_k or s.top_p < _NARROW]
    if narrow:
        restricted = _restrict(scores[narrow], [samplings[row] for row in narrow])
        scores = scores.index_copy(0, torch.tensor(narrow, device=scores.device), restricted)
    tokens = torch.zeros(len(samplings), dtype=torch.long, device=scores.device)
    rows = list(range(len(samplings)))
    for attempt in range(_ATTEMPTS + 1):
        own, settings = _of_rows(scores, rows), [samplings[row] for row in rows]
        if attempt == _ATTEMPTS:
            own = _restrict(own, settings)
        noise = _gumbel_noise(settings, [steps[row] for row in rows], attempt, own.shape[-1])
        weights = _weights(own, settings)
        drawn = _draw(own, weights, noise.to(own.device))
        tokens[rows] = drawn
        if attempt == _ATTEMPTS or not any(s.top_p < 1 or s.min_p for s in settings):
            break
        kept = _is_kept(own, weights, drawn, settings).tolist()
        rows = [
            row for row, stays in zip(rows, kept, strict=True) if not stays and row not in narrow
        ]
        if not rows:
            break
    return tokens


def _draw(scores: Tensor, weights: Tensor, noise: Tensor) -> Tensor:
    """Return a token of each row `(R, V)` of which `weights` are the unnormalised probabilities.

    The argmax of log-probabilities plus Gumbel noise is an exact sample; noise for the blocks of
    the vocabulary, and then for the tokens of one block, is far less than for all tokens. Where
    rounding changes the probabilities a little, the same noise gives another token about as seldom
    as can be; a uniform number on their cumulative sum moves every border between tokens.
    """
    missing = -scores.shape[-1] % _BLOCK
    if missing:
        scores, weights = pad(scores, (0, missing), value=-math.inf), pad(weights, (0, missing))
    blocks = weights.view(len(weights), -1, _BLOCK).sum(dim=-1).log()
    block = (blocks + noise[:, _BLOCK:]).argmax(dim=-1)
    rows = torch.arange(len(scores), device=scores.device)
    within = scores.view(len(scores), -1, _BLOCK)[rows, block] + noise[:, :_BLOCK]
    return block * _BLOCK + within.argmax(dim=-1)


def _weights(scores: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Return the probabilities of tempered `scores`, each row times a number of its own."""
    if all(s.temperature == 1 and s.repetition_penalty == 1 for s in samplings):
        return scores.exp()  # of log-probabilities: the number is 1
    return (scores - scores.amax(dim=-1, keepdim=True)).exp_()


def _is_kept(
    scores: Tensor, weights: Tensor, tokens: Tensor, samplings: Sequence[Sampling]
) -> Tensor:
    """Tell of one token of each row whether its top-p and min-p keep it."""
    index = tokens.unsqueeze(-1)
    score = scores.gather(-1, index)
    top_p = _column([s.top_p for s in samplings], scores)
    total = weights.sum(dim=-1, keepdim=True)
    # Before a token comes no more than all but itself: most are told by that.
    kept = (weights.gather(-1, index) > (1 - top_p) * total) | (top_p == 1)
    rows = (~kept).squeeze(-1).nonzero().squeeze(-1)
    if len(rows):
        likelier = scores[rows] > score[rows]
        mass_before = (weights[rows] * likelier).sum(dim=-1, keepdim=True)
        kept[rows] = (mass_before < top_p[rows] * total[rows]) | (mass_before == 0)
    if any(s.min_p for s in samplings):
        kept &= score >= _least_by_min_p(scores, samplings)
    return kept.squeeze(-1)


def _of_rows(scores: Tensor, rows: list[int]) -> Tensor:
    """Return `scores` of `rows`, without a copy where these are all."""
    return scores if len(rows) == len(scores) else scores[rows]


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def _penalize(scores: Tensor, ids: Sequence[int], penalty: float) -> None:
    index = torch.tensor(sorted(set(ids)), device=scores.device)
    values = scores[index]
    scores[index] = torch.where(values < 0, values * penalty, values / penalty)


def _gumbel_noise(
    samplings: Sequence[Sampling], steps: Sequence[int], attempt: int, vocabulary: int
) -> Tensor:
    """Return `(R, _BLOCK + number of blocks)` standard Gumbel noise.

    It is drawn on the CPU, so that a seed means the same on every device.
    """
    width = _BLOCK - (-vocabulary // _BLOCK)
    uniform = torch.empty(len(steps), width, dtype=torch.float64)
    generator = torch.Generator()
    for row, (sampling, step) in enumerate(zip(samplings, steps, strict=True)):
        generator.manual_seed(_mix(_mix(sampling.seed, step), attempt))
        uniform[row].uniform_(generator=generator)
    # float64 keeps uniform below 1 and the tails true; 0 would give −inf, which no finite score
    # survives.
    return -torch.log(-torch.log(uniform.clamp_min(1e-300))).float()


def _mix(seed: int, step: int) -> int:
    """Return a 64-bit generator seed for (seed, step).

    SplitMix64, so that neighbouring steps share nothing.
    """
    mask = (1 << 64) - 1
    z = (seed + (step + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)
