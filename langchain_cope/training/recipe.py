"""Every number of the training chain: what the paper used, and what suits a smaller model.

`Recipe.paper()` is the paper ("the paper": Bu et al., EMNLP 2025, arXiv 2506.12109, and its
authors' scripts; 7B models); `Recipe.for_model(base, history)` scales it to the base and to the
length of the history, and is the default. The strength of personalization follows from one dial:
the learning rate of SFT; the one of DPO keeps the paper's distance to it. Nothing heavy is imported
here, so that a recipe can be built before torch is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from langchain_cope.engine import (
    MOST_ALPHA,
    Contrast,
    check_alpha,
    check_option,
    check_tau,
    is_number,
    is_whole,
)
from langchain_cope.errors import InputError

# The size that the paper's learning rates, epochs and targets were chosen for.
PAPER_PARAMETERS = 7e9
SMALL = 1e9  # parameters; what a smaller base gets otherwise than the paper's
LEAST_STEPS = 12  # of SFT: fewer leave an adapter that has hardly moved
# Items from which a small base with a task adapter is trained at the whole rate. Fewer hold less
# that it does not know yet, and steps at that rate make it forget some of what it knew.
FULL_RATE_ITEMS = 24
# How fast rates grow towards smaller bases: by a power law from the paper's. That of users comes to
# 1.5e-3 at 135 million parameters, between the 1e-3 and 2e-3 that were measured to suit there. A
# task adapter takes many more steps.
_USER_POWER, _TASK_POWER = 0.686, 0.395


class Sized(Protocol):
    """What the recipe reads of a base: its parameters and, if it has one, its `task_adapter`."""

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the base, an embedding tied to the head counted once."""
        ...


def _check_number(name: str, value: Any) -> None:
    check_option(name, value, "a number ≥ 0", is_number(value, least=0))


def _check_positive(name: str, value: Any) -> None:
    check_option(name, value, "a number > 0", is_number(value, above=0))


def _check_share(name: str, value: Any, of_what: str) -> None:
    expected = f"a share of {of_what}, ≥ 0 and below 1"
    check_option(name, value, expected, is_number(value, least=0) and value < 1)


def _check_count(name: str, value: Any, least: int = 1) -> None:
    check_option(name, value, f"a whole number ≥ {least}", is_whole(value, least=least))


@dataclass(frozen=True)
class Schedule:
    """How one of the two trainers steps: AdamW with a linear schedule, as the paper has it."""

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
        _check_positive(f"{kind}.learning_rate", self.learning_rate)
        _check_positive(f"{kind}.epochs", self.epochs)
        _check_count(f"{kind}.batch_size", self.batch_size)
        _check_number(f"{kind}.weight_decay", self.weight_decay)
        _check_positive(f"{kind}.max_grad_norm", self.max_grad_norm)
        _check_share(f"{kind}.warmup", self.warmup, "the steps")


