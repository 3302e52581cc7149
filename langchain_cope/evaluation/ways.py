"""The ways of answering that are compared: one table, which metrics, samples and tables iterate.

A new way is one more entry. Knows no torch, so that the command line can read it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from langchain_cope.errors import InputError
from langchain_cope.training.progress import Stage


class Shown(StrEnum):
    """Which of the user's own items stand in the prompt, as earlier turns of a conversation."""

    NOTHING = "nothing"
    NEWEST = "newest"
    """As many of the newest as the context holds, the same for questions of about a length."""
    RETRIEVED = "retrieved"
    """The few that are most like the question."""


@dataclass(frozen=True)
class Way:
    """One way of answering for a user."""

    name: str
    """Its key in metrics and samples, and its name in tables."""
    adapter: Stage | None = None
    """The stage that trained the adapter which answers; None: the base alone.

    A user's adapter stands on the base with the task adapter, where one is given.
    """
    contrastive: bool = False
    """Whether the base is contrasted away, with the recipe's α and τ."""
    shown: Shown = Shown.NOTHING
    """What the prompt shows of the user's own items; never to a base that is contrasted away."""
    needs_task: bool = False
    """Whether it is the base with the task adapter that answers."""
    samples: int = 1
    """Above 1: of so many samples the one with the highest implicit reward is the answer."""
    early_exit: bool = False
    """Whether what is contrasted away is a weaker model: the base, read out after half its layers.

    That is plain contrastive decoding, with nothing personal in the contrast.
    """
    of_another: bool = False
    """Whether another user's adapter answers: what is then left is the task, and no person."""

    @property
    def has_nll(self) -> bool:
        """Whether its likelihood of the user's own text is measured.

        A contrastive way has none: about half of the true next tokens of a small model lie outside
        its plausible head. Nor has the best of several samples.
        """
        return not self.contrastive and self.samples == 1


BASE = Way("base")
TASK = Way("task", needs_task=True)
SFT = Way("sft", Stage.SFT)
DPO = Way("dpo", Stage.DPO)
COPE = Way("cope", Stage.DPO, contrastive=True)
WAYS = (BASE, SFT, DPO, COPE)
"""Those that every personalization compares, in the order in which they are shown."""

ALL_WAYS = (
    BASE,
    Way("base+newest", shown=Shown.NEWEST),
    Way("base+retrieved", shown=Shown.RETRIEVED),
    TASK,
    Way("task+retrieved", needs_task=True, shown=Shown.RETRIEVED),
    SFT,
    Way("sft+retrieved", Stage.SFT, shown=Shown.RETRIEVED),
    Way("sft+contrast", Stage.SFT, contrastive=True),
    *(Way(f"sft-best{number}", Stage.SFT, samples=number) for number in (4, 8, 16)),
    DPO,
    COPE,
    Way("dpo+early-exit", Stage.DPO, contrastive=True, early_exit=True),
    Way("cope+retrieved", Stage.DPO, contrastive=True, shown=Shown.RETRIEVED),
    Way("another-dpo", Stage.DPO, of_another=True),
    Way("another-cope", Stage.DPO, contrastive=True, of_another=True),
)
"""Those that can be compared over users, in the order in which they are shown."""
QUICK_WAYS = ("base", "base+retrieved", "task", "sft", "dpo", "cope")
"""Names of those that are compared over users unless others are named."""
REFERENCES = (BASE, TASK, SFT)
"""Those that all others are compared with, pair by pair."""


def ways_named(names: Iterable[str]) -> tuple[Way, ...]:
    """Return the ways of those names, in the table's order. Raises InputError for another name."""
    asked = set(names)
    known = [way.name for way in ALL_WAYS]
    unknown = sorted(asked.difference(known))
    if unknown or not asked:
        given = f"there is no way {unknown[0]!r:.80}" if unknown else "no way was named"
        raise InputError(f"{given}: name some of {', '.join(known)}")
    return tuple(way for way in ALL_WAYS if way.name in asked)
