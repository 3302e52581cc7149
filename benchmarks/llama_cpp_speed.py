"""Decoding speed with smollm2's own file: our engine against llama.cpp, by real users' requests.

    one user     ours with the user's adapter, contrastive (α 0.3): two rows a token
    8 users      the same, each with an adapter of their own, decoded together
    llama.cpp    one sequence of the base alone, without adapter or contrast, or 8 in one context

Beside them stand our engine without contrast, with speculation, and with a task adapter merged into
the base, whose layers then have no 4-bit blocks; and llama.cpp with a file of 8-bit blocks.

Both read the file of `smollm2` (Q4_1), answer questions of one length greedily, and never stop
early; both have as many threads as torch takes, and else their defaults. Rates are tokens/s of
decoding, without the prompt. llama.cpp is the npm package `node-llama-cpp`, prebuilt, and Node
hands each token out. `llama_cpp.py` holds the answers of both against each other.
"""

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llama_cpp import write_gguf
from worker import (
    Worker,
    alternate,
    beside_npm,
    machine,
    print_figures,
    print_ratios,
    print_report,
)

HERE = Path(__file__).parent
USERS = 8
IDLE = 0.02  # of a core, that a way may take while another runs

ONE, MANY = "one user, ours", f"{USERS} users, ours"
BASE_ALONE = "one user, ours without contrast"
SPECULATION = "one user, ours with speculation"
MERGED = "one user, ours on a merged task adapter"
LLAMA_CPP, LLAMA_CPP_MANY = "one sequence, llama.cpp", f"{USERS} sequences, llama.cpp"
LLAMA_CPP_Q8, LLAMA_CPP_Q8_MANY = f"{LLAMA_CPP}, Q8_0", f"{LLAMA_CPP_MANY}, Q8_0"
PAIRS = {
    "one_user_vs_llama_cpp": (ONE, LLAMA_CPP),
    "one_user_vs_llama_cpp_q8": (ONE, LLAMA_CPP_Q8),
    "eight_users_vs_llama_cpp": (MANY, LLAMA_CPP_MANY),
    "eight_users_vs_llama_cpp_q8": (MANY, LLAMA_CPP_Q8_MANY),
    "without_contrast_vs_llama_cpp": (BASE_ALONE, LLAMA_CPP),
    "speculation_vs_llama_cpp": (SPECULATION, LLAMA_CPP),
    "merged_vs_llama_cpp": (MERGED, LLAMA_CPP),
}


