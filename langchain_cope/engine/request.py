"""What is asked of the engine. Its state on the way to the answer is `answer.ActiveRequest`."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from langchain_cope.engine.adapter import Adapter
from langchain_cope.engine.decoding.sampling import Sampling
from langchain_cope.engine.grammar.schema import Grammar
from langchain_cope.engine.options import Contrast, check_adapter_scale
from langchain_cope.engine.reply import ReplyParts


@dataclass(frozen=True)
class AdapterSource:
    """An adapter that the engine loads into one of its slots when a request needs it.

    It stays there as long as it can.
    """

    name: str
    """Stands for these very matrices, for good: a user's version, never a user alone.

    Slots and caches go by it.
    """
    folder: Callable[[], Path] = field(compare=False)
    """Returns the peft folder, fetching it where need be; called off the hot path.

    What it raises, the request raises.
    """
    label: str = field(default="", compare=False)
    """What errors call it; empty: its name."""


@dataclass(frozen=True)
class Request:
    """One prompt to answer. Raises ValueError for an adapter scale out of range."""

    prompt: Sequence[int]
    """Token ids, the generation prompt included."""
    adapter: Adapter | AdapterSource | None = None
    """None: the base alone."""
    contrast: Contrast = field(default_factory=Contrast)
    """How strongly the personal model is contrasted with the base; no adapter, no contrast."""
    sampling: Sampling = field(default_factory=Sampling)
    deadline: float | None = None
    """By `time.monotonic()`; a request that is not done by then ends with TimeoutError."""
    grammar: Grammar | None = None
    """What the answer is held to; None: anything."""
    parts: ReplyParts | None = None
    """What the reply may hold beside the answer; None: all of it is the answer."""
    logprobs: bool = False
    """Report log π_user and log π_base of every token; this takes two rows even at α = 0."""
    closing: tuple[int, ...] = ()
    """What the chat template puts after the end of the turn: read, not chosen, once that came.

    With `logprobs` its log-probabilities are reported, too: of all that a trainer sees.
    """
    offline: bool = False
    """Nobody waits for its tokens, and the same requests alone in the batch get the same answers.

    All others are answered first, and take its room where there is no other.
    What goes by a clock, or by earlier answers, stays away from it: speculation, prompts read in
    small pieces for the sake of others, the prefix cache.
    """
    adapter_scale: float = 1.0
    """What the adapter's low-rank products are multiplied with; 0: the base alone."""
    base_prompt: Sequence[int] | None = None
    """What the base's row reads instead of `prompt`; None: the same.

    So the personal row alone may read what its user wrote before. A repetition penalty counts what
    both read, which is this.
    """
    early_exit: int | None = None
    """Layers after which the base's row is read out: a weaker model to be contrasted away.

    None: all of them, which is the base. For comparisons; see `Forward.num_layers`.
    """
    cache_owner: Hashable = None
    """Only requests of the same owner share what was computed of their prompts.

    So that nobody learns from timing what others asked. It holds for the base's row, too; rows with
    an adapter share with those of the same adapter and owner alone.
    """
    public_prefix: Sequence[int] = ()
    """Leading tokens that are no secret: whoever begins with them shares that much with anybody."""
    holder: object = field(default=None, compare=False, repr=False)
    """For whom it is answered; `Engine.release` of that object ends it."""

    def __post_init__(self) -> None:
        check_adapter_scale(self.adapter_scale)

    @property
    def personal(self) -> bool:
        """True where an adapter has a say."""
        return self.adapter is not None and self.adapter_scale > 0

    @property
    def model_label(self) -> str:
        """What errors call the model that answers: the adapter, or the base alone."""
        if self.adapter is None or not self.personal:
            return "the base"
        label = self.adapter.label if isinstance(self.adapter, AdapterSource) else ""
        return f"the adapter {label or self.adapter.name or 'given'}"

    @property
    def contrastive(self) -> bool:
        """True where the base's distribution enters the choice of tokens."""
        held_back = self.grammar is not None and self.contrast.rule == "adaptive"
        return self.personal and self.contrast.needs_base and not held_back

    @property
    def two_rows(self) -> bool:
        """True where the base is computed beside the adapter."""
        return self.contrastive or (self.personal and self.logprobs)

    @property
    def prompts(self) -> tuple[Sequence[int], ...]:
        """What each of its rows reads: the personal one, then the base's where it has two."""
        both = self.prompt, self.prompt if self.base_prompt is None else self.base_prompt
        return both[: self.num_rows]

    @property
    def num_rows(self) -> int:
        """Rows in the batch."""
        return 2 if self.two_rows else 1
