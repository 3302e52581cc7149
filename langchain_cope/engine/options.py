"""Options of a request's contrast, and the bounds of an engine.

Knows no torch, so that an app can name its options without loading anything.
"""

import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from langchain_cope.engine.checks import check_option, is_number, is_whole

Class = TypeVar("Class", bound=type[Any])
ContrastRule = Literal["fixed", "adaptive"]
CONTRAST_RULES: tuple[ContrastRule, ...] = ("fixed", "adaptive")


MOST_ALPHA = 2.0
"""The greatest α that is recommended to others: at 0.8 most users' answers are worse already."""
LARGEST_STRENGTH = 1000.0
"""Of α and the adapter's scale: far beyond all use; scores stay finite at such an α."""


def check_alpha(alpha: object) -> None:
    """Raise ValueError unless 0 ≤ α ≤ 1000."""
    _check_strength("alpha", alpha, "0 is the adapter alone, 0.1 the paper's value")


def check_tau(tau: object) -> None:
    """Raise ValueError unless 0 < τ ≤ 1."""
    hint = "0.1 is the paper's value, 1 keeps the likeliest token only"
    check_option("tau", tau, "a number > 0 and ≤ 1", is_number(tau, above=0, most=1), hint)


def check_adapter_scale(scale: object) -> None:
    """Raise ValueError unless 0 ≤ scale ≤ 1000."""
    _check_strength("adapter_scale", scale, "1 is the adapter as it was trained, 0 the base alone")


def _check_strength(name: str, value: Any, hint: str) -> None:
    check_option(name, value, "a finite number ≥ 0", is_number(value, least=0), hint)
    check_option(name, value, f"{LARGEST_STRENGTH:g} at most", value <= LARGEST_STRENGTH, hint)


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
    rule: ContrastRule = "fixed"
    """`fixed`: the paper's, the same α for every token.

    `adaptive`: α acts while adapter and base differ, and else is 0: as long as the mean of the
    answer's Jensen-Shannon divergences is at least `min_divergence`, outside of copies, numbers,
    names, quotations, code and addresses (`decoding/exact.py`), and nowhere under a grammar. It
    never ends a turn that the adapter alone would go on with.
    """
    min_divergence: float = 0.03
    """In nats a token; read by the adaptive rule alone."""

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        check_tau(self.tau)
        expected = " or ".join(map(repr, CONTRAST_RULES))
        check_option("contrast", self.rule, expected, self.rule in CONTRAST_RULES)
        is_divergence = is_number(self.min_divergence, least=0)
        check_option("min_divergence", self.min_divergence, "a number ≥ 0", is_divergence)

    @property
    def needs_base(self) -> bool:
        """True where the base's distribution enters the choice of tokens."""
        return self.alpha > 0


ADAPTER_ALONE = Contrast(alpha=0.0)
"""No contrast: the personal model's own distribution, all of it."""


def _accept_stall(options_class: Class) -> Class:
    """Let the constructor take `stall`, the former name of `prefill_pause`; it wins over that."""
    construct = options_class.__init__

    @functools.wraps(construct)
    def __init__(self: Any, *values: Any, **named: Any) -> None:  # noqa: N807
        if "stall" in named:
            named["prefill_pause"] = named.pop("stall")
        construct(self, *values, **named)

    options_class.__init__ = __init__
    return options_class


@_accept_stall
@dataclass(frozen=True)
class EngineOptions:
    """Bounds of one engine, which is one base. Raises ValueError for a value out of range."""

    # So that `ChatCoPe(engine_options={"stall": …})` is read as well: pydantic goes by the fields.
    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "populate_by_name": True,
        "extra": "forbid",
    }

    max_rows: int = 64
    """Rows decoded together; a contrastive request takes two. Further requests wait in order.

    Twice as many, where all requests are offline and the memory has room for them.
    """
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
    """Bytes for beginnings of prompts and chats that were processed before.

    0 keeps none, and requests that run at the same time share none either.
    """
    speculation: bool = True
    """Propose several tokens at once where an answer quotes its prompt or the user's texts.

    The answer stays the same, up to rounding.
    """
    prefill_pause: float = field(default=0.1, metadata={"validation_alias": "stall"})
    """Seconds, about, that prompts may delay running answers at a time. Formerly named `stall`.

    Where a step of those answers takes longer, prompts may take as long: else they would come in
    ever later, and few answers would run.
    """
    max_waiting: int | None = None
    """Requests that may stand in the line, offline ones aside; another one raises `EngineBusy`.

    Each stands there until the next step at least. None: any number.
    """
    packed_weights: bool = True
    """Compute steps of few rows with the blocks of a GGUF file, where that is faster.

    They are in memory beside the weights: a third to two fifths more.
    """

    def __post_init__(self) -> None:
        memory = self.kv_memory
        is_share = isinstance(memory, float) and 0 < memory <= 1
        tokens_fit = self.max_tokens is None or is_whole(self.max_tokens, least=1)
        waiting_fits = self.max_waiting is None or is_whole(self.max_waiting, least=1)
        checks = (
            ("max_tokens", "an integer > 0 or None", tokens_fit),
            ("max_waiting", "an integer ≥ 1 or None", waiting_fits),
            (
                "kv_memory",
                "bytes as an integer > 0, or a share as a float in 0 to 1",
                is_share or is_whole(memory, least=1),
            ),
            ("adapter_slots", "an integer ≥ 1", is_whole(self.adapter_slots, least=1)),
            (
                "prefix_cache",
                "bytes as an integer ≥ 0; 0 keeps none",
                is_whole(self.prefix_cache, least=0),
            ),
            ("speculation", "True or False", isinstance(self.speculation, bool)),
            ("packed_weights", "True or False", isinstance(self.packed_weights, bool)),
            ("prefill_pause", "seconds > 0", is_number(self.prefill_pause, above=0)),
        )
        hint = "a contrastive request has two"
        rows_fit = is_whole(self.max_rows, least=2)
        check_option("max_rows", self.max_rows, "an integer ≥ 2", rows_fit, hint)
        for name, expected, fits in checks:
            check_option(name, getattr(self, name), expected, fits)

    @property
    def stall(self) -> float:
        """The former name of `prefill_pause`."""
        return self.prefill_pause
