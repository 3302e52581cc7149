"""How far a training has come, on standard error: bars on a terminal, else a line now and then."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from cope_lc.screen import console
from langchain_cope.training.progress import Monitor, Progress, Stage

if TYPE_CHECKING:
    from langchain_core.callbacks import BaseCallbackHandler

LINE_SECONDS = 10.0  # between two lines of one stage, where there is no terminal


class Display(Protocol):
    """Shows stages; the last one started is the one under way."""

    def start(self, stage: Stage) -> None:
        """Show that a stage begins."""

    def step(self, progress: Progress) -> None:
        """Show that a step of the stage under way is done."""

    def end(self, stage: Stage) -> None:
        """Show that a stage is done."""


@contextmanager
def progress_display(prefix: str = "", *, transient: bool = False) -> Iterator[Display]:
    """Yield a display for the time of a block.

    `prefix` goes before every stage, and `transient` bars vanish at the end.
    """
    if not sys.stderr.isatty():
        yield _Lines(prefix)
        return
    with _bars(transient) as bars:
        yield _Bars(bars, prefix)


class DisplayMonitor(Monitor):
    """Shows stages and steps on a display."""

    def __init__(self, display: Display) -> None:
        super().__init__()
        self._display = display

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Run the block as `stage`, and show it."""
        self._display.start(stage)
        with super().stage(stage):
            yield
        self._display.end(stage)

    def report(self, progress: Progress) -> None:
        """Show a step."""
        self._display.step(progress)


def listener(display: Display) -> "BaseCallbackHandler":
    """Return the handler that shows a `PersonalizeUser`'s stages and steps on a display."""
    from langchain_core.callbacks import BaseCallbackHandler

    from langchain_cope.personalize import PROGRESS

    names = set(Stage)

    class Listener(BaseCallbackHandler):
        run_inline = True  # on the training's thread: order is kept, and Ctrl-C is heard

        def __init__(self) -> None:
            self.stages: dict[Any, Stage] = {}  # by run

        def on_chain_start(
            self, serialized: Any, inputs: Any, *, run_id: Any, name: Any = None, **_: Any
        ) -> None:
            if name in names:
                self.stages[run_id] = Stage(name)
                display.start(self.stages[run_id])

        def on_chain_end(self, outputs: Any, *, run_id: Any, **_: Any) -> None:
            if run_id in self.stages:
                display.end(self.stages.pop(run_id))

        def on_custom_event(self, name: str, data: Any, **_: Any) -> None:
            if name == PROGRESS:
                facts = {key: value for key, value in data.items() if key != "user_id"}
                display.step(Progress(**facts | {"stage": Stage(data["stage"])}))

    return Listener()


def duration(seconds: float) -> str:
    """Return a time for people: 4.2 s, 2 min 5 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


class _Lines:
    """Lines on standard error: when a stage begins and ends, and now and then in between."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._started: dict[Stage, float] = {}
        self._said = 0.0

    def start(self, stage: Stage) -> None:
        self._started[stage] = self._said = time.monotonic()
        self._say(f"{stage.label}: started")

    def step(self, progress: Progress) -> None:
        if time.monotonic() - self._said < LINE_SECONDS:
            return
        self._said = time.monotonic()
        line = f"{progress.stage.label}: {progress.step} of {progress.total}"
        if progress.loss is not None:
            line += f", loss {progress.loss:.3f}"
        if progress.seconds_left is not None:
            line += f", about {duration(progress.seconds_left)} left"
        self._say(line)

    def end(self, stage: Stage) -> None:
        started = self._started.pop(stage, None)
        if started is not None:
            self._say(f"{stage.label}: done in {duration(time.monotonic() - started)}")

    def _say(self, line: str) -> None:
        print(f"{self._prefix}{line}", file=sys.stderr, flush=True)


class _Bars:
    """A bar a stage, drawn by rich."""

    def __init__(self, bars: Any, prefix: str) -> None:
        self._bars = bars
        self._prefix = prefix
        self._tasks: dict[Stage, Any] = {}
        self._started: dict[Stage, float] = {}

    def start(self, stage: Stage) -> None:
        self._started[stage] = time.monotonic()
        description = f"{self._prefix}{stage.label}"
        self._tasks[stage] = self._bars.add_task(description, total=None, loss="", left="")

    def step(self, progress: Progress) -> None:
        left = ""
        if progress.seconds_left is not None:
            left = f"{duration(progress.seconds_left)} left"
        changes = {"total": progress.total, "completed": progress.step, "left": left}
        if progress.loss is not None:
            changes["loss"] = f"loss {progress.loss:.3f}"
        self._bars.update(self._tasks[progress.stage], **changes)

    def end(self, stage: Stage) -> None:
        if stage not in self._started:
            return
        took = duration(time.monotonic() - self._started.pop(stage))
        task = self._bars.tasks[self._tasks[stage]]
        total = task.total or 1
        self._bars.update(self._tasks[stage], total=total, completed=total, left=took)


def _bars(transient: bool) -> Any:
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[loss]}", markup=False),
        TextColumn("{task.fields[left]}", markup=False),
        console=console(stderr=True),
        redirect_stdout=False,
        transient=transient,
    )