@dataclass(frozen=True)
class SFT(Schedule):
    """Supervised fine-tuning of the user's LoRA adapter, with the loss on the completion only."""

    learning_rate: float = 1e-4
    """Peak; the paper."""
    epochs: float = 2
    """The paper."""
    batch_size: int = 4
    """Items a step; the paper."""
    rank: int = 8
    """Of the adapter; the paper."""
    lora_alpha: float = 8
    """The adapter's product is scaled by `lora_alpha / rank`; the paper."""
    dropout: float = 0.05
    """On the adapter's input, in SFT only (TRL switches it off in DPO); the paper."""
    targets: str | tuple[str, ...] = "attention"
    """Layers that get the adapter: "attention", "linear" or a tuple of module names.

    "attention": the paper's q_proj and v_proj where they exist, else what peft maps the
    architecture to; "linear": every linear layer but the output head.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("SFT.rank", self.rank)
        _check_positive("SFT.lora_alpha", self.lora_alpha)
        _check_share("SFT.dropout", self.dropout, "the inputs")
        if isinstance(self.targets, tuple):
            fits = all(isinstance(name, str) and name for name in self.targets)
            fits = fits and len(self.targets) > 0
        else:
            fits = self.targets in ("attention", "linear")
        expected = '"attention", "linear" or a tuple of module names'
        check_option("SFT.targets", self.targets, expected, fits)


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
        _check_positive("Negatives.temperature", self.temperature)
        fits = is_number(self.top_p, above=0, most=1)
        check_option("Negatives.top_p", self.top_p, "a number > 0 and ≤ 1", fits)


@dataclass(frozen=True)
class DPO(Schedule):
    """Preference optimization from the SFT adapter; the reference is the base, adapter off."""

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
        _check_positive("DPO.beta", self.beta)


@dataclass(frozen=True)
class Recipe:
    """The whole chain: SFT, negatives, DPO, and the decoding that the result is meant for."""

    sft: SFT = field(default_factory=SFT)
    negatives: Negatives | None = field(default_factory=Negatives)
    """How negatives are mined for DPO; None: not at all.

    DPO then takes the pairs that the history itself gives, and is skipped where there are none.
    """
    dpo: DPO = field(default_factory=DPO)
    alpha: float | None = None
    """Weight of the base's log-probabilities in contrastive decoding; the paper: 0.1.

    None: what suits the user, else what users of the base need.
    """
    tau: float | None = None
    """Plausibility threshold of contrastive decoding; the paper: 0.1. None: as for `alpha`."""
    repetition_penalty: float = 1.0
    """In the generations of the evaluation; the paper: 1.0 for short texts, 1.2 to 1.3 for long."""
    max_new_tokens: int | None = None
    """Tokens of a candidate and of a generation in the evaluation, at most.

    The paper: 100 for titles and headlines, 600 for long texts. None: as many as
    the longest completion that is trained on has, but a quarter more than 19 of 20 at most.
    """
    max_length: int = 2048
    """Tokens of prompt and completion together, where the base's context is not shorter; the paper.
    """
    max_words: int = 768
    """Words that are kept of each field of an item (a message, the completion); the paper."""
    seed: int = 0
    """Of everything random: same seed, same result on the same machine."""

    def __post_init__(self) -> None:
        for name, kind in (("sft", SFT), ("negatives", Negatives), ("dpo", DPO)):
            stage = getattr(self, name)
            may_be_none = kind is Negatives
            expected = f"an instance of {kind.__name__}" + " or None" * may_be_none
            fits = isinstance(stage, kind) or (may_be_none and stage is None)
            check_option(f"Recipe.{name}", stage, expected, fits)
        try:
            if self.alpha is not None:
                check_alpha(self.alpha)
                fits = self.alpha <= MOST_ALPHA
                check_option("alpha", self.alpha, f"{MOST_ALPHA:g} at most", fits)
            if self.tau is not None:
                check_tau(self.tau)
        except ValueError as error:
            raise ValueError(f"Recipe.{error}") from None
        _check_positive("Recipe.repetition_penalty", self.repetition_penalty)
        if self.max_new_tokens is not None:
            _check_count("Recipe.max_new_tokens", self.max_new_tokens)
        _check_count("Recipe.max_length", self.max_length, 2)
        _check_count("Recipe.max_words", self.max_words)
        _check_count("Recipe.seed", self.seed, 0)
        check_option("Recipe.seed", self.seed, "below 2**32", self.seed < 2**32)

    @classmethod
    def paper(cls, *, long_form: bool = False) -> "Recipe":
        """Return the authors' settings for 7B models.

        `long_form`: those of their three long tasks (abstracts, reviews, posts).
        """
        paper = cls(alpha=Contrast.alpha, tau=Contrast.tau, max_new_tokens=100)
        if long_form:
            return replace(paper, max_new_tokens=600, repetition_penalty=1.2)
        return paper

    @classmethod
    def for_model(cls, base: Sized, history: Sequence[Any], *, seed: int = 0) -> "Recipe":
        """Return the paper's settings scaled to the size of `base` and the items in `history`.

        A smaller model needs larger steps: at the paper's 1e-4 one of 7 million parameters learns
        nothing; at 1e-3 to 2e-3 it learns the user, at 5e-3 it overfits. One of 135 million learns
        its users better at 1e-3 and at 2e-3 than at 5e-4 (`benchmarks/recipes/`), and gets 1.5e-3.
        From there to the paper's size the rate follows a power law. A small model also gets the
        adapter, of the paper's rank, on every linear layer. A history too short for 12 steps in the
        paper's two epochs gets more epochs, for as many steps. With fewer than 24 items a small
        model that has a task adapter takes smaller steps: √(n / 24) of the rate. At 7B and above,
        from 21 items on, this is the paper.

        Below a billion parameters no negatives are mined: at 7 million DPO on them added nothing,
        whichever answer was rejected, and takes two fifths of the time (`benchmarks/recipes/`).
        """
        growth = _rate_growth(base, _USER_POWER)
        is_small = base.num_parameters < SMALL
        steps_an_epoch = math.ceil(len(history) / SFT.batch_size) or 1
        epochs = max(SFT.epochs, math.ceil(LEAST_STEPS / steps_an_epoch))
        targets = "linear" if is_small else "attention"
        if is_small and getattr(base, "task_adapter", None) is not None:
            share = math.sqrt(min(1.0, max(1, len(history)) / FULL_RATE_ITEMS))
            growth = _two_digits(growth * share)
        sft = SFT(learning_rate=1e-4 * growth, epochs=epochs, targets=targets)
        negatives = None if is_small else Negatives()
        return cls(sft=sft, negatives=negatives, dpo=DPO(learning_rate=5e-6 * growth), seed=seed)

    @classmethod
    def for_task(cls, base: Sized, items: Sequence[Any], *, seed: int = 0) -> "Recipe":
        """Return the paper's settings of a task adapter, the rate scaled to the size of `base`.

        The paper has it on q, k, v and o; here it is on every linear layer, which all
        architectures have. `items` are those of all users.
        """
        rate = 1e-4 * _rate_growth(base, _TASK_POWER)
        sft = SFT(rate, epochs=3, batch_size=8, rank=16, lora_alpha=16, targets="linear")
        return cls(sft=sft, seed=seed)

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data that JSON can hold."""
        plain = asdict(self)
        if isinstance(self.sft.targets, tuple):
            plain["sft"]["targets"] = list(self.sft.targets)
        return plain


def _rate_growth(base: Sized, power: float) -> float:
    """Return by what factor a model of that size learns with larger steps than the paper's."""
    shrunk = max(1.0, PAPER_PARAMETERS / max(1, base.num_parameters))
    return _two_digits(min(15.0, shrunk**power))  # 15 at most, where 1e-4 becomes 1.5e-3


def _two_digits(growth: float) -> float:
    """Return a rate's growth as exactly as rates can be told apart."""
    return float(f"{growth:.2g}")


RecipeChoice = Recipe | Callable[[Sized, Sequence[Any]], Recipe] | None
"""A recipe, a function that makes one for a base and the items to train on, or None: the default.

The default is `Recipe.for_model`.
"""


def recipe_for(choice: RecipeChoice, base: Sized, items: Sequence[Any]) -> Recipe:
    """Return the recipe of that choice for `base` and the `items` to train on.

    Raises InputError where a function does not return a `Recipe`.
    """
    if choice is None:
        return Recipe.for_model(base, items)
    if isinstance(choice, Recipe):
        return choice
    recipe = choice(base, items)
    if not isinstance(recipe, Recipe):
        raise InputError(f"the function given as recipe returned {recipe!r:.80}, not a Recipe")
    return recipe
