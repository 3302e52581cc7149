"""Options of a request's contrast, and the bounds of an engine.

Knows no torch, so that an app can name its options without loading anything.
"""

import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from langchain_cope.engine.checks import check_option, is_number, is_whole

Class = TypeVar("Class", bound=type[Any])


def check_alpha(alpha: object) -> None:
    """Raise ValueError unless α is a finite number ≥ 0."""
    hint = "0 is the adapter alone, 0.1 the paper's value"
    check_option("alpha", alpha, "a finite number ≥ 0", is_number(alpha, least=0), hint)


def check_tau(tau: object) -> None:
    """Raise ValueError unless 0 < τ ≤ 1."""
    hint = "0.1 is the paper's value, 1 keeps the likeliest token only"
    check_option("tau", tau, "a number > 0 and ≤ 1", is_number(tau, above=0, most=1), hint)


@dataclass(frozen=True)
class Contrast:
    """How strongly the personal model is contrasted with the base.

    Raises ValueError for α or τ out of range.

    Source: Bu, Jung, Kang, Kim, "Personalized LLM Decoding via Contrasting Personal Preference",
    EMNLP 2025.
    """

    alpha: float = 0.1
    """α, the weight of log π_base that is taken away; 0 is the adapter alone, 0.1 the paper's."""
    tau: float = 0.1
    """τ: tokens less likely than this share of the likeliest one are out; 0.1 is the paper's."""

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        check_tau(self.tau)

    @property
    def needs_base(self) -> bool:
        """True where the base's distribution enters the choice of tokens."""
        return self.alpha > 0


ADAPTER_ALONE = Contrast(alpha=0.0)
"""No contrast: the personal model's own distribution, all of it."""


def _accept_stall(options_class: Class) -> Class:
    """Let the constructor take `stall`, the former name of `prefill_pause`."""
    construct = options_class.__init__

    @functools.wraps(construct)
    def __init__(self: Any, *values: Any, **named: Any) -> None:  # noqa: N807
        if "stall" in named:
            if "prefill_pause" in named:
                raise TypeError("stall is the former name of prefill_pause: give one of them")
            named["prefill_pause"] = named.pop("stall")
        construct(self, *values, **named)

    options_class.__init__ = __init__
    return options_class


@_accept_stall
@dataclass(frozen=True)
class EngineOptions:
    """Bounds of one engine, which is one base. Raises ValueError for a value out of range."""

    # So that `ChatCoPe(engine_options={"stall": …})` is read as well: pydantic goes by the fields.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"validate_by_name": True}

    max_rows: int = 64
    """Rows decoded together; a contrastive request takes two. Further requests wait in order."""
    max_tokens: int | None = None
    """Tokens in flight: prompts and budgets of all requests together, a row each.

    None: as many as the memory holds.
    """
    kv_memory: int | float = 0.5
    """Memory for keys and values of all rows: bytes as an integer, or a share as a float in 0 to 1.

    The share is one of the device's memory that is free at the start.
    """
    adapter_slots: int = 64
    """Adapters kept ready in device memory. The least recently used one without a request goes."""
    prefix_cache: int = 256 << 20
    """Bytes for beginnings of prompts and chats that were processed before; 0 keeps none."""
    speculation: bool = True
    """Propose several tokens at once where an answer quotes its prompt or the user's texts.

    The answer stays the same, up to rounding.
    """
    prefill_pause: float = field(default=0.1, metadata={"validation_alias": "stall"})
    """Seconds, about, that prompts may delay running answers at a time. Formerly named `stall`."""

    def __post_init__(self) -> None:
        rows, tokens, memory = self.max_rows, self.max_tokens, self.kv_memory
        slots, cache, pause = self.adapter_slots, self.prefix_cache, self.prefill_pause
        is_share = isinstance(memory, float) and 0 < memory <= 1
        is_bytes = is_whole(memory) and memory > 0

        rows_fit = is_whole(rows) and rows >= 2
        check_option("max_rows", rows, "an integer ≥ 2", rows_fit, "a contrastive request has two")
        tokens_fit = tokens is None or (is_whole(tokens) and tokens > 0)
        check_option("max_tokens", tokens, "an integer > 0 or None", tokens_fit)
        expected = "bytes as an integer > 0, or a share as a float in 0 to 1"
        check_option("kv_memory", memory, expected, is_share or is_bytes)
        check_option("adapter_slots", slots, "an integer ≥ 1", is_whole(slots) and slots >= 1)
        expected = "bytes as an integer ≥ 0; 0 keeps none"
        check_option("prefix_cache", cache, expected, is_whole(cache) and cache >= 0)
        is_switch = isinstance(self.speculation, bool)
        check_option("speculation", self.speculation, "True or False", is_switch)
        check_option("prefill_pause", pause, "seconds > 0", is_number(pause) and pause > 0)

    @property
    def stall(self) -> float:
        """The former name of `prefill_pause`."""
        return self.prefill_pause
