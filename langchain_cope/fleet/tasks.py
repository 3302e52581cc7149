"""What is handed to a worker, and what comes back. Plain data: it crosses processes and machines.

Plan ──→ a worker loads its base once
Task ──→ the worker trains one user ──→ Outcome ──→ the ledger
"""

import errno
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from adapter_store.errors import BackendError
from langchain_cope.errors import HistoryUnreachable
from langchain_cope.fleet.skewed_gains import Gains
from langchain_cope.history.items import UserHistory
from langchain_cope.training.recipe import RecipeChoice

_SURROUNDINGS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE}


def is_of_surroundings(error: Exception) -> bool:
    """Return whether a store, a disk or a source failed, which is no user's fault."""
    if isinstance(error, OSError):
        return error.errno in _SURROUNDINGS
    return isinstance(error, BackendError | HistoryUnreachable)


@dataclass(frozen=True)
class Plan:
    """What is the same for all users of a fleet."""

    model: str
    store: str
    """Folder or URL; keys and pepper come of each worker's environment."""
    job_dir: str
    """Where a worker keeps finished stages, so that another one goes on after them."""
    recipe: RecipeChoice = None
    task_adapter: str | None = None
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    """Threads that a worker computes with on a CPU; None: as torch has it."""


class State(StrEnum):
    """What became of a user."""

    CANDIDATE = "candidate"
    """It passed the gate and waits."""
    REFUSED = "refused"
    """The gate refused it."""
    UNFIT = "unfit"
    """The history cannot be trained on: too short, most often."""
    ERASED = "erased"
    """The user was erased while the fleet ran."""
    FAILED = "failed"
    """Something went wrong, twice."""
    UNCHANGED = "unchanged"
    """An earlier fleet has published or refused just this."""
    PUBLISHED = "published"
    UNSURE = "unsure"
    """It passed the gate, but among so many users that is no proof."""
    SUPERSEDED = "superseded"
    """Another version became active, or another fleet's candidate took its place."""
    UNAVAILABLE = "unavailable"
    """The store or the disk failed; the user waits for another try."""
    STOPPED = "stopped"
    """The fleet was stopped; the next run goes on."""


@dataclass(frozen=True)
class Outcome:
    """What a worker has to say of one user."""

    state: State
    reason: str = ""
    key: str | None = None
    """Digest of all that the result depends on: base, recipe, history."""
    version: str | None = None
    """Of the candidate."""
    verdict: dict[str, Any] | None = None
    voice: float | None = None
    """By how much answers are more like the user's own than the base's are, as chrF."""
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds of each stage."""
    num_trained: int = 0
    num_held_out: int = 0

    @property
    def is_tested(self) -> bool:
        """Whether the gate judged it in this fleet, for or against."""
        return self.verdict is not None and self.state is not State.UNCHANGED

    @property
    def gains(self) -> Gains:
        """What the gate saw; a p-value of 1 for what it refused."""
        verdict = self.verdict or {"published": False}
        return Gains(
            p_value=float(verdict["p_value"]) if verdict["published"] else 1.0,
            num_texts=verdict.get("num_texts", 0),
            mean_in_sds=verdict.get("mean_in_sds", 0.0),
            skewness=verdict.get("skewness", 0.0),
        )


@dataclass(frozen=True)
class Task:
    """One user to train."""

    user: str
    user_key: str
    """The user in ledger and logs."""
    history: UserHistory
    data_seq: int
    """Where the store's log was before the fleet first read the history: an erasure since counts.
    """
    known: frozenset[str] = frozenset()
    """Keys of trainings that earlier fleets refused: not done again."""
