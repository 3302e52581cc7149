"""Every number of the training chain, in one place: what the paper used, and what suits a smaller model.

``Recipe.paper()`` is the paper ("the paper": Bu et al., EMNLP 2025, arXiv 2506.12109, and its authors' scripts; 7B models);
``Recipe.for_model(base, history)`` scales it to the base and to the length of the history, and is the default. The strength
of personalization follows from one dial: the learning rate of SFT; the one of DPO keeps the paper's distance to it.
Nothing heavy is imported here, so that a recipe can be built before torch is.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from langchain_cope.engine import Contrast

PAPER_PARAMETERS = (
    7e9  # the size that the paper's learning rates, epochs and targets were chosen for
)
LEAST_STEPS = 12  # of SFT: fewer leave an adapter that has hardly moved


class Sized(Protocol):
    """What the recipe wants to know of a base: how many parameters it has."""

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the base, an embedding tied to the head counted once."""
        ...


def _check(name: str, value: Any, expected: str, fits: bool) -> None:
    if not fits:
        raise ValueError(f"{name} is {value!r}, expected {expected}")


def _check_number(
    name: str, value: Any, low: float, high: float = math.inf, *, low_excluded: bool = False
) -> None:
    number = (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    )
    inside = number and (low < value if low_excluded else low <= value) and value <= high
    expected = f"a number {'>' if low_excluded else '>='} {low:g}" + (
        "" if high == math.inf else f" and <= {high:g}"
    )
    _check(name, value, expected, inside)


def _check_count(name: str, value: Any, low: int = 1) -> None:
    _check(
        name,
        value,
        f"a whole number >= {low}",
        isinstance(value, int) and not isinstance(value, bool) and value >= low,
    )


@dataclass(frozen=True)
class Schedule:
    """How one of the two trainers steps: AdamW with a linear schedule, as the paper has it for both."""

    learning_rate: float
    epochs: float
    batch_size: int
    weight_decay: float = 0.01
    """AdamW's; the paper, both stages."""
    max_grad_norm: float = 0.3
    """Gradients are clipped to this norm; the paper, both stages."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises to its peak; the paper, both stages."""

    def __post_init__(self) -> None:
        kind = type(self).__name__
        _check_number(f"{kind}.learning_rate", self.learning_rate, 0, low_excluded=True)
        _check_number(f"{kind}.epochs", self.epochs, 0, low_excluded=True)
        _check_count(f"{kind}.batch_size", self.batch_size)
        _check_number(f"{kind}.weight_decay", self.weight_decay, 0)
        _check_number(f"{kind}.max_grad_norm", self.max_grad_norm, 0, low_excluded=True)
        _check_number(f"{kind}.warmup", self.warmup, 0)
        _check(f"{kind}.warmup", self.warmup, "a share of the steps, below 1", self.warmup < 1)


@dataclass(frozen=True)
class SFT(Schedule):
    """Supervised fine-tuning of the user's LoRA adapter on what the user wrote, loss on the completion only."""

    learning_rate: float = 1e-4
    """Peak; the paper."""
    epochs: float = 2
    """The paper."""
    batch_size: int = 4
    """Items a step; the paper."""
    rank: int = 8
    """Of the adapter; the paper."""
    lora_alpha: float = 8
    """The adapter's product is scaled by lora_alpha / rank; the paper."""
    dropout: float = 0.05
    """On the adapter's input, in SFT only (TRL switches it off in DPO); the paper."""
    targets: str | tuple[str, ...] = "attention"
    """Layers that get the adapter. "attention": the paper's q_proj and v_proj where they exist, else what peft maps the
    architecture to; "linear": every linear layer but the output head; or names of modules."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("SFT.rank", self.rank)
        _check_number("SFT.lora_alpha", self.lora_alpha, 0, low_excluded=True)
        _check_number("SFT.dropout", self.dropout, 0)
        _check("SFT.dropout", self.dropout, "a share, below 1", self.dropout < 1)
        named = (
            isinstance(self.targets, tuple)
            and self.targets
            and all(isinstance(t, str) and t for t in self.targets)
        )
        expected = '"attention", "linear" or a tuple of module names'
        _check(
            "SFT.targets",
            self.targets,
            expected,
            self.targets in ("attention", "linear") or bool(named),
        )


@dataclass(frozen=True)
class Negatives:
    """Sampling from the base what this user would least have written."""

    candidates: int = 3
    """Candidates an item, of which the one with the lowest reward is kept; K of the paper."""
    temperature: float = 1.0
    """The paper."""
    top_p: float = 0.95
    """The paper."""

    def __post_init__(self) -> None:
        _check_count("Negatives.candidates", self.candidates)
        _check_number("Negatives.temperature", self.temperature, 0, low_excluded=True)
        _check_number("Negatives.top_p", self.top_p, 0, 1, low_excluded=True)


@dataclass(frozen=True)
class DPO(Schedule):
    """Preference optimization from the SFT adapter; the reference is the base with the adapter off."""

    learning_rate: float = 5e-6
    """Peak; the paper."""
    epochs: float = 1
    """The paper."""
    batch_size: int = 8
    """Pairs a step; the paper."""
    beta: float = 0.01
    """Of the DPO loss; the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number("DPO.beta", self.beta, 0, low_excluded=True)


