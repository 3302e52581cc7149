"""How far a training has come, on standard error: bars on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from langchain_core.callbacks import BaseCallbackHandler

    from langchain_cope.training.progress import Progress

LINE_SECONDS = 10.0  # between two lines of one stage, where there is no terminal
STAGES = {
    "history": "history",
    "load": "base model",
    "sft": "SFT",
    "negatives": "negatives",
    "dpo": "DPO",
    "evaluate": "evaluation",
    "publish": "gate",
}


class Display(Protocol):
    """Shows stages; the last one started is the one under way."""

    def start(self, stage: str) -> None:
        """A stage begins."""

    def step(
        self, stage: str, step: int, total: int, loss: float | None, seconds_left: float | None
    ) -> None:
        """``step`` of ``total`` is done; the loss is the step's, the seconds are the stage's."""

    def end(self, stage: str) -> None:
        """A stage is done."""


@contextmanager
def display(prefix: str = "", *, transient: bool = False) -> Iterator[Display]:
    """A display for the time of a block; ``prefix`` goes before every stage, and ``transient`` bars vanish at the end."""
    if not sys.stderr.isatty():
        yield _Lines(prefix)
        return
    with _bars(transient) as bars:
        yield _Bars(bars, prefix)


@contextmanager
def counted(what: str) -> Iterator[Callable[[int], None]]:
    """How many of something are done, told on standard error once it takes a while."""
    started = told = time.monotonic()
    ending = "\r" if sys.stderr.isatty() else "\n"

    def count(number: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told > (1.0 if ending == "\r" else LINE_SECONDS):
            told = now
            print(
                f"{number} {what}, {number / (now - started):.0f} a second",
                end=ending,
                file=sys.stderr,
                flush=True,
            )

    yield count
    if told != started and ending == "\r":
        print(file=sys.stderr)


def listener(shown: Display) -> "BaseCallbackHandler":
    """The handler through which a PersonalizeUser tells ``shown`` of its stages and steps."""
    from langchain_core.callbacks import BaseCallbackHandler

    class Listener(BaseCallbackHandler):
        run_inline = True  # on the training's thread: order is kept, and Ctrl-C is heard

        def __init__(self) -> None:
            self.stages: dict[Any, str] = {}

        def on_chain_start(
            self, serialized: Any, inputs: Any, *, run_id: Any, name: Any = None, **_: Any
        ) -> None:
            if name in STAGES:
                self.stages[run_id] = name
                shown.start(name)

        def on_chain_end(self, outputs: Any, *, run_id: Any, **_: Any) -> None:
            if run_id in self.stages:
                shown.end(self.stages.pop(run_id))

        def on_custom_event(self, name: str, data: Any, **_: Any) -> None:
            if name == "cope.progress":
                shown.step(
                    data["stage"], data["step"], data["total"], data["loss"], data["seconds_left"]
                )

    return Listener()


def follower(shown: Display) -> "Callable[[Progress], None]":
    """An ``on_progress`` for `evaluate_user`, which tells of steps only: where one stage ends, the next begins."""
    stages = ["sft", "negatives", "dpo", "evaluate"]
    shown.start(stages[0])

    def follow(progress: "Progress") -> None:
        if progress.stage != stages[0]:  # one was skipped
            shown.end(stages.pop(0))
            shown.start(stages[0])
        shown.step(
            progress.stage, progress.step, progress.total, progress.loss, progress.seconds_left
        )
        if progress.step >= progress.total and stages[1:]:
            shown.end(stages.pop(0))
            shown.start(stages[0])

    return follow


def duration(seconds: float) -> str:
    """A time for people: 4.2 s, 2 min 5 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


class _Lines:
    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._started: dict[str, float] = {}
        self._said = 0.0

    def start(self, stage: str) -> None:
        self._started[stage] = self._said = time.monotonic()
        self._say(f"{STAGES[stage]}: started")

    def step(
        self, stage: str, step: int, total: int, loss: float | None, seconds_left: float | None
    ) -> None:
        if time.monotonic() - self._said < LINE_SECONDS:
            return
        self._said = time.monotonic()
        left = "" if seconds_left is None else f", about {duration(seconds_left)} left"
        self._say(f"{STAGES[stage]}: {step} of {total}{_loss(loss)}{left}")

    def end(self, stage: str) -> None:
        started = self._started.pop(stage, None)
        if started is not None:
            self._say(f"{STAGES[stage]}: done in {duration(time.monotonic() - started)}")

    def _say(self, line: str) -> None:
        print(f"{self._prefix}{line}", file=sys.stderr, flush=True)


class _Bars:
    def __init__(self, bars: Any, prefix: str) -> None:
        self._bars = bars
        self._prefix = prefix
        self._tasks: dict[str, Any] = {}
        self._started: dict[str, float] = {}

    def start(self, stage: str) -> None:
        self._started[stage] = time.monotonic()
        self._tasks[stage] = self._bars.add_task(
            f"{self._prefix}{STAGES[stage]}", total=None, loss="", left=""
        )

    def step(
        self, stage: str, step: int, total: int, loss: float | None, seconds_left: float | None
    ) -> None:
        left = "" if seconds_left is None else f"{duration(seconds_left)} left"
        changes = {"total": total, "completed": step, "left": left}
        if loss is not None:
            changes["loss"] = f"loss {loss:.3f}"
        self._bars.update(self._tasks[stage], **changes)

    def end(self, stage: str) -> None:
        if stage not in self._started:
            return
        took = duration(time.monotonic() - self._started.pop(stage))
        task = self._bars.tasks[self._tasks[stage]]
        total = task.total or 1
        self._bars.update(self._tasks[stage], total=total, completed=total, left=took)


def _bars(transient: bool) -> Any:
    from rich.progress import BarColumn, Progress, TextColumn

    from cope_lc.screen import console

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[loss]}", markup=False),
        TextColumn("{task.fields[left]}", markup=False),
        console=console(stderr=True),
        redirect_stdout=False,
        transient=transient,
    )


def _loss(loss: float | None) -> str:
    return "" if loss is None else f", loss {loss:.3f}"
