"""What is asked of the engine, and a request on its way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from langchain_cope.engine.adapter import Adapter
from langchain_cope.engine.decoding.sampling import Sampling
from langchain_cope.engine.grammar.constraint import Constraint
from langchain_cope.engine.grammar.schema import Grammar
from langchain_cope.engine.options import Contrast

if TYPE_CHECKING:
    from langchain_cope.engine.decoding.speculation import PromptLookup
    from langchain_cope.engine.rows import Row


@dataclass(frozen=True)
class AdapterSource:
    """An adapter that the engine loads into one of its slots when a request needs it, and keeps there while it can."""

    name: str
    """Stands for these very matrices, for good: a user's version, never a user alone. Slots and caches go by it."""
    folder: Callable[[], Path] = field(compare=False)
    """Gives the peft folder, fetching it where need be; called off the hot path. What it raises, the request raises."""


@dataclass(frozen=True)
class Request:
    """One prompt to answer."""

    prompt: Sequence[int]
    """Token ids, the generation prompt included."""
    adapter: Adapter | AdapterSource | None = None
    """None: the base alone."""
    contrast: Contrast = field(default_factory=Contrast)
    """How strongly the personal model is contrasted with the base; without an adapter there is nothing to contrast."""
    sampling: Sampling = field(default_factory=Sampling)
    deadline: float | None = None
    """By ``time.monotonic()``; a request that is not done by then ends with ``TimeoutError``."""
    grammar: Grammar | None = None
    """What the answer is held to; None: anything."""
    logprobs: bool = False
    """Report log π_user and log π_base of every token; this takes two rows even at α = 0."""
    goes_on: bool = True
    """Later prompts may begin with this answer, as a chat's do; False: it is not worth the memory of keeping its states."""

    @property
    def contrastive(self) -> bool:
        """Whether the base's distribution enters the choice of tokens."""
        return self.adapter is not None and self.contrast.needs_base

    @property
    def two_rows(self) -> bool:
        """Whether the base is computed beside the adapter."""
        return self.adapter is not None and (self.contrast.needs_base or self.logprobs)

    @property
    def num_rows(self) -> int:
        """Rows in the batch."""
        return 2 if self.two_rows else 1


@dataclass(frozen=True)
class TokenLogprobs:
    """How one token came about, in nats. ``reward`` is log p_user − α · log p_base, the paper's implicit reward."""

    token_id: int
    text: str
    log_p_user: float
    log_p_base: float
    reward: float


@dataclass(frozen=True)
class Chosen:
    """The next token of a request."""

    token: int
    changed: bool
    """The contrast's likeliest token is not the personal model's own."""
    logprobs: tuple[float, float] | None = None
    """(log p_user, log p_base), where the request asks for it."""


class Running:
    """A request in the batch and its answer so far."""

    def __init__(self, request: Request, limit: int) -> None:
        self.request = request
        self.limit = limit
        """Tokens of prompt and answer, at most."""
        self.adapter: Adapter | None = (
            request.adapter if isinstance(request.adapter, Adapter) else None
        )
        """Set before the request joins the batch, where its adapter comes from a slot."""
        self.ids: list[int] = []
        """The answer."""
        self.tokens = list(request.prompt)
        """Prompt and answer."""
        self.num_changed = 0
        self.finished = False
        """The newest token ended the answer."""
        self.rows: tuple[Row, ...] = ()
        """In the batch: the personal row, then the base's where the request has two."""
        self.lookup: PromptLookup | None = None
        """Where speculation looks for what comes next."""
        self.constraint: Constraint | None = None
        """What may come next, where the request has a grammar."""

    def take(self, chosen: Chosen) -> bool:
        """Append a token; False where it ends the answer."""
        self.ids.append(chosen.token)
        self.tokens.append(chosen.token)
        self.num_changed += chosen.changed
        if self.lookup is not None:
            self.lookup.push(chosen.token)
        if self.constraint is not None:
            self.constraint.push(chosen.token)
        return len(self.tokens) < self.limit
