"""What a decoding step costs: against its size, an adapter's change, and what the machine allows.

    size      a step of 1 to 32 users (two rows each) with 128 to 1024 tokens behind them
    adapter   time until a user's adapter is ready: hot, already in the engine; cold, fetched from a
              store on the local disk, checked and loaded; both against just reading the file with
              safetensors
    limit     the shortest that a step can be (`roofline.py`): every weight is read once, in the
              form in which the step reads it, and multiplied by every row, in the dtype in which
              that is done; at the rates of this machine, measured in the same rounds
    parts     where a step's time goes: torch's profiler on the engine's thread, operations by kind

Steps are timed in bfloat16 and, on a CPU, with the 4-bit blocks that a GGUF file has ("packed", the
default: few rows take the blocks, more rows bfloat16).

A figure is the median over the rounds (of adapters: over users), a ratio the median of their
ratios. `step_vs_limit_FORM_USERS` is the shortest time over the step's: 1 is the best there can be,
half of it for one user is good. The last line is one JSON object: the machine's state, figures and
`ratios`.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from functools import partial

from roofline import DTYPES, Rates, Work, shortest_seconds
from worker import (
    Figures,
    Setting,
    Worker,
    alternate,
    machine,
    option_parser,
    prepared,
    print_figures,
    print_ratios,
    print_report,
    print_table,
)

USERS = (1, 2, 8, 32)
CONTEXTS = (128, 512, 1024)
SHORT = 64  # tokens of prompt where a step is compared with the limit
FILE, COLD, HOT = "just reading the file", "cold, from a local store", "hot, in the engine"
PACKED, DENSE = "packed", "bfloat16"


def main() -> None:
    options = _options()
    state = {**machine("steps", options), "model": options.model}
    print(json.dumps(state), flush=True)
    forms = (PACKED, DENSE) if options.device == "cpu" else (DENSE,)
    most = max(options.users)
    with prepared(options.device, most, options.model) as (setting, workers):
        torch = workers.enter_context(Worker("peers:Torch", options.device))
        engines = {
            form: workers.enter_context(
                Worker("ours:Ours", setting, num_users=most, packed=form == PACKED)
            )
            for form in forms
        }
        default = engines[forms[0]]
        packed_rows = default.run("packed_rows")
        adapters = _adapters(default, setting)
        steps, limits, rates = _against_limit(engines, torch, options)
        parts = {users: _parts(default, users, options) for users in options.users}
        sizes = _sizes(default, options)
    rate_medians = print_figures("rates, GB/s and GFLOP/s", rates)
    adapter_milliseconds = print_figures("adapter ready, ms", adapters, digits=3)
    step_milliseconds = print_figures("step, ms", steps, digits=2)
    limit_milliseconds = print_figures("shortest, ms", limits, digits=2)
    size_milliseconds = print_figures("step, ms", sizes)
    ratios = print_ratios(
        {
            **{f"step_vs_limit_{name}": (limits[name], steps[name]) for name in steps},
            "cold_adapter_vs_reading_file": (adapters[COLD], adapters[FILE]),
            "hot_adapter_vs_reading_file": (adapters[HOT], adapters[FILE]),
        }
    )
    print(f"\nBlocks are used up to {packed_rows} rows (layers, output head).")
    _print_limits(step_milliseconds, limit_milliseconds, ratios, forms, options)
    _print_parts(parts)
    _print_sizes(size_milliseconds, options.users)
    print_report(
        state,
        rates=rate_medians,
        packed_rows=packed_rows,
        milliseconds={**step_milliseconds, **adapter_milliseconds, **size_milliseconds},
        shortest=limit_milliseconds,
        step_parts=parts,
        ratios=ratios,
    )


def _options() -> argparse.Namespace:
    parser = option_parser(__doc__.splitlines()[0], rounds=5, tokens=13)
    parser.add_argument("--model", default="smollm2", help="base, built like Llama")
    parser.add_argument("--users", type=int, nargs="+", default=list(USERS), help="users together")
    return parser.parse_args()


def _named(form: str, users: int) -> str:
    return f"{form}_{users}"


def _size(users: int, context: int) -> str:
    return f"{_users(users)}, {context} tokens"


def _users(number: int) -> str:
    return f"{number} user{'s' if number > 1 else ''}"


def _sizes(ours: Worker, options: argparse.Namespace) -> Figures:
    ways = {
        _size(users, context): partial(
            ours.run,
            "step_milliseconds",
            num_users=users,
            prompt_tokens=context,
            num_tokens=options.tokens,
        )
        for users in options.users
        for context in CONTEXTS
    }
    # The largest reads 65 000 tokens of prompts before it is timed: that warms up.
    return alternate(ways, min(options.rounds, 3), warm_up=False)


def _adapters(ours: Worker, setting: Setting) -> dict[str, list[float]]:
    """Switch to every user's adapter once; the first one warms up."""
    ours.run("publish", store=setting.folder / "store")
    users = [0, *range(setting.num_users)]
    measured = [ours.run("switch_milliseconds", user=user) for user in users][1:]
    names = {"file": FILE, "cold": COLD, "hot": HOT}
    return {name: [one[key] for one in measured] for key, name in names.items()}


