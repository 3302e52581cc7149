"""P-values that hold where gains are skewed to the left: learnt from the whole fleet's gains.

Student's t takes for granted that a user's gains on single texts are about symmetric around their
mean, or skewed to the right. Where adapters gain a little on most texts and lose much on a few, its
p-values are too small, most of all in the tails that a fleet looks at, and the few gains of one
user cannot tell. Those of all users can: the mean of their sample skewnesses, less a standard
error, says which gamma distribution, turned to the left, shows as much. Under that one every
p-value is computed anew (a parametric bootstrap of t), and the greater of both counts.

What is taken for granted is that all users' gains are about equally skewed.
"""

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

SKEWNESSES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0)
"""To the left, that are told apart; an exponential distribution has 2."""
MOST_TEXTS = 40  # of a user, in the bootstrap: more show less of the skewness
DRAWS = 100_000


class Gains(NamedTuple):
    """What a fleet is told of one user's gains on single texts."""

    p_value: float
    """By Student's t."""
    num_texts: int
    mean_in_sds: float
    skewness: float


def p_values(fleet: Sequence[Gains]) -> list[float]:
    """Return the p-value of each user, greater where the fleet's gains are skewed to the left."""
    skewness = _skewness_of(fleet)
    if skewness == 0:
        return [user.p_value for user in fleet]
    return [max(user.p_value, _chance(user, skewness)) for user in fleet]


def _skewness_of(fleet: Sequence[Gains]) -> float:
    """Return how far the gains of all users are skewed to the left, as far as that may be."""
    telling = [user for user in fleet if user.num_texts >= 3]
    if not telling:
        return 0.0
    sizes = [min(user.num_texts, MOST_TEXTS) for user in telling]
    total = sum(sizes)
    mean = sum(n * user.skewness for n, user in zip(sizes, telling, strict=True)) / total
    error = math.sqrt(sum(n**2 * _variance(n) for n in sizes)) / total
    if mean - error >= 0:
        return 0.0
    for skewness in SKEWNESSES:
        if sum(n * _shown(n, skewness) for n in sizes) / total <= mean - error:
            return skewness
    return SKEWNESSES[-1]


def _variance(n: int) -> float:
    """Return the variance of the sample skewness of n normal numbers."""
    return 6 * n * (n - 1) / ((n - 2) * (n + 1) * (n + 3))


@cache
def _shown(n: int, skewness: float) -> float:
    """Return the mean of the sample skewness of n gains, which is nearer to 0 than their own."""
    import numpy as np

    gains = _gains(n, skewness, DRAWS // 10)
    gains -= gains.mean(1, keepdims=True)
    moments = (gains**3).sum(1) / (gains**2).sum(1) ** 1.5
    return float(np.mean(moments) * n * math.sqrt(n - 1) / (n - 2))


def _chance(user: Gains, skewness: float) -> float:
    """Return the chance of such a mean where the true one is 0 and gains are so skewed."""
    import numpy as np

    n = min(user.num_texts, MOST_TEXTS)
    if n < 2:
        return 1.0
    in_sds = user.mean_in_sds * math.sqrt(user.num_texts / n)
    means = _means_in_sds(n, skewness)
    return float(DRAWS - np.searchsorted(means, in_sds) + 1) / (DRAWS + 1)


@lru_cache(maxsize=MOST_TEXTS)
def _means_in_sds(n: int, skewness: float) -> Any:
    """Return the means of n gains in units of their standard deviation, in order."""
    import numpy as np

    gains = _gains(n, skewness, DRAWS)
    return np.sort(gains.mean(1) / gains.std(1, ddof=1))


def _gains(n: int, skewness: float, draws: int) -> Any:
    """Return gains of mean 0, (draws, n), of a gamma distribution turned to the left."""
    import numpy as np

    shape = 4 / skewness**2
    return shape - np.random.default_rng(0).gamma(shape, size=(draws, n))
