"""How strongly an adapter acts where an app says nothing: α, τ and the adapter's own scale.

First what the adapter's version recommends, then what users of the base were measured to need, then
the paper's values. A store need not be trusted: what it recommends beyond the bounds is passed
over.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from langchain_cope.engine import (
    MOST_ALPHA,
    Contrast,
    check_adapter_scale,
    check_alpha,
    check_tau,
    is_number,
)

RECOMMENDED = "recommended"
"""Where a version's metadata has what was chosen for its user."""
MOST_SCALE = 2.0
"""The greatest scale of an adapter that is taken from a store: beyond, answers fall apart."""


@dataclass(frozen=True)
class Strength:
    """How strongly an adapter acts. Raises ValueError for a value out of range."""

    alpha: float = Contrast.alpha
    """Weight of the base that is contrasted away."""
    tau: float = Contrast.tau
    """Plausibility threshold of the contrast."""
    adapter_scale: float = 1.0
    """What the adapter's own changes are multiplied with."""

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        check_tau(self.tau)
        check_adapter_scale(self.adapter_scale)

    @property
    def contrast(self) -> Contrast:
        """The contrast alone."""
        return Contrast(self.alpha, self.tau)

    def __str__(self) -> str:
        """Return it for people."""
        return f"α {self.alpha:g}, τ {self.tau:g}, adapter scale {self.adapter_scale:g}"


PAPER = Strength()
"""The paper's values, for bases of which nothing is known."""


@dataclass(frozen=True)
class Candidate:
    """A strength that may suit a user better than the usual one."""

    strength: Strength
    mean: float
    """How much more like the users' own texts its answers are than the usual one's, in chrF."""
    sd: float
    """How differently users gain by it: the standard deviation of their true gains."""


@dataclass(frozen=True)
class StrengthPrior:
    """What is known of the users of a base before a user's own texts are looked at."""

    usual: Strength
    """What suits most of them."""
    candidates: tuple[Candidate, ...]
    """What else may be chosen, the weakest first."""
    is_measured: bool
    """Whether it was measured on this base."""


def strength_prior(fingerprint: Mapping[str, str]) -> StrengthPrior:
    """Return what was measured of the base with that fingerprint, else the paper's values."""
    known = _measured()
    weights = fingerprint.get("weights", "")
    facts = known.get(weights, known["default"])
    return StrengthPrior(
        usual=Strength(**facts["usual"]),
        candidates=tuple(
            Candidate(
                Strength(one["alpha"], one["tau"], one["adapter_scale"]), one["mean"], one["sd"]
            )
            for one in facts["candidates"]
        ),
        is_measured=weights in known,
    )


def strength_for(
    fingerprint: Mapping[str, str],
    alpha: float | None = None,
    tau: float | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Strength:
    """Return how strongly a version on that base acts where nothing else is said.

    Args:
        fingerprint: of the base.
        alpha: what the version recommends, None for nothing.
        tau: likewise.
        metadata: the version's, which may recommend a scale of the adapter.

    What is recommended out of range counts as nothing.
    """
    scale = recommended_scale(metadata or {})
    values = asdict(strength_prior(fingerprint).usual)
    if is_number(alpha, least=0, most=MOST_ALPHA):
        values["alpha"] = alpha
    if is_number(tau, above=0, most=1):
        values["tau"] = tau
    if scale is not None:
        values["adapter_scale"] = scale
    return Strength(**values)


def recommended_scale(metadata: Mapping[str, Any]) -> float | None:
    """Return the scale of the adapter that a version's metadata recommends, None for nothing."""
    recommended = metadata.get(RECOMMENDED)
    scale = recommended.get("adapter_scale") if isinstance(recommended, dict) else None
    return scale if is_number(scale, least=0, most=MOST_SCALE) else None


@cache
def _measured() -> dict[str, dict[str, Any]]:
    file = Path(__file__).with_name("strengths.json")
    facts: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return facts
