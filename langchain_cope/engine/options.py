"""Options of a request's contrast, and bounds of an engine: rows, memory, waiting, two savings that can be switched off.

Knows no torch, so that an app may name its options without loading anything.
"""

import math
from dataclasses import dataclass
from typing import TypeGuard


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_alpha(alpha: object) -> None:
    """Raise ValueError unless α is a finite number ≥ 0."""
    if not (_is_number(alpha) and alpha >= 0):
        raise ValueError(
            f"alpha must be a finite number ≥ 0, not {alpha!r}: 0 is the adapter alone, 0.1 the paper's value"
        )


def check_tau(tau: object) -> None:
    """Raise ValueError unless 0 < τ ≤ 1."""
    if not (_is_number(tau) and 0 < tau <= 1):
        raise ValueError(
            f"tau must lie in 0 < tau ≤ 1, not {tau!r}: 0.1 is the paper's value, 1 keeps the likeliest token only"
        )


@dataclass(frozen=True)
class Contrast:
    """How strongly the personal model is contrasted with the base; raises ValueError for α or τ out of range.

    Source: Bu, Jung, Kang, Kim, "Personalized LLM Decoding via Contrasting Personal Preference", EMNLP 2025.
    """

    alpha: float = 0.1
    """α, the weight of log π_base that is taken away; 0 is the adapter alone, 0.1 the paper's value."""
    tau: float = 0.1
    """τ: tokens below this share of the likeliest one's probability are out; 0.1 is the paper's value."""

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        check_tau(self.tau)

    @property
    def needs_base(self) -> bool:
        """Whether the base's distribution enters the choice of tokens."""
        return self.alpha > 0


ADAPTER_ALONE = Contrast(alpha=0.0)
"""No contrast: the personal model's own distribution, all of it."""


@dataclass(frozen=True)
class EngineOptions:
    """Bounds of one engine, which is one base. Checked where they are built; raises ``ValueError``."""

    max_rows: int = 64
    """Rows decoded together; a contrastive request takes two. Further requests wait, first come first served."""
    max_tokens: int | None = None
    """Tokens in flight: prompts and budgets of all requests together, a row each. None: as many as the memory holds."""
    kv_memory: int | float = 0.5
    """Keys and values of all rows: bytes (an integer), or a share of the device's memory that is free at the start (0 to 1)."""
    adapter_slots: int = 64
    """Adapters kept ready in device memory. The least recently used makes room; one in use never does."""
    prefix_cache: int = 256 << 20
    """Bytes for beginnings of prompts and chats that were processed before; 0: none is kept."""
    speculation: bool = True
    """Propose several tokens at once where an answer quotes its prompt or the user's texts; up to rounding it stays the same."""
    stall: float = 0.1
    """Seconds that the prompts of newcomers may hold up running answers at a time, about."""

    def __post_init__(self) -> None:
        share = isinstance(self.kv_memory, float) and 0 < self.kv_memory <= 1
        checks = (
            (
                _is_whole(self.max_rows) and self.max_rows >= 2,
                "max_rows",
                "an integer ≥ 2: a contrastive request has two",
            ),
            (
                self.max_tokens is None or (_is_whole(self.max_tokens) and self.max_tokens > 0),
                "max_tokens",
                "an integer > 0 or None",
            ),
            (
                share or (_is_whole(self.kv_memory) and self.kv_memory > 0),
                "kv_memory",
                "bytes as an integer > 0, or a share as a float in 0 to 1",
            ),
            (
                _is_whole(self.adapter_slots) and self.adapter_slots >= 1,
                "adapter_slots",
                "an integer ≥ 1",
            ),
            (
                _is_whole(self.prefix_cache) and self.prefix_cache >= 0,
                "prefix_cache",
                "bytes as an integer ≥ 0; 0 keeps none",
            ),
            (isinstance(self.speculation, bool), "speculation", "True or False"),
            (
                isinstance(self.stall, (int, float))
                and math.isfinite(self.stall)
                and self.stall > 0,
                "stall",
                "seconds > 0",
            ),
        )
        for good, name, expected in checks:
            if not good:
                raise ValueError(f"{name} must be {expected}, not {getattr(self, name)!r}")
