"""Decoding speed and memory: many users on one base in our engine, against other ways.

    one user        against `generate` of the base with the adapter by PEFT, with the adapter merged
                    into the weights, and of the base alone; ours is contrastive, which takes a
                    second row; theirs are not
    1 to 32 users   each with an adapter of their own, all decoded together; the peers at 16 users
                    are `generate` for one user after another, PEFT's mixed batch, and the two
                    models of the paper's scripts for one user after another
    memory          the peak of a fresh process that answers one user, loading included, against one
                    that does so by `generate` with PEFT; and all weights and low-rank pairs in our
                    process against the bytes of the base and one adapter

`peers` and `ours` say how each way decodes and what is timed, `worker` why each has a process of
its own. A figure is the median over the rounds, in which every way runs once; a ratio is the median
of the rounds' ratios. The last line is one JSON object with the state of the machine,
`tokens_per_second` and `ratios`. `--plot FILE` draws users against tokens/s (needs matplotlib).

    npm install --prefix FOLDER node-llama-cpp
    python benchmarks/throughput.py --peer llama.cpp FOLDER

compares with llama.cpp instead, on the file of `smollm2`: see `llama_cpp_speed`.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import llama_cpp_speed
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
)

USERS = (1, 2, 4, 8, 16, 32)
MIXED_USERS = (4, 8, 16)
PROMPT_TOKENS = 64
# Users whom a way that answers one after another answers in a round: more would show the same rate.
SEQUENTIAL_USERS = 4

PEFT = "generate, base and adapter by PEFT"
MERGED = "generate, adapter merged"
BASE = "generate, base alone"
SEQUENTIAL_PEFT = "16 users in turn, generate"
SEQUENTIAL_TWO_MODELS = "16 users in turn, two models"


def main() -> None:
    options = _options()
    if options.peer:
        llama_cpp_speed.compare(Path(options.peer[1]), options)
        return
    state = machine("throughput", options)
    print(json.dumps(state), flush=True)
    with prepared(options.device, max(USERS)) as (setting, workers):
        memory = _memory(setting, options.tokens)
        speeds_by_round = alternate(_ways(setting, workers, options.tokens), options.rounds)
    speeds = print_figures("tokens/s", speeds_by_round)
    ratios = print_ratios(_pairs(speeds_by_round))
    ratios |= _print_memory(memory)
    print_report(state, tokens_per_second=speeds, memory=memory, ratios=ratios)
    if options.plot:
        _plot(speeds, options.plot)


def _options() -> argparse.Namespace:
    parser = option_parser(__doc__.splitlines()[0], rounds=5, tokens=32)
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw users against tokens/s, as .svg or .png"
    )
    parser.add_argument(
        "--peer",
        nargs=2,
        metavar=("llama.cpp", "NPM_FOLDER"),
        help="compare with llama.cpp; the folder is that in which node-llama-cpp is installed",
    )
    options = parser.parse_args()
    if options.peer and (options.peer[0] != "llama.cpp" or options.device != "cpu"):
        parser.error(f"--peer is llama.cpp, on a CPU, not {options.peer[0]!r} on {options.device}")
    if options.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error("--plot needs matplotlib: pip install matplotlib")
    return options


def _ours(num_users: int) -> str:
    return f"{num_users} user{'s' if num_users > 1 else ''}, ours"


def _mixed(num_users: int) -> str:
    return f"{num_users} users, PEFT's mixed batch"


def _ways(setting: Setting, workers: ExitStack, num_tokens: int) -> dict[str, Callable[[], float]]:
    """Return each way by its name, its worker started and idle."""

    def start(target: str, **settings: object) -> Callable[[int], Callable[[], float]]:
        worker = workers.enter_context(Worker(target, setting, **settings))
        return lambda users: partial(
            worker.run, "rate", num_users=users, prompt_tokens=PROMPT_TOKENS, num_tokens=num_tokens
        )

    ours = start("ours:Ours", num_users=max(USERS))
    peft = start("peers:Generate", kind="adapter", num_users=SEQUENTIAL_USERS)
    mixed = start("peers:Mixed", num_users=max(MIXED_USERS))
    return {
        _ours(1): ours(1),
        PEFT: peft(1),
        MERGED: start("peers:Generate", kind="merged")(1),
        BASE: start("peers:Generate", kind="base")(1),
        **{_ours(users): ours(users) for users in USERS[1:]},
        **{_mixed(users): mixed(users) for users in MIXED_USERS},
        SEQUENTIAL_PEFT: peft(SEQUENTIAL_USERS),
        SEQUENTIAL_TWO_MODELS: start("peers:TwoModels")(SEQUENTIAL_USERS),
    }


def _pairs(speeds_by_round: Figures) -> dict[str, tuple[list[float], list[float]]]:
    pairs = {
        "one_user_vs_generate": (_ours(1), PEFT),
        "one_user_vs_generate_merged": (_ours(1), MERGED),
        "one_user_vs_generate_base": (_ours(1), BASE),
        "users16_vs_sequential_generate": (_ours(16), SEQUENTIAL_PEFT),
        "users16_vs_peft_mixed": (_ours(16), _mixed(16)),
        "users16_vs_two_models": (_ours(16), SEQUENTIAL_TWO_MODELS),
        "users16_vs_one": (_ours(16), _ours(1)),
    }
    return {
        name: (speeds_by_round[ours], speeds_by_round[theirs])
        for name, (ours, theirs) in pairs.items()
    }


def _memory(setting: Setting, num_tokens: int) -> dict[str, int]:
    """Return bytes: peaks of two fresh processes, what ours holds and the least that would do."""
    one_answer = {"num_users": 1, "prompt_tokens": PROMPT_TOKENS, "num_tokens": num_tokens}
    with Worker("ours:Ours", setting, num_users=1) as ours:
        ours.run("rate", **one_answer)
        our_peak = ours.run("peak_memory")
        held, least = ours.run("held_bytes")
    with Worker("peers:Generate", setting, kind="adapter") as peft:
        peft.run("rate", **one_answer)
        their_peak = peft.run("peak_memory")
    return {
        "our_peak": our_peak,
        "generate_peak": their_peak,
        "kept": held,
        "base_and_adapter": least,
    }


def _print_memory(memory: Mapping[str, int]) -> dict[str, float]:
    ratios = {
        "memory_vs_generate": memory["our_peak"] / memory["generate_peak"],
        "parameter_storage_vs_base_and_adapter": memory["kept"] / memory["base_and_adapter"],
    }
    megabytes = [f"{name} {num_bytes / 1e6:.1f}" for name, num_bytes in memory.items()]
    print("\nmemory, MB: " + ", ".join(megabytes))
    for name, ratio in ratios.items():
        print(f"{name:<44}{ratio:>10.3f}")
    return {name: round(ratio, 4) for name, ratio in ratios.items()}


def _plot(speeds: Mapping[str, float], file: Path) -> None:
    """Draw users against tokens/s, up to as many users as were measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(USERS, [speeds[_ours(users)] for users in USERS], "o-", label="ours (contrastive)")
    axes.plot(
        MIXED_USERS,
        [speeds[_mixed(users)] for users in MIXED_USERS],
        "s-",
        label="PEFT's mixed batch",
    )
    for name, style in ((PEFT, "--"), (BASE, ":"), (SEQUENTIAL_TWO_MODELS, "-.")):
        label = {SEQUENTIAL_TWO_MODELS: "two models, one user after another"}.get(
            name, f"{name}, one user after another"
        )
        axes.plot(USERS, [speeds[name]] * len(USERS), style, color="gray", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(USERS, [str(users) for users in USERS])
    axes.set_xlabel("users, each with an adapter of their own")
    axes.set_ylabel("tokens/s, all users together")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center")
    figure.savefig(file)


if __name__ == "__main__":
    main()
