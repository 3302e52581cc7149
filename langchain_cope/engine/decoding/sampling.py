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

from langchain_cope.engine.checks import check_option, is_number, is_whole


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
    tokens = scores.argmax(dim=-1)
    sampled = [row for row, s in enumerate(samplings) if s.temperature > 0]
    if sampled:
        settings = [samplings[row] for row in sampled]
        warped = warp(scores[sampled], settings)
        noise = _gumbel_noise(settings, [steps[row] for row in sampled], scores.shape[-1])
        # The argmax of log-probabilities plus Gumbel noise is an exact sample from them.
        tokens[sampled] = (warped + noise.to(scores.device)).argmax(dim=-1)
    return tokens


def warp(scores: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Apply each row's temperature, top-k, top-p and min-p to `scores` `(R, V)`.

    What they exclude becomes −inf. Every temperature is above 0.
    """

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=scores.dtype, device=scores.device).unsqueeze(1)

    scores = scores / column([s.temperature for s in samplings])
    if any(s.top_k or s.top_p < 1 for s in samplings):
        vocabulary = scores.shape[-1]
        ordered, order = scores.sort(dim=-1, descending=True)
        rank = torch.arange(vocabulary, device=scores.device)
        num_kept = column([float(s.top_k or vocabulary) for s in samplings])
        ordered = ordered.masked_fill(rank >= num_kept, -math.inf)
        probability = ordered.softmax(dim=-1)
        # A token stays while the mass before it is below top_p: the first one always stays.
        before = probability.cumsum(dim=-1) - probability
        nucleus = column([s.top_p for s in samplings])
        ordered = ordered.masked_fill((before >= nucleus) & (nucleus < 1) & (rank > 0), -math.inf)
        scores = torch.full_like(scores, -math.inf).scatter(-1, order, ordered)
    if any(s.min_p for s in samplings):
        threshold = scores.amax(dim=-1, keepdim=True) + column([s.min_p for s in samplings]).log()
        scores = scores.masked_fill(scores < threshold, -math.inf)
    return scores


def _penalize(scores: Tensor, ids: Sequence[int], penalty: float) -> None:
    index = torch.tensor(sorted(set(ids)), device=scores.device)
    values = scores[index]
    scores[index] = torch.where(values < 0, values * penalty, values / penalty)


def _gumbel_noise(samplings: Sequence[Sampling], steps: Sequence[int], vocabulary: int) -> Tensor:
    """Return `(R, V)` standard Gumbel noise.

    It is drawn on the CPU, so that a seed means the same on every device.
    """
    uniform = torch.empty(len(steps), vocabulary, dtype=torch.float64)
    generator = torch.Generator()
    for row, (sampling, step) in enumerate(zip(samplings, steps, strict=True)):
        generator.manual_seed(_mix(sampling.seed, step))
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
