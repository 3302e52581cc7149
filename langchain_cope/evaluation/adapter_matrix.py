"""Whether an adapter knows its user: every adapter scored on every user's held-out texts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class AdapterMatrix:
    """How often a user's own adapter finds that user's texts likelier than others' adapters do.

    An adapter that is good, or bad, at everybody's texts wins, or loses, for reasons that are no
    person's. The figures with `adjusted` compare what is left when each adapter's mean over all
    users is taken away.
    """

    num_users: int
    top1: float
    """Share of users whose own adapter is the likeliest of all; by chance `1 / num_users`."""
    own_above_another: float
    """Share of pairs of a user and another's adapter in which the own is likelier; chance 0.5."""
    adjusted_top1: float
    adjusted_own_above_another: float


def compare_adapters(nll: "ArrayLike") -> AdapterMatrix:
    """Return how well `nll` tells users apart.

    Args:
        nll: Shape (users, users), nats per token: row i is the adapter of user i, column j the
            held-out texts of user j.

    Raises:
        ValueError: `nll` is not square, has fewer than two users, or a value that is not finite.
    """
    table = np.asarray(nll, dtype=float)
    if table.ndim != 2 or table.shape[0] != table.shape[1] or len(table) < 2:
        raise ValueError(
            f"an adapter for each user and texts of each are needed, two users at least: "
            f"a square table, not one of shape {table.shape}"
        )
    if not np.isfinite(table).all():
        raise ValueError("each adapter needs a finite NLL on each user's texts")
    adjusted = table - table.mean(axis=1, keepdims=True)
    return AdapterMatrix(len(table), *_wins(table), *_wins(adjusted))


def _wins(table: "NDArray[np.float64]") -> tuple[float, float]:
    """Return (top-1, own above another's); of several best adapters each has an even share."""
    num_users = len(table)
    is_best = table == table.min(axis=0)
    own = np.diagonal(table)
    won = (own < table) + 0.5 * (own == table)  # an adapter ties with itself
    pairs = num_users * (num_users - 1)
    top1 = (np.diagonal(is_best) / is_best.sum(axis=0)).mean()
    return float(top1), float((won.sum() - 0.5 * num_users) / pairs)
