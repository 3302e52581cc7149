"""Statistics whose unit is the user: means, differences and ratios with intervals.

Figures come as one `PerUser` a file: every user of a file counts the same, and so does every file.
Whoever occurs in several files is drawn, or has the sign flipped, in all of them at once: one
person is one piece of evidence. Needs scipy (extra `evaluate`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from langchain_cope.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

PerUser = Mapping[str, float]
"""One figure of each user of one file, by user id."""

LEVEL = 0.95
NUM_RESAMPLES = 9_999
NUM_FLIPS = 2**16  # every way to flip the signs of up to 16 users
SEED = 0  # the same figures have the same interval
_FEWEST_USERS = 3  # for an interval


@dataclass(frozen=True)
class Estimate:
    """A figure over users."""

    value: float
    interval: tuple[float, float] | None
    """95 %, by the bootstrap over users (percentiles); None of fewer than three users.

    Draws of two users hold little more than the two: the interval would be their range.

    Too narrow with few users: with six it holds the truth about 85 times in 100.
    """
    num_users: int


@dataclass(frozen=True)
class Difference(Estimate):
    """A paired difference: first minus second."""

    p: float
    """Two-sided, of flipped signs: how often chance alone makes so large a mean difference.

    Exact up to 16 users; never below `2 / 2**num_users`.
    """
    num_above: int
    """Users whose first figure is above the second (their mean over files)."""


def require_scikit_learn() -> None:
    """Raise InputError unless scikit-learn is installed, and scipy with it."""
    try:
        import scipy  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise InputError(
            "voice scores and intervals need scikit-learn, which is not installed: "
            "pip install 'langchain-cope[evaluate]'"
        ) from error


def mean_over_users(files: Sequence[PerUser]) -> Estimate:
    """Return the mean over users of each file, averaged over `files`."""
    return _estimate(_mean, _table(files))


def difference(first: Sequence[PerUser], second: Sequence[PerUser]) -> Difference:
    """Return how far `first` lies above `second`, file by file and user by user.

    Users that one of the two lacks are left out.
    """
    differences = [
        {user: a[user] - b[user] for user in a if user in b}
        for a, b in zip(first, second, strict=True)
    ]
    table = _table(differences)
    estimate = _estimate(_mean, table)
    of_user = np.nanmean(table, axis=0)
    return Difference(
        value=estimate.value,
        interval=estimate.interval,
        num_users=estimate.num_users,
        p=_p_of_flipped_signs(table),
        num_above=int((of_user > 0).sum()),
    )


def ratio(first: Sequence[PerUser], second: Sequence[PerUser]) -> Estimate | None:
    """Return the mean of `first` over that of `second`: 1.1 says that it is a tenth higher.

    Means are those of `mean_over_users`, over the users that both have. None where the mean of
    `second` is 0.
    """
    pairs = list(zip(first, second, strict=True))
    above = _table([{user: a[user] for user in a if user in b} for a, b in pairs])
    below = _table([{user: b[user] for user in a if user in b} for a, b in pairs])
    if _mean(below) == 0:
        return None
    return _estimate(lambda above, below: _mean(above) / _mean(below), above, below)


def _table(files: Sequence[PerUser]) -> "NDArray[np.float64]":
    """Return shape (files, users), the users sorted by id; NaN where a file lacks a user."""
    users = sorted({user for file in files for user in file})
    if not users or not all(files):
        raise ValueError("a figure over users needs a user in every file")
    return np.array([[file.get(user, np.nan) for user in users] for file in files])


def _mean(table: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """Return the mean over files of the mean over users, from shape (files, ..., users).

    A file of whose users none was drawn is left out.
    """
    num_there = np.isfinite(table).sum(axis=-1)
    of_file = np.nansum(table, axis=-1) / np.where(num_there, num_there, np.nan)
    mean: NDArray[np.float64] = np.nanmean(of_file, axis=0)
    return mean


def _estimate(
    statistic: Callable[..., "NDArray[np.float64]"], *tables: "NDArray[np.float64]"
) -> Estimate:
    """Return `statistic` of all users, with its interval over draws of users."""
    require_scikit_learn()
    from scipy.stats import bootstrap

    num_users = tables[0].shape[1]
    value = float(statistic(*tables))
    if num_users < _FEWEST_USERS:
        return Estimate(value, None, num_users)

    def of_drawn(drawn: "NDArray[np.int64]", axis: int) -> "NDArray[np.float64]":
        return statistic(*(table[:, drawn] for table in tables))

    low, high = bootstrap(
        (np.arange(num_users),),
        of_drawn,
        n_resamples=NUM_RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=SEED,
    ).confidence_interval
    is_finite = np.isfinite(low) and np.isfinite(high)
    return Estimate(value, (float(low), float(high)) if is_finite else None, num_users)


def _p_of_flipped_signs(differences: "NDArray[np.float64]") -> float:
    """Return p of the mean over files and users of `differences`, shape (files, users)."""
    require_scikit_learn()
    from scipy.stats import permutation_test

    num_there = np.isfinite(differences).sum(axis=1, keepdims=True)
    of_user = np.nansum(differences / num_there, axis=0)  # what each adds to the mean
    if len(of_user) == 1:
        return 1.0
    result = permutation_test(
        (of_user,),
        lambda flipped, axis: flipped.sum(axis=axis),
        permutation_type="samples",
        n_resamples=NUM_FLIPS,
        vectorized=True,
        batch=4096,
        rng=SEED,
    )
    return float(result.pvalue)