@dataclass(frozen=True)
class Recipe:
    """The whole chain: SFT, negatives, DPO, and the decoding that the result is meant for."""

    sft: SFT = field(default_factory=SFT)
    negatives: Negatives = field(default_factory=Negatives)
    dpo: DPO = field(default_factory=DPO)
    alpha: float = Contrast.alpha
    """Weight of the base's log-probabilities in contrastive decoding; the paper."""
    tau: float = Contrast.tau
    """Plausibility threshold of contrastive decoding; the paper."""
    repetition_penalty: float = 1.0
    """In the generations of the evaluation; the paper: 1.0 for short texts, 1.2 to 1.3 for long ones."""
    max_new_tokens: int | None = None
    """Limit of a candidate and of a generation in the evaluation; the paper: 100 for titles and headlines, 600 for long
    texts. None: as long as the longest completion that is trained on."""
    max_length: int = 2048
    """Tokens of prompt and completion together, where the base's context is not shorter; the paper."""
    max_words: int = 768
    """Words that are kept of each field of an item (a message, the completion); the paper."""
    seed: int = 0
    """Of everything random: same seed, same result on the same machine."""

    def __post_init__(self) -> None:
        for name, kind in (("sft", SFT), ("negatives", Negatives), ("dpo", DPO)):
            value = getattr(self, name)
            _check(
                f"Recipe.{name}", value, f"an instance of {kind.__name__}", isinstance(value, kind)
            )
        _ = self.contrast
        _check_number("Recipe.repetition_penalty", self.repetition_penalty, 0, low_excluded=True)
        if self.max_new_tokens is not None:
            _check_count("Recipe.max_new_tokens", self.max_new_tokens)
        _check_count("Recipe.max_length", self.max_length, 2)
        _check_count("Recipe.max_words", self.max_words)
        _check_count("Recipe.seed", self.seed, 0)
        _check("Recipe.seed", self.seed, "below 2**32", self.seed < 2**32)

    @property
    def contrast(self) -> Contrast:
        """The decoding that the result is meant for."""
        return Contrast(self.alpha, self.tau)

    @classmethod
    def paper(cls, *, long_form: bool = False) -> "Recipe":
        """The authors' settings for 7B models; ``long_form``: those of their three long tasks (abstracts, reviews, posts)."""
        return (
            cls(max_new_tokens=600, repetition_penalty=1.2)
            if long_form
            else cls(max_new_tokens=100)
        )

    @classmethod
    def for_model(cls, base: Sized, history: Sequence[Any], *, seed: int = 0) -> "Recipe":
        """The paper's settings scaled to the size of ``base`` and the number of items in ``history``.

        A smaller model needs larger steps: at the paper's 1e-4 one of 7 million parameters learns nothing; at 1e-3 to 2e-3 it
        learns the user, at 5e-3 it overfits. Between that size and the paper's the rate follows a power law. A small model also
        gets the adapter, of the paper's rank, on every linear layer. A history too short for 12 steps in the paper's two epochs
        gets more epochs, for as many steps. At 7B and above, from 21 items on, this is the paper.
        """
        shrunk = max(1.0, PAPER_PARAMETERS / max(1, base.num_parameters))
        # 15 at 7.4 million parameters, 1e-4 becomes 1.5e-3, and no more below; two digits, as nobody can tell more apart.
        growth = float(f"{min(15.0, shrunk**0.395):.2g}")
        targets = "linear" if base.num_parameters < 1e9 else "attention"
        steps_an_epoch = math.ceil(len(history) / SFT.batch_size) or 1
        epochs = max(SFT.epochs, math.ceil(LEAST_STEPS / steps_an_epoch))
        sft = SFT(learning_rate=1e-4 * growth, epochs=epochs, targets=targets)
        return cls(sft=sft, dpo=DPO(learning_rate=5e-6 * growth), seed=seed)

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain data that JSON can hold."""
        plain = asdict(self)
        if isinstance(self.sft.targets, tuple):
            plain["sft"]["targets"] = list(self.sft.targets)
        return plain
