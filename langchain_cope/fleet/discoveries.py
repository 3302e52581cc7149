"""Who of many is published: false discoveries held down over the whole fleet.

The gate of one user errs in up to one case of ten, which among a thousand users that gain nothing
publishes a hundred. Benjamini and Hochberg (1995): of m users with the chances p₁ ≤ p₂ ≤ … ≤ pₘ
of their gains where nothing is gained, the first k are published,

    k = the greatest i with pᵢ ≤ i / m · q,

so that in the long run at most a share q of those published gain nothing. Users are independent
of each other, which is all that it asks for. Where nobody gains, the chance that anybody is
published at all is at most q; where most gain, it asks of each little more than q. Family-wise
bounds (Bonferroni, Holm) would ask for p ≤ q / m of everybody, and publish nobody of a large fleet
with a dozen held-out texts each.

m counts every user whom the gate judged. Its p-value (`personalization/verdict.py`) holds no belief
that adapters help, and is the greater one of those against all references; for whom the gate
refused it is 1, as nobody is published whom the gate refuses. `skewed_gains.py` has made it greater
where gains are skewed.
"""

from collections.abc import Sequence

LEVEL = 0.05
"""q: of those published, the share that may gain nothing."""


def discoveries(p_values: Sequence[float], level: float = LEVEL) -> list[bool]:
    """Return for each p-value whether it is a discovery at that false discovery rate."""
    m = len(p_values)
    order = sorted(range(m), key=lambda index: p_values[index])
    k = max((i for i, index in enumerate(order, 1) if p_values[index] <= i / m * level), default=0)
    found = set(order[:k])
    return [index in found for index in range(m)]
