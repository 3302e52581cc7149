"""What machines allow, what is reached on this one, and which base suits it.

    python benchmarks/limits.py users.jsonl [--items 102]

Two tables. The first: the shortest time (`roofline.py`) of a decoding step of 1, 2, 16 and 64 rows,
and of SFT's one pass over an item, on three machines, beside what is reached on this one.

    this machine   rates of reading memory and of products in bfloat16 and float32, measured
    16 cores       products: 16 times a core of this machine; memory: 12 channels of DDR5-4800 as of
                   AMD's data sheet of the EPYC 9124, 460.8 GB/s
    one H100       the data sheet of the SXM5: 989 TFLOP/s dense in bfloat16, 67 in float32,
                   3.35 TB/s; weights in bfloat16, as blocks are for CPUs

A step reads every weight once and takes two operations a weight and row; a pass of SFT takes two
operations a weight and token forwards and two backwards, as frozen weights have no gradient, and
reads the weights twice a batch. Beginnings that a batch's texts share are counted for each of them,
though they are read once; the time reached has the trainer's own start in it.

The second: for bases of 135 million to 7 billion parameters the memory of a process that
personalizes and answers, the seconds to personalize a user with `--items` items (SFT, negatives and
DPO), and the tokens/s of one user, contrastive. Those of `--model` are measured; those of the other
sizes are computed from them: times in proportion to the parameters, memory with the larger weights
alone, so it takes at least that.

The last line is one JSON object.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from roofline import DTYPES, Rates, Work, seconds_of, shortest_seconds
from worker import (
    Setting,
    Worker,
    alternate,
    machine,
    option_parser,
    prepared,
    print_report,
    print_table,
    read_items,
)

ROWS = (1, 2, 16, 64)
SHORT = 64  # tokens of prompt
WARM_UP = 4  # items
BASES = {"135M": 135e6, "360M": 360e6, "1.7B": 1.7e9, "7B": 7e9}
SAME = 0.2  # sizes that differ by less than this share are the same
CORES, SERVER_READ = 16, 460.8e9
H100 = Rates(3.35e12, {"bfloat16": 989e12, "float32": 67e12})
PASS = "SFT, one pass over an item"
HERE, SERVER, GPU = "this machine", f"{CORES} cores", "one H100"


@dataclass(frozen=True)
class Training:
    """One user's training as it was measured."""

    seconds: dict[str, float]
    """Of each stage."""
    num_items: int
    one_pass: Work
    """What SFT does for all items once."""
    passes: int
    num_parameters: int
    peak_memory: int
    """Of its process, in bytes."""


