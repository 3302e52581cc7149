"""The ways of answering that are compared: one table, which metrics, samples and tables iterate.

A new way is one more entry. Knows no torch, so that the command line can read it.
"""

from dataclasses import dataclass

from langchain_cope.training.progress import Stage


@dataclass(frozen=True)
class Way:
    """One way of answering for a user."""

    name: str
    """Its key in metrics and samples, and its name in tables."""
    adapter: Stage | None = None
    """The stage that trained the adapter which answers; None: the base alone."""
    contrastive: bool = False
    """Whether the base is contrasted away, with the recipe's α and τ."""

    @property
    def has_nll(self) -> bool:
        """Whether its likelihood of the user's own text is measured.

        A contrastive way has none: about half of the true next tokens of a small model lie outside
        its plausible head.
        """
        return not self.contrastive


BASE = Way("base")
SFT = Way("sft", Stage.SFT)
DPO = Way("dpo", Stage.DPO)
COPE = Way("cope", Stage.DPO, contrastive=True)
WAYS = (BASE, SFT, DPO, COPE)
"""All of them, in the order in which they are shown."""
