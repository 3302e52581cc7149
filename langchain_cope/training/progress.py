"""How far the chain has come, and whether it should stop. Knows no trainer and no model."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from langchain_cope.errors import Cancelled


@dataclass(frozen=True)
class Progress:
    """One step of one stage; ``stage`` is "sft", "negatives", "dpo" or "evaluate"."""

    stage: str
    step: int
    total: int
    loss: float | None = None
    """Of the step, in the two trainers' stages."""
    seconds_left: float | None = None
    """Of this stage, judged by the steps so far."""


def unheard(progress: Progress) -> None:
    """Take no notice of progress: the default of ``on_progress``."""


def never() -> bool:
    """Do not stop: the default of ``should_stop``."""
    return False


class Watch:
    """Reports one stage's steps and asks whether to stop."""

    def __init__(
        self, stage: str, on_progress: Callable[[Progress], None], should_stop: Callable[[], bool]
    ) -> None:
        self.stage = stage
        self.should_stop = should_stop
        self._on_progress = on_progress
        self._started = time.monotonic()

    def report(self, step: int, total: int, loss: float | None = None) -> None:
        """Say that ``step`` of ``total`` is done."""
        seconds_left = (time.monotonic() - self._started) / step * (total - step) if step else None
        self._on_progress(Progress(self.stage, step, total, loss, seconds_left))

    def raise_if_stopped(self) -> None:
        """Raise ``Cancelled`` where a stop was asked for."""
        if self.should_stop():
            raise Cancelled(
                f"stopped on request in the stage {self.stage!r}; nothing was published"
            )
