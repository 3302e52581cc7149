"""A busy neighbour: how much slower everything gets while another program burns a core.

    npm install --prefix FOLDER node-llama-cpp
    python benchmarks/neighbour.py FOLDER [USERS.jsonl] [--rounds 5] [--tokens 64] [--items 16]

Each way runs alone and beside a busy loop of Python, in turns:

    decoding    smollm2's own file: one and 8 contrastive users in our engine, one sequence of the
                base in llama.cpp (`llama_cpp_speed` says how)
    training    SFT of the first user's newest items on `smollm2`, in float32: ours, and bare TRL
                (`personalize` says how)

All take as many threads as there are cores, by default. A slow-down is the time beside the
neighbour over that alone, the median of the rounds'. `ours_slowdown_vs_llama_cpp`,
`eight_users_slowdown_vs_llama_cpp` and `training_slowdown_vs_bare_trl` are ratios of slow-downs:
below 1 ours bears the neighbour better. The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from llama_cpp_speed import HERE, LLAMA_CPP, MANY, ONE, USERS, LlamaCpp, own_file
from worker import Worker, alternate, machine, print_figures, print_ratios, print_report

EXAMPLES = HERE.parent / "examples" / "data" / "user.jsonl"
OUR_TRAINING, BARE_TRL = "SFT, ours", "SFT, bare TRL"
PAIRS = {
    "ours_slowdown_vs_llama_cpp": (ONE, LLAMA_CPP),
    "eight_users_slowdown_vs_llama_cpp": (MANY, LLAMA_CPP),
    "training_slowdown_vs_bare_trl": (OUR_TRAINING, BARE_TRL),
}
SETTLING = 0.2  # seconds until the neighbour runs
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"  # ends with us

Ways = dict[str, Callable[[], float]]
"""Ways by their names; each returns the seconds that it took."""


class Training:
    """SFT of one user, by our own function or by TRL alone."""

    def __init__(self, users: Path, num_items: int) -> None:
        import personalize
        from transformers import AutoModelForCausalLM

        from langchain_cope.engine import load_base
        from langchain_cope.training.recipe import Recipe

        self._base = load_base("smollm2", device="cpu", dtype="float32")
        options = argparse.Namespace(users=users, items=num_items)
        self._items = personalize.read_items(options, "history")
        self._recipe = Recipe.for_model(self._base, self._items)
        self._load = partial(
            AutoModelForCausalLM.from_pretrained, self._base.source, dtype=self._base.dtype
        )

    def ours(self) -> float:
        """Return the seconds of `train_sft`, from text to the adapter's folder."""
        from langchain_cope.training.encode import fit
        from langchain_cope.training.progress import Monitor, Stage
        from langchain_cope.training.sft import train_sft

        recipe, monitor = self._recipe, Monitor()
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            examples, _ = fit(self._base, self._items, recipe.max_length, recipe.max_words)
            with monitor.stage(Stage.SFT):
                train_sft(self._base, examples, recipe, Path(folder) / "sft", monitor)
            return time.perf_counter() - start

    def bare_trl(self) -> float:
        """Return the seconds that TRL takes for the same, without the load of the model."""
        import personalize

        texts = [
            {
                "prompt": item.messages,
                "completion": [{"role": "assistant", "content": item.completion}],
            }
            for item in self._items
        ]
        with tempfile.TemporaryDirectory() as folder:
            return personalize.bare_trl(
                self._base, self._load, texts, self._recipe, Path(folder), stages=["sft"]
            )


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """Burn a core meanwhile, in another process."""
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        time.sleep(SETTLING)
        yield
    finally:
        process.kill()
        process.wait()


def beside_neighbour(way: Callable[[], float]) -> float:
    """Return the seconds of `way` beside a neighbour."""
    with busy_neighbour():
        return way()


def decoding_ways(stack: ExitStack, npm: Path, threads: int, num_tokens: int) -> Ways:
    """Return the ways of decoding, each in a process of its own that is idle now."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    Worker("smollm2:prepare", folder, USERS).close()
    ours = stack.enter_context(Worker("smollm2:Ours", folder, num_users=USERS))
    theirs = stack.enter_context(LlamaCpp(npm, own_file(), folder / "prompts.json", threads))

    def seconds(rate: Callable[..., float], num_users: int) -> float:
        return num_users * num_tokens / rate(num_users=num_users, num_tokens=num_tokens)

    rate_of_ours = partial(ours.run, "rate")
    return {
        ONE: partial(seconds, rate_of_ours, 1),
        MANY: partial(seconds, rate_of_ours, USERS),
        LLAMA_CPP: partial(seconds, theirs.rate, 1),
    }


def training_ways(stack: ExitStack, users: Path, num_items: int) -> Ways:
    """Return the ways of training, each in a process of its own that is idle now."""
    ours, bare = (
        stack.enter_context(Worker("neighbour:Training", users, num_items)) for _ in range(2)
    )
    return {OUR_TRAINING: partial(ours.run, "ours"), BARE_TRL: partial(bare.run, "bare_trl")}


def slowdowns(ways: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the slow-down of each way in each round."""
    runs: Ways = {}
    for name, way in ways.items():
        runs[name] = way
        runs[f"{name}, neighbour"] = partial(beside_neighbour, way)
    seconds = alternate(runs, rounds)
    print_figures("seconds", seconds, digits=2)
    return {
        name: [
            busy / alone
            for busy, alone in zip(seconds[f"{name}, neighbour"], seconds[name], strict=True)
        ]
        for name in ways
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("npm", type=Path, help="folder in which node-llama-cpp is installed")
    parser.add_argument("users", type=Path, nargs="?", default=EXAMPLES, help="a JSONL of users")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--items", type=int, default=16, help="newest items that are trained on")
    options = parser.parse_args()
    options.device = "cpu"
    state = machine("neighbour", options)
    state["model"] = "smollm2 (Q4_1); LoRA r 8 on q_proj and v_proj; α 0.3"
    print(json.dumps(state), flush=True)
    with ExitStack() as stack:
        ways = decoding_ways(stack, options.npm, state["threads"], options.tokens)
        each = slowdowns(ways, options.rounds)
    with ExitStack() as stack:
        each |= slowdowns(training_ways(stack, options.users, options.items), options.rounds)
    figures = print_figures("slow-down", each, digits=2)
    ratios = print_ratios({name: (each[a], each[b]) for name, (a, b) in PAIRS.items()})
    print_report(state, slowdown=figures, ratios=ratios)


if __name__ == "__main__":
    main()
