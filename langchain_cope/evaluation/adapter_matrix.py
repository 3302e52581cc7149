"""Whether an adapter knows its user: every adapter scored on every user's held-out texts.

`score_adapters` measures it over a `Comparison`, `compare_adapters` reads a table.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from langchain_cope.evaluation.over_users import Estimate, mean_over_users
from langchain_cope.training.progress import Monitor, Stage

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from langchain_cope.evaluation.users import Comparison


@dataclass(frozen=True)
class AdapterMatrix:
    """How often a user's own adapter finds that user's texts likelier than others' adapters do.

    Intervals are over the users whose texts they are; the adapters are these.

    An adapter that is good, or bad, at everybody's texts wins, or loses, for reasons that are no
    person's. The figures with `adjusted` compare what is left when each adapter's mean over all
    users is taken away.
    """

    num_users: int
    top1: Estimate
    """Share of users whose own adapter is the likeliest of all; by chance `1 / num_users`."""
    own_above_another: Estimate
    """Share of pairs of a user and another's adapter in which the own is likelier; chance 0.5."""
    adjusted_top1: Estimate
    adjusted_own_above_another: Estimate


def score_adapters(comparison: "Comparison", monitor: Monitor) -> AdapterMatrix:
    """Return how well the users' last adapters tell their queries apart.

    What a user's folder holds is not scored again. Raises `InputError` where no way has an adapter
    or the extra `evaluate` is missing, `ValueError` for one user, and `Cancelled`.
    """
    jobs, done = comparison.jobs, 0
    table = np.full((len(jobs), len(jobs)), np.nan)
    with monitor.stage(Stage.EVALUATE):
        for column, job in enumerate(jobs):
            for row, owner in enumerate(jobs):
                table[row, column] = comparison.nll_under(job, owner, monitor)
                done += 1
                monitor.step_done(done, table.size)
            job.save()
    return compare_adapters(table)


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


def _wins(table: "NDArray[np.float64]") -> tuple[Estimate, Estimate]:
    """Return (top-1, own above another's); of several best adapters each has an even share."""
    is_best = table == table.min(axis=0)
    own = np.diagonal(table)
    won = (own < table) + 0.5 * (own == table)  # an adapter ties with itself
    top1 = np.diagonal(is_best) / is_best.sum(axis=0)
    above = (won.sum(axis=0) - 0.5) / (len(table) - 1)
    return _over_users(top1), _over_users(above)


def _over_users(figures: "NDArray[np.float64]") -> Estimate:
    return mean_over_users([{str(number): float(of) for number, of in enumerate(figures)}])
