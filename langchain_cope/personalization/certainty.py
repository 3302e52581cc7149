"""How sure a few paired differences make us that their true mean is above 0.

The unit is an item: d is its mean NLL under the reference minus that under the adapter. With the
mean and the standard deviation s of n differences, and δ the true mean in units of s,

    mean / s ~ N(δ, 1 / n),  δ ~ N(μ, ω²)  →  P(δ > 0) = T((n · mean / s + μ / ω²) / √(n + 1 / ω²))

T is Student's t with n − 1 degrees of freedom, since s is only estimated. μ and ω are measured
over many users of a base and shipped as data, `priors.json`: few items move them a little, many
decide alone. In units of s they hold for short and long histories, and for every base.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

MOST_MEAN = 0.15
"""The greatest μ that is used, whatever was measured.

A prior that is surer of itself would publish adapters that teach nothing more often than in one
case of ten: of users whose training works there is a mean, of broken histories there is none.
"""
NOISE = 0.005  # nats a token; what rounding in bfloat16 does to a mean, so that no s is below it
_STEPS = 400  # of the integral: errors below 1e-9


@dataclass(frozen=True)
class Prior:
    """What is known before the first difference is seen, in units of the items' s."""

    mean: float
    """μ: how much an adapter of this base usually gains on an item."""
    sd: float
    """ω: how differently users gain."""
    reads_prompts: bool
    """Whether this base is known to find a text likelier after its own prompt than after others.

    Where it is not known, a user's held-out items have to show it.
    """

    @property
    def sceptical(self) -> "Prior":
        """The same without the belief that adapters help."""
        return Prior(0.0, self.sd, self.reads_prompts)

    def leaning(self, share: float) -> "Prior":
        """Return the same with `share` of the mean, from −1 to 1."""
        return Prior(share * min(self.mean, MOST_MEAN), self.sd, self.reads_prompts)


def prior_of(fingerprint: Mapping[str, str]) -> Prior:
    """Return the measured prior of the base with that fingerprint, or the neutral one."""
    known = _priors()
    facts = known.get(fingerprint.get("weights", ""), known["default"])
    return Prior(facts["mean"], facts["sd"], facts["reads_prompts"])


@cache
def _priors() -> dict[str, dict[str, Any]]:
    file = Path(__file__).with_name("priors.json")
    priors: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return priors


def certainty(differences: Sequence[float], prior: Prior) -> float:
    """Return the probability that the true mean of `differences` is above 0.

    Of one difference alone, and of none, nothing can be said: ½.
    """
    n = len(differences)
    if n < 2:
        return 0.5
    weight = 1 / prior.sd**2
    of_sds = n * in_sds(differences) + prior.mean * weight
    return student_cdf(of_sds / math.sqrt(n + weight), n - 1)


def in_sds(differences: Sequence[float]) -> float:
    """Return the mean in units of s; 0 of fewer than two."""
    if len(differences) < 2:
        return 0.0
    return fmean(differences) / max(stdev(differences), NOISE)


def skewness(differences: Sequence[float]) -> float:
    """Return how skewed the sample is, 0 of fewer than three: below 0 where a few lie far below.

    The third moment in units of the second, with the usual factor for small samples.
    """
    n, mean = len(differences), fmean(differences) if differences else 0.0
    second = sum((one - mean) ** 2 for one in differences)
    if n < 3 or second == 0:
        return 0.0
    third = sum((one - mean) ** 3 for one in differences)
    return n * math.sqrt(n - 1) / (n - 2) * third / (second * math.sqrt(second))


def items_needed(differences: Sequence[float], prior: Prior, level: float) -> int | None:
    """Return how many differences like these would make us sure at `level`.

    None where their mean is not above 0, or no thousand would.
    """
    if len(differences) < 2 or fmean(differences) <= 0:
        return None
    mean, weight = in_sds(differences), 1 / prior.sd**2
    for n in range(len(differences) + 1, 1001):
        t = (n * mean + prior.mean * weight) / math.sqrt(n + weight)
        if student_cdf(t, n - 1) >= level:
            return n
    return None


def student_cdf(t: float, freedom: int) -> float:
    """Return P(T ≤ t) for Student's t with `freedom` degrees of freedom.

    With t = √freedom · tan θ the density becomes a power of cos θ, smooth on a bounded range;
    Simpson's rule integrates it.
    """
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(
        math.pi
    )
    width = math.atan(abs(t) / math.sqrt(freedom)) / _STEPS
    total = 0.0
    for step in range(_STEPS + 1):
        weight = 1 if step in (0, _STEPS) else 4 if step % 2 else 2
        total += weight * math.cos(step * width) ** (freedom - 1)
    half = constant * total * width / 3
    return 0.5 + math.copysign(half, t)
