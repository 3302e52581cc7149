"""The stages of a personalization, and the monitor that times them and may stop them.

A stage's name, its label for people and the file it leaves are written down here and nowhere else.
Knows no trainer and no model.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from langchain_cope.errors import Cancelled


class Stage(StrEnum):
    """One stage of a personalization, in running order; its value names it in runs and timings."""

    label: str
    """The name for people."""
    file: str
    """The file or folder that the finished stage leaves in the job's folder; empty for none."""

    HISTORY = "history", "history"
    LOAD = "load", "base model"
    SFT = "sft", "SFT", "sft"
    NEGATIVES = "negatives", "negatives", "negatives.json"
    DPO = "dpo", "DPO", "dpo"
    EVALUATE = "evaluate", "evaluation", "evaluation.json"
    STRENGTH = "strength", "strength", "strength.json"
    PUBLISH = "publish", "gate"

    def __new__(cls, value: str, label: str = "", file: str = "") -> "Stage":
        """Make the member of that value."""
        stage = str.__new__(cls, value)
        stage._value_ = value
        stage.label = label
        stage.file = file
        return stage


@dataclass(frozen=True)
class Progress:
    """One finished step of one stage."""

    stage: Stage
    step: int
    """Steps done so far, this one included."""
    total: int
    """Steps of the whole stage."""
    loss: float | None = None
    """Loss of this step, in the stages of the two trainers."""
    seconds_left: float | None = None
    """Seconds that the stage still takes, judged by the steps so far."""


class Monitor:
    """Times the stages of one run, hears of their steps and says when to stop.

    This one is silent and never stops. A subclass overrides `report` and `should_stop`, and wraps
    `stage`. All of them are called on the training's thread.
    """

    timings: dict[str, float]
    """Seconds of each finished stage, by its name."""

    def __init__(self) -> None:
        self.timings = {}
        self._stage: Stage | None = None
        self._started = 0.0

    def should_stop(self) -> bool:
        """Return whether the run is to stop; asked at least once a step."""
        return False

    def report(self, progress: Progress) -> None:
        """Hear of a finished step."""

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Run the block as `stage`, and time it where it succeeds.

        Raises `Cancelled` before the block where a stop was asked for.
        """
        if self.should_stop():
            raise Cancelled(f"stopped on request before '{stage}'; nothing was published")
        self._stage, self._started = stage, time.monotonic()
        try:
            yield
        finally:
            self._stage = None
        self.timings[stage.value] = round(time.monotonic() - self._started, 3)

    def step_done(self, step: int, total: int, loss: float | None = None) -> None:
        """Report that `step` of the `total` steps of the stage under way is done."""
        if self._stage is None:
            raise RuntimeError("a step was done outside of a stage: enter Monitor.stage() first")
        seconds_left = None
        if step:
            seconds_left = (time.monotonic() - self._started) / step * (total - step)
        self.report(Progress(self._stage, step, total, loss, seconds_left))

    def raise_if_stopped(self) -> None:
        """Raise `Cancelled` where a stop was asked for."""
        if self.should_stop():
            raise Cancelled(
                f"stopped on request in the stage '{self._stage}'; nothing was published"
            )
