"""What came of a fleet, user by user and over all of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, quantiles
from typing import Any

from langchain_cope.fleet.discoveries import LEVEL
from langchain_cope.fleet.tasks import Outcome, State


@dataclass(frozen=True)
class Distribution:
    """How a figure is spread over users."""

    num_users: int
    mean: float
    least: float
    quarter: float
    median: float
    three_quarters: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Distribution | None":
        """Return that of some values; None of none."""
        if not values:
            return None
        few = [*values, *values] if len(values) == 1 else values
        low, mid, high = quantiles(few, n=4, method="inclusive")
        return cls(len(values), fmean(values), min(values), low, mid, high, max(values))


@dataclass(frozen=True)
class FleetReport:
    """What became of every user of a fleet."""

    users: Mapping[str, Outcome]
    """By user id, in the source's order."""
    unreadable: Mapping[str, str]
    """What of the source could not be read, and why."""
    seconds: float
    """Of this run."""
    num_workers: int

    @property
    def counts(self) -> Counter[State]:
        """How many users came to which end."""
        return Counter(outcome.state for outcome in self.users.values())

    @property
    def failures(self) -> Counter[str]:
        """How many users failed for which reason."""
        failed = (State.FAILED, State.UNAVAILABLE)
        return Counter(one.reason for one in self.users.values() if one.state in failed)

    @property
    def gains(self) -> list[float]:
        """Nats a token by which held-out texts became likelier, of all users who were judged."""
        judged = [one.verdict for one in self.users.values() if one.is_tested]
        return [verdict["mean_gain"] for verdict in judged if verdict is not None]

    @property
    def voices(self) -> list[float]:
        """By how much answers come nearer to their users than the base's, of those judged."""
        return [one.voice for one in self.users.values() if one.voice is not None]

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of each stage, over all users."""
        total: Counter[str] = Counter()
        for outcome in self.users.values():
            total.update(outcome.timings)
        return {stage: round(seconds, 3) for stage, seconds in total.items()}

    @property
    def is_complete(self) -> bool:
        """Whether nobody failed, and everything could be read."""
        return not self.failures and not self.unreadable

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON can keep it."""
        gains, voices = Distribution.of(self.gains), Distribution.of(self.voices)
        return {
            "num_users": len(self.users),
            "counts": {state.value: number for state, number in self.counts.most_common()},
            "false_discovery_rate": LEVEL,
            "gain": asdict(gains) if gains else None,
            "voice": asdict(voices) if voices else None,
            "failures": dict(self.failures.most_common()),
            "unreadable": dict(self.unreadable),
            "seconds": round(self.seconds, 1),
            "num_workers": self.num_workers,
            "phases": self.phases,
            "users": [{"user_id": user, **asdict(one)} for user, one in self.users.items()],
        }
