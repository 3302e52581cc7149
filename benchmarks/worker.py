"""What the decoding benchmarks share: a process for each way of decoding, rounds, and reports.

Each way lives in a process of its own and is idle while another runs. Within one process they would
disturb each other: as soon as two of its threads have run torch's parallel regions, its OpenMP
keeps two teams for two cores and every small product takes twice the time. Nothing here imports
torch, so that a process holds what its way needs and nothing else.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import random
import resource
import shutil
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

VOCABULARY = 49152
PROMPT_TOKENS = range(10, 6000)  # that every base has
SEED = 0

T = TypeVar("T")

Figures = Mapping[str, list[float]]
"""Figures by name, one a round."""


@dataclass(frozen=True)
class Setting:
    """What every way is given: a base, adapters made for it, and a device.

    `peers.prepare` writes the files of a random base, `ours.prepare` the adapters of another one.
    """

    folder: Path
    device: str
    num_users: int
    model: str | None = None
    """Name of the base, as `load_base` takes it; None: a random one in `folder`."""

    @property
    def base(self) -> Path | str:
        """Folder of the random base, or the name of the other."""
        return self.folder / "base" if self.model is None else self.model

    @property
    def adapters(self) -> list[Path]:
        """One peft folder a user."""
        return [self.folder / f"user{user}" for user in range(self.num_users)]

    def prompt(self, user: int, num_tokens: int) -> list[int]:
        """Return random token ids, the same ones for every caller."""
        return random.Random(f"{SEED} {user}").choices(PROMPT_TOKENS, k=num_tokens)


class Worker:
    """An object in a process of its own.

    `target` ("module:name") is called there once, then `run` calls its methods.
    """

    def __init__(self, target: str, *arguments: Any, **settings: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, target, arguments, settings), daemon=True
        )
        self._process.start()
        theirs.close()
        self._receive()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, method: str, **arguments: Any) -> Any:
        """Return what `method` returns; this process sleeps until then."""
        self._pipe.send((method, arguments))
        return self._receive()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()

    def _receive(self) -> Any:
        try:
            good, answer = self._pipe.recv()
        except EOFError as error:
            raise RuntimeError(
                "a way of decoding ended without an answer: was there memory enough?"
            ) from error
        if not good:
            raise RuntimeError(f"a way of decoding failed:\n{answer}")
        return answer


def _serve(
    pipe: Connection, target: str, arguments: tuple[Any, ...], settings: dict[str, Any]
) -> None:
    module, name = target.split(":")
    try:
        served = getattr(importlib.import_module(module), name)(*arguments, **settings)
        pipe.send((True, None))
        while True:
            method, options = pipe.recv()
            pipe.send((True, getattr(served, method)(**options)))
    except EOFError:  # closed at the other end: nothing more to do
        pass
    except Exception:
        pipe.send((False, traceback.format_exc()))


def beside_npm(program: str, npm: Path) -> Path:
    """Return a copy of one of our programs for node, in the folder of its modules.

    A module is looked for beside the program that imports it.
    """
    here = Path(__file__).parent
    shutil.copy(here / "llama_cpp_model.mjs", npm)
    return Path(shutil.copy(here / program, npm))


def peak_memory(device: str) -> int:
    """Return the most bytes that this process has held, loading included.

    On a CPU they are the resident ones, on a GPU those allocated by torch.
    """
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include what the parent held when it started this process
        lines = status.read_text(encoding="ascii").splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    peak_in_units = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_in_units * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def prepared(
    device: str, num_users: int, model: str | None = None
) -> Iterator[tuple[Setting, ExitStack]]:
    """Offer a base and adapters on the disk, and a stack for the workers that use them.

    The base is `model`, or a random one. What was written is gone afterwards.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as workers:
        setting = Setting(Path(folder), device, num_users, model)
        Worker("peers:prepare" if model is None else "ours:prepare", setting).close()
        yield setting, workers


def option_parser(description: str, rounds: int, tokens: int) -> argparse.ArgumentParser:
    """Return a parser with the options of every decoding benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="rounds in which every way runs once"
    )
    parser.add_argument("--tokens", type=int, default=tokens, help="tokens of an answer")
    return parser


def read_items(users: Path, num_items: int) -> list[dict[str, str]]:
    """Return so many items of a file of users: the first user's, then the next one's, and so on.

    Ends the program where the file has fewer.
    """
    with users.open(encoding="utf-8") as file:
        items = [item for line in file for item in json.loads(line)["history"]]
    if len(items) < num_items:
        sys.exit(f"{users} has {len(items)} items, but {num_items} were asked for: lower --items")
    return items[:num_items]


def machine(benchmark: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the state of machine and run, with which the JSON begins."""
    with Worker("peers:Torch", options.device) as torch:
        about_torch = torch.run("about")
    return {
        "benchmark": benchmark,
        "processor": _processor(),
        "cores": os.cpu_count(),
        **about_torch,
        "model": "random Llama, 134M parameters, bfloat16, 30 layers, width 576, "
        "vocabulary 49152; LoRA r 8 on q_proj and v_proj",
        "options": {
            name: value
            for name, value in vars(options).items()
            if isinstance(value, (int, str, list))
        },
        "load_before": os.getloadavg(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def alternate(
    ways: Mapping[str, Callable[[], T]], rounds: int, *, warm_up: bool = True
) -> dict[str, list[T]]:
    """Run every way once to warm up, then once a round, in every other round backwards."""
    for way in ways.values() if warm_up else ():
        way()
    figures: dict[str, list[T]] = {name: [] for name in ways}
    for number in range(rounds):
        names = list(ways)
        if number % 2:
            names.reverse()
        for name in names:
            figures[name].append(ways[name]())
    return figures


def print_figures(title: str, figures: Figures, digits: int = 1) -> dict[str, float]:
    """Print and return the median of each way's figures; print their spread beside it."""
    print(f"\n{title:<44}{'median':>10}{'min':>10}{'max':>10}")
    for name, values in figures.items():
        cells = (statistics.median(values), min(values), max(values))
        print(f"{name:<44}" + "".join(f"{cell:>10.{digits}f}" for cell in cells))
    return {name: round(statistics.median(values), 4) for name, values in figures.items()}


def print_ratios(pairs: Mapping[str, tuple[list[float], list[float]]]) -> dict[str, float]:
    """Print and return the median of the rounds' ratios, of the former figures to the latter."""
    each = {name: [a / b for a, b in zip(*pair, strict=True)] for name, pair in pairs.items()}
    return print_figures("ratio", each, digits=3)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    print()
    for cells in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(cells)} |")


def print_report(state: dict[str, Any], **results: Any) -> None:
    """Print the one JSON object that ends a benchmark's output."""
    print(json.dumps({**state, "load_after": os.getloadavg(), **results}))
