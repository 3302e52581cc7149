"""Cancel: trainings of a tiny base cancelled at random moments, and what is left of them.

Each round starts `PersonalizeUser.ainvoke` and cancels its task after a time drawn evenly from the
length of a whole run, so that every stage is hit. Measured is the time from `cancel()` until the
task has ended; beside it is the longest training step of a run that was not cancelled. After each
round these are counted: new threads, temporary files, adapter files and versions in the store, rows
and requests in the engine. The engine has one second to become idle; how long it took is reported.

Then one more run is not cancelled, and its adapter is compared byte for byte with the first one's.
The last line is one JSON object. The exit status is 1 where anything was left or differs.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from langchain_core.callbacks import BaseCallbackHandler
from transformers.utils import logging as transformers_logging

from adapter_store import AdapterStore
from langchain_cope import PersonalizeUser
from langchain_cope.engine import Engine, load_base

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from personal import FOUR_STEPS, ROWS
from tiny import make_model

IDLE_SECONDS = 1.0  # in which the engine has to become idle


class Steps(BaseCallbackHandler):
    """The stage under way, and the longest training step."""

    run_inline = True

    def __init__(self) -> None:
        self.stage = "start"
        self.longest = 0.0
        self._last: float | None = None

    def on_chain_start(self, serialized: Any, inputs: Any, *, name: Any = None, **_: Any) -> None:
        """Note that a stage begins."""
        self.stage = str(name)
        self._last = None  # what a stage sets up is no step

    def on_custom_event(self, name: str, data: Any, **_: Any) -> None:
        """Note that a training step, or in other stages some items, are done."""
        now = time.perf_counter()
        if self._last is not None and data["stage"] in ("sft", "dpo"):
            self.longest = max(self.longest, now - self._last)
        self._last = now


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cancels", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        facts = asyncio.run(run(Path(folder), options.cancels, options.seed))
    machine = {"cores": os.cpu_count(), "torch": torch.__version__}
    print(json.dumps({"benchmark": "cancel", **machine, **facts}))
    sys.exit(1 if facts["left"] or not facts["same_adapter_afterwards"] else 0)


async def run(folder: Path, num_cancels: int, seed: int) -> dict[str, Any]:
    model = make_model(folder / "base", initializer_range=0.05)
    base = load_base(model, device="cpu", dtype="float32")
    personalize = PersonalizeUser(model=base.name, device="cpu", dtype="float32", recipe=FOUR_STEPS)
    warm, first, store = (AdapterStore(folder / name) for name in ("warm", "first", "store"))
    temporary = folder / "temporary"
    temporary.mkdir()
    tempfile.tempdir = str(temporary)
    await train(personalize, warm)
    steps = Steps()
    started = time.perf_counter()
    await train(personalize, first, steps)
    seconds, longest = time.perf_counter() - started, steps.longest
    longest_ms = f"{longest * 1000:.0f} ms"
    print(f"a whole run takes {seconds:.2f} s, its longest training step {longest_ms}", flush=True)

    threads = set(threading.enumerate())
    draw = random.Random(seed)
    stages: Counter[str] = Counter()
    left: list[str] = []
    ends: list[tuple[float, str]] = []
    idle: list[float] = []
    num_too_late = 0
    while len(ends) < num_cancels:
        steps = Steps()
        task = asyncio.create_task(train(personalize, store, steps))
        await asyncio.sleep(draw.uniform(0, seconds))
        if task.done():  # it was quicker than the first
            num_too_late += 1
            store.delete_version("alice", (await task).version)
            continue
        cancelled, stage = time.perf_counter(), steps.stage
        task.cancel()
        try:
            await task
            left.append("the task was not cancelled")
        except asyncio.CancelledError:
            ends.append((time.perf_counter() - cancelled, stage))
        stages[stage] += 1
        idle.append(await until_idle(Engine.of(base)) - cancelled)
        left += left_behind(store, folder / "store", temporary, threads, Engine.of(base))
    await train(personalize, store)
    same = store.fetch(store.resolve("alice")) == first.fetch(first.resolve("alice"))
    print(
        f"{num_cancels} cancelled, in {dict(stages)}; {num_too_late} were done first; "
        f"left: {left or 'nothing'}"
    )
    return {
        "cancelled": len(ends),
        "stages": dict(stages),
        "done_first": num_too_late,
        "run_seconds": round(seconds, 2),
        "longest_step_ms": round(longest * 1000, 1),
        "cancel_ms_median": round(statistics.median(seconds for seconds, _ in ends) * 1000, 1),
        "cancel_ms_max": round(max(ends)[0] * 1000, 1),
        "slowest_in": max(ends)[1],
        "idle_ms_max": round(max(idle) * 1000, 1),
        "left": left,
        "same_adapter_afterwards": same,
    }


async def train(
    personalize: PersonalizeUser, store: AdapterStore, *handlers: BaseCallbackHandler
) -> Any:
    chain = personalize.model_copy(update={"store": store})
    return await chain.ainvoke({"user_id": "alice", "history": ROWS}, {"callbacks": [*handlers]})


async def until_idle(engine: Engine) -> float:
    """Return the time at which the engine was idle, at most `IDLE_SECONDS` from now."""
    deadline = time.perf_counter() + IDLE_SECONDS
    while time.perf_counter() < deadline:
        now = engine.statistics()
        if not (now.rows or now.waiting):
            break
        await asyncio.sleep(0.001)
    return time.perf_counter()


def left_behind(
    store: AdapterStore,
    folder: Path,
    temporary: Path,
    threads: set[threading.Thread],
    engine: Engine,
) -> list[str]:
    """Return what there is that was not there before the training, in words."""
    now = engine.statistics()
    files = [*folder.rglob("versions/*"), *folder.glob("staging/*"), *temporary.iterdir()]
    left = [f"version {version.version}" for version in store.versions("alice")]
    left += [f"file {path}" for path in files]
    left += [f"thread {thread.name}" for thread in set(threading.enumerate()) - threads]
    left += ["row in the engine"] * now.rows
    left += ["request in the engine"] * now.waiting
    return left


if __name__ == "__main__":
    main()