def main() -> None:
    options = _options()
    rows = read_items(options.users, options.items)
    state = {**machine("limits", options), "model": options.model}
    print(json.dumps(state), flush=True)
    with prepared(options.device, max(ROWS) // 2, options.model) as (setting, _):
        trained = _train(setting, rows)
        milliseconds, works, plain, rates = _measure(setting, options)
    one_item = Work(
        trained.one_pass.num_bytes / trained.num_items,
        {dtype: flops / trained.num_items for dtype, flops in trained.one_pass.flops.items()},
    )
    sft_seconds = trained.seconds["sft"] / trained.num_items / trained.passes
    reached = {**{_step(n): spent for n, spent in milliseconds.items()}, PASS: 1000 * sft_seconds}
    needed = {**{_step(n): work for n, work in works.items()}, PASS: one_item}
    on_gpu = {**{_step(n): work for n, work in plain.items()}, PASS: one_item}
    machines = _machines(rates, options.device, state["threads"])
    _print_rates({HERE: rates, **machines})
    shortest = _print_limits(reached, needed, on_gpu, rates, machines)
    held = works[2].num_bytes + (plain[2].num_bytes if works[2] != plain[2] else 0)
    bases = _print_bases(options, trained, milliseconds[2], held)
    print_report(
        state,
        rates={"read": rates.read, **rates.multiply},
        milliseconds=reached,
        shortest=shortest,
        training_seconds=trained.seconds,
        bases=bases,
        ratios={f"limit_vs_{name}": shortest[HERE][name] / reached[name] for name in reached},
    )


def _options() -> argparse.Namespace:
    parser = option_parser(__doc__.splitlines()[0], rounds=3, tokens=13)
    parser.add_argument("users", type=Path, help="a JSONL of users with their histories")
    parser.add_argument("--model", default="smollm2", help="base, built like Llama")
    parser.add_argument("--items", type=int, default=102, help="items that are trained on")
    return parser.parse_args()


def _step(rows: int) -> str:
    return f"step of {rows} row{'s' if rows > 1 else ''}"


def _train(setting: Setting, rows: Sequence[Mapping[str, str]]) -> Training:
    with Worker("chain:Training", setting) as training:
        training.run("train", rows=rows[:WARM_UP])
        seconds = training.run("train", rows=rows)
        one_pass, passes = training.run("sft_pass", rows=rows)
        return Training(
            seconds,
            len(rows),
            one_pass,
            passes,
            training.run("num_parameters"),
            training.run("peak_memory"),
        )


def _measure(
    setting: Setting, options: argparse.Namespace
) -> tuple[dict[int, float], dict[int, Work], dict[int, Work], Rates]:
    """Return ms of the steps, what they do, what they would do in bfloat16, and the rates here."""
    with (
        Worker("ours:Ours", setting, num_users=setting.num_users) as ours,
        Worker("peers:Torch", setting.device) as torch,
    ):
        works = {rows: ours.run("work", num_rows=rows) for rows in ROWS}
        plain = {rows: ours.run("work", num_rows=rows, packed=False) for rows in ROWS}
        step = partial(
            ours.run, "step_milliseconds", prompt_tokens=SHORT, num_tokens=options.tokens
        )
        steps = {rows: partial(step, num_users=rows // 2 or 1, contrast=rows > 1) for rows in ROWS}
        products = {dtype: partial(torch.run, "multiply_rate", dtype=dtype) for dtype in DTYPES}
        read = partial(torch.run, "read_rate", num_bytes=works[1].num_bytes)
        figures = alternate({**steps, **products, "read": read}, options.rounds)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    rates = Rates(medians["read"], {dtype: medians[dtype] for dtype in DTYPES})
    return {rows: medians[rows] for rows in ROWS}, works, plain, rates


def _machines(here: Rates, device: str, cores: int) -> dict[str, Rates]:
    """Return the rates of the other machines; 16 cores are computed from those of a CPU only."""
    if device != "cpu":
        return {GPU: H100}
    multiply = {dtype: rate / cores * CORES for dtype, rate in here.multiply.items()}
    return {SERVER: Rates(SERVER_READ, multiply), GPU: H100}


def _print_rates(machines: Mapping[str, Rates]) -> None:
    rows = [
        [name, f"{rates.read / 1e9:.0f} GB/s"]
        + [f"{rates.multiply[dtype] / 1e12:.3g} TFLOP/s" for dtype in DTYPES]
        for name, rates in machines.items()
    ]
    print_table(["Rates", "memory", *DTYPES], rows)


def _print_limits(
    reached: Mapping[str, float],
    needed: Mapping[str, Work],
    on_gpu: Mapping[str, Work],
    here: Rates,
    machines: Mapping[str, Rates],
) -> dict[str, dict[str, float]]:
    """Print what is reached beside the shortest times; return these in ms, by machine."""
    shortest: dict[str, dict[str, float]] = {name: {} for name in (HERE, *machines)}
    rows = []
    for name, spent in reached.items():
        cells = [name, f"{spent:.1f}"]
        for where, rates in {HERE: here, **machines}.items():
            work = on_gpu[name] if where == GPU else needed[name]
            least = shortest[where][name] = 1000 * shortest_seconds(work, rates)
            reading, computing = seconds_of(work, rates)
            cells.append(f"{least:.2g} ({'memory' if reading > computing else 'arithmetic'})")
            if where == HERE:
                cells.append(f"{least / spent:.2f}")
        rows.append(cells)
    header = ["ms", "here", "at least, here", "share reached"]
    print_table([*header, *(f"at least, {name}" for name in machines)], rows)
    return shortest


def _print_bases(
    options: argparse.Namespace, trained: Training, step: float, held: float
) -> dict[str, dict[str, float]]:
    """Print the table of bases and return its figures; `held` are the bytes of all weights."""
    size = trained.num_parameters
    seconds = sum(trained.seconds.values())
    measured = f"{size / 1e6:.0f}M ({options.model})"
    others = {name: other for name, other in BASES.items() if abs(other / size - 1) > SAME}
    bases, rows = {}, []
    for name, parameters in sorted({measured: size, **others}.items(), key=lambda base: base[1]):
        times = parameters / size
        memory = trained.peak_memory + (times - 1) * held
        rate = 1000 / (step * times)
        bases[name] = {
            "memory": memory,
            "personalize_seconds": seconds * times,
            "tokens_per_second": rate,
        }
        how = "measured" if name == measured else "computed"
        cells = [f"{memory / 1e9:.1f} GB", f"{seconds * times:.0f} s", f"{rate:.2g}"]
        rows.append([name, *cells, how])
    header = ["Base", "memory", f"personalize, {trained.num_items} items", "tokens/s, one user", ""]
    print_table(header, rows)
    return bases


if __name__ == "__main__":
    main()