def _against_limit(
    engines: Mapping[str, Worker], torch: Worker, options: argparse.Namespace
) -> tuple[Figures, Figures, Figures]:
    """Return milliseconds of the steps, the shortest there could be, and rates in GB/s, GFLOP/s."""
    works: dict[str, Work] = {}
    steps = {}
    for form, ours in engines.items():
        for users in options.users:
            works[_named(form, users)] = ours.run("work", num_rows=2 * users)
            steps[_named(form, users)] = partial(
                ours.run,
                "step_milliseconds",
                num_users=users,
                prompt_tokens=SHORT,
                num_tokens=options.tokens,
            )
    reads = {
        _reading(num_bytes): partial(torch.run, "read_rate", num_bytes=num_bytes)
        for num_bytes in sorted({work.num_bytes for work in works.values()})
    }
    products = {dtype: partial(torch.run, "multiply_rate", dtype=dtype) for dtype in DTYPES}
    figures = alternate({**steps, **reads, **products}, options.rounds)
    limits = {name: _shortest(work, figures) for name, work in works.items()}
    rates = {name: [rate / 1e9 for rate in figures[name]] for name in (*reads, *products)}
    return {name: figures[name] for name in steps}, limits, rates


def _reading(num_bytes: float) -> str:
    return f"reading {num_bytes / 1e6:.0f} MB"


def _shortest(work: Work, figures: Figures) -> list[float]:
    """Return the milliseconds by the rates of each round."""
    by_dtype = (figures[dtype] for dtype in DTYPES)
    rounds = zip(figures[_reading(work.num_bytes)], *by_dtype, strict=True)
    return [
        1000 * shortest_seconds(work, Rates(read, dict(zip(DTYPES, multiply, strict=True))))
        for read, *multiply in rounds
    ]


def _parts(ours: Worker, users: int, options: argparse.Namespace) -> dict[str, float]:
    """Return what a step spends its time on, in ms; the first recording warms up."""
    recorded = [
        ours.run("profile", num_users=users, prompt_tokens=SHORT, num_tokens=options.tokens)
        for _ in range(options.rounds + 1)
    ][1:]
    return {kind: round(statistics.median(r[kind] for r in recorded), 3) for kind in recorded[0]}


def _print_limits(
    steps: Mapping[str, float],
    limits: Mapping[str, float],
    ratios: Mapping[str, float],
    forms: Sequence[str],
    options: argparse.Namespace,
) -> None:
    header = [f"Step of {options.model}, {SHORT} tokens before it"]
    for form in forms:
        header += [f"{form}, ms", "at least, ms", "share reached"]
    rows = []
    for users in options.users:
        row = [_users(users)]
        for name in (_named(form, users) for form in forms):
            row += [f"{steps[name]:.1f}", f"{limits[name]:.1f}"]
            row += [f"{ratios[f'step_vs_limit_{name}']:.2f}"]
        rows.append(row)
    print_table(header, rows)


def _print_parts(parts: Mapping[int, Mapping[str, float]]) -> None:
    kinds = list(next(iter(parts.values())))
    wholes = {users: sum(spent.values()) for users, spent in parts.items()}
    rows = [
        [
            kind,
            *(
                f"{spent[kind]:.2f} ({spent[kind] / wholes[users]:.0%})"
                for users, spent in parts.items()
            ),
        ]
        for kind in kinds
    ]
    rows.append(["all of it, recorded", *(f"{whole:.2f}" for whole in wholes.values())])
    print_table(["Where a step's time goes, ms", *map(_users, parts)], rows)


def _print_sizes(sizes: Mapping[str, float], users: Sequence[int]) -> None:
    header = ["Step, ms", *(f"{context} tokens before it" for context in CONTEXTS)]
    rows = [
        [_users(each), *(f"{sizes[_size(each, context)]:.0f}" for context in CONTEXTS)]
        for each in users
    ]
    print_table(header, rows)


if __name__ == "__main__":
    main()
