"""How soon a fresh process has its first token, beside transformers and `cope-lc generate`.

    python benchmarks/first_answer.py [--rounds 9] [--model smollm2] [--before FOLDER]

Every run is a new process with a warm cache, timed from its start to its first token: wall seconds,
and seconds of the processor, which others on the machine disturb less. In each round every way runs
once, in every other round backwards:

1. `ChatCoPe`: import, `ChatCoPe(...)`, the first chunk of `stream`;
2. `cope-lc generate`: the same by the command line's code;
3. `transformers`: `AutoModelForCausalLM` and `AutoTokenizer` on the same unpacked folder in the
   same dtype, and `generate` of one token of the same prompt;
4. with `--before`, a folder with another version of this project: `ChatCoPe` from there.

`first_token_vs_transformers` is the median of the rounds' ratios of `ChatCoPe` to `transformers`,
`first_token_vs_before` that of `ChatCoPe` to the other version. Memory is what the process holds
after its first token: `anonymous` is its own, `file` the pages of mapped files, which processes
share. The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from worker import alternate, print_figures, print_ratios, print_report

PROMPT = "Say hello."
ROOT = Path(__file__).resolve().parents[1]

REPORT = """
import json, os, sys, time

def report():
    memory = {}
    status = "/proc/self/status"
    for line in open(status) if os.path.exists(status) else ():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile"):
            memory[name] = int(value.split()[0]) * 1024
    facts = {"at": time.time(), "cpu": time.process_time(), **memory}
    print(json.dumps(facts), file=sys.stderr, flush=True)
    os._exit(0)
"""
CHAT = """
from langchain_cope import ChatCoPe
chat = ChatCoPe(model=model, temperature=0.0, max_tokens=1)
next(chunk for chunk in chat.stream(prompt) if chunk.content)
report()
"""
GENERATE = """
class FirstWrite:
    encoding = "utf-8"
    def __init__(self, stream):
        self.stream = stream
    def write(self, text):
        if text.strip():
            report()
    def flush(self): pass
    def isatty(self): return False

sys.stdout = FirstWrite(sys.stdout)
from cope_lc.main import app
app(["generate", prompt, "--model", model, "--max-tokens", "1"])
"""
TRANSFORMERS = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(model)
loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
turns = [{"role": "user", "content": prompt}]
inputs = tokenizer.apply_chat_template(
    turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = loaded.generate(**inputs, max_new_tokens=1, do_sample=False)
tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:])
report()
"""


def first_token(program: str, root: Path, model: str) -> dict[str, float]:
    """Return the seconds from the start of a new process to its first token, and its memory."""
    values = f"model, prompt = {model!r}, {PROMPT!r}\n"
    paths = os.pathsep.join(map(str, (root, root / "cli")))
    started = time.time()
    run = subprocess.run(
        [sys.executable, "-c", REPORT + values + program],
        cwd=root,  # it comes first in the search for modules
        env={**os.environ, "PYTHONPATH": paths, "TRANSFORMERS_VERBOSITY": "error"},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    facts: dict[str, float] = json.loads(run.stderr.strip().splitlines()[-1])
    return {"wall": facts.pop("at") - started, **facts}


def unpacked(model: str) -> tuple[str, str]:
    """Return folder and dtype of what `model` is loaded from, found in a process of its own."""
    program = "from langchain_cope.engine import load_base\n"
    program += f"base = load_base({model!r})\nprint(base.source, base.dtype)"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    folder, dtype = run.stdout.splitlines()[-1].rsplit(" ", 1)
    return folder, dtype


def measure(options: argparse.Namespace, folder: str) -> dict[str, list[dict[str, float]]]:
    runs: dict[str, list[dict[str, float]]] = {}

    def run(name: str, program: str, root: Path, model: str) -> float:
        runs.setdefault(name, []).append(first_token(program, root, model))
        return runs[name][-1]["wall"]

    ways = {
        "ChatCoPe": (CHAT, ROOT, options.model),
        "cope-lc generate": (GENERATE, ROOT, options.model),
        "transformers": (TRANSFORMERS, ROOT, folder),
    }
    if options.before:
        ways["ChatCoPe before"] = (CHAT, options.before.resolve(), options.model)
    alternate({name: partial(run, name, *way) for name, way in ways.items()}, options.rounds)
    return {name: each[1:] for name, each in runs.items()}  # the first one warms caches


def figures(runs: Mapping[str, list[dict[str, float]]], fact: str, unit: float = 1) -> Any:
    return {name: [run[fact] / unit for run in each if fact in run] for name, each in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of a fresh process to its first token.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--before", type=Path, help="a folder with another version of this project")
    options = parser.parse_args()
    load = os.getloadavg()
    folder, dtype = unpacked(options.model)
    runs = measure(options, folder)
    results = {}
    for fact, title in (("wall", "seconds to the first token"), ("cpu", "of the processor")):
        of_fact = figures(runs, fact)
        results[fact] = print_figures(title, of_fact, digits=2)
        pairs = {
            f"first_token_vs_{name}": (of_fact["ChatCoPe"], of_fact[other])
            for name, other in (("transformers", "transformers"), ("before", "ChatCoPe before"))
            if other in of_fact
        }
        results[f"{fact}_ratios"] = print_ratios(pairs)
    for fact, title in (("RssAnon", "MB anonymous"), ("RssFile", "MB of mapped files")):
        if any("RssAnon" in run for run in runs["ChatCoPe"]):
            results[title] = print_figures(title, figures(runs, fact, 1e6), digits=0)
    state = {
        "benchmark": "first_answer",
        "cores": os.cpu_count(),
        "model": f"{options.model}, {dtype}",
        "rounds": options.rounds,
        "load_before": load,
    }
    print_report(state, **results, ratios=results["wall_ratios"])


if __name__ == "__main__":
    main()