class LlamaCpp:
    """One GGUF file in llama.cpp, in a process of its own that sleeps between two calls."""

    def __init__(self, npm: Path, file: Path, prompts: Path, threads: int) -> None:
        program = beside_npm("llama_cpp_speed.mjs", npm).name
        command = ["node", program, str(file), str(prompts), str(threads)]
        self._process = subprocess.Popen(
            command, cwd=npm, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()
        self._idle_since = (time.monotonic(), self._cpu_seconds())
        self._idle = self._cpu_while_idle = 0.0

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def rate(self, num_users: int, num_tokens: int) -> float:
        """Return tokens/s of so many sequences, from the first token of all to the last one."""
        since, cpu = self._idle_since
        self._idle += time.monotonic() - since
        self._cpu_while_idle += self._cpu_seconds() - cpu
        assert self._process.stdin is not None
        print(
            json.dumps({"sequences": num_users, "tokens": num_tokens}),
            file=self._process.stdin,
            flush=True,
        )
        done = json.loads(self._read())
        assert [len(answer) for answer in done["answers"]] == [num_tokens] * num_users
        self._idle_since = (time.monotonic(), self._cpu_seconds())
        return num_users * (num_tokens - 1) / float(done["seconds"])

    def idle_share(self) -> float:
        """Return the share of a core that it took between calls. Raise RuntimeError if much."""
        share = self._cpu_while_idle / self._idle
        if share > IDLE:
            raise RuntimeError(f"llama.cpp took {share:.0%} of a core while others were timed")
        return share

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("llama.cpp ended without an answer; what it said stands above")
        return line

    def _cpu_seconds(self) -> float:
        """Return the seconds that its threads have computed for; 0 where that cannot be told."""
        status = Path(f"/proc/{self._process.pid}/stat")
        if not status.exists():
            return 0.0
        fields = status.read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def compare(npm: Path, options: argparse.Namespace) -> None:
    """Run all ways in turns, and print what came of it."""
    state = machine("throughput, llama.cpp", options)
    state["model"] = "smollm2 (Q4_1); LoRA r 8 on q_proj and v_proj; α 0.3"
    print(json.dumps(state), flush=True)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        ours = start_ours(stack, Path(folder))
        theirs = start_llama_cpp(stack, npm, Path(folder), state["threads"])
        engines = {name: worker.run("about") for name, worker in ours.items()}
        contrast = {
            name: worker.run("contrast", num_tokens=options.tokens) for name, worker in ours.items()
        }
        speeds_by_round = alternate(all_ways(ours, theirs, options.tokens), options.rounds)
        idle = {name: each.idle_share() for name, each in theirs.items()}
    speeds = print_figures("tokens/s", speeds_by_round)
    ratios = print_ratios(
        {name: (speeds_by_round[a], speeds_by_round[b]) for name, (a, b) in PAIRS.items()}
    )
    print_report(
        state,
        tokens_per_second=speeds,
        ranges={name: [min(each), max(each)] for name, each in speeds_by_round.items()},
        ratios=ratios,
        contrast=contrast,
        engines=engines,
        idle_share_of_llama_cpp=idle,
    )


def start_ours(stack: ExitStack, folder: Path) -> dict[str, Worker]:
    """Write prompts and adapters, and return our engines in their processes, by way."""
    Worker("smollm2:prepare", folder, USERS).close()
    settings: dict[str, dict[str, Any]] = {
        ONE: {"num_users": USERS},
        SPECULATION: {"speculation": True},
        MERGED: {"task_adapter": folder / f"user{USERS - 1}"},
    }
    return {
        name: stack.enter_context(Worker("smollm2:Ours", folder, **setting))
        for name, setting in settings.items()
    }


def start_llama_cpp(stack: ExitStack, npm: Path, folder: Path, threads: int) -> dict[str, LlamaCpp]:
    """Return llama.cpp's processes, by way: one with smollm2's own file, one with 8-bit blocks."""
    files = {LLAMA_CPP: own_file(), LLAMA_CPP_Q8: write_gguf(folder, "Q8_0")}
    prompts = folder / "prompts.json"
    return {
        name: stack.enter_context(LlamaCpp(npm, file, prompts, threads))
        for name, file in files.items()
    }


def own_file() -> Path:
    """Return the file of `smollm2`."""
    from langchain_cope.engine import smollm2_file

    return smollm2_file()


def all_ways(
    ours: dict[str, Worker], theirs: dict[str, LlamaCpp], tokens: int
) -> dict[str, Callable[[], float]]:
    """Return each way by its name."""

    def of_ours(name: str, users: int = 1, **settings: bool) -> Callable[[], float]:
        return partial(ours[name].run, "rate", num_users=users, num_tokens=tokens, **settings)

    return {
        ONE: of_ours(ONE),
        LLAMA_CPP: partial(theirs[LLAMA_CPP].rate, 1, tokens),
        LLAMA_CPP_Q8: partial(theirs[LLAMA_CPP_Q8].rate, 1, tokens),
        BASE_ALONE: of_ours(ONE, contrastive=False),
        SPECULATION: of_ours(SPECULATION),
        MERGED: of_ours(MERGED),
        MANY: of_ours(ONE, USERS),
        LLAMA_CPP_MANY: partial(theirs[LLAMA_CPP].rate, USERS, tokens),
        LLAMA_CPP_Q8_MANY: partial(theirs[LLAMA_CPP_Q8].rate, USERS, tokens),
    }
