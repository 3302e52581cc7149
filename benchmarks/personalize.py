"""What personalizing one user costs, and what of that is ours.

    python benchmarks/personalize.py users.jsonl [--items 80] [--pairs 3] [--model smollm2]
    python benchmarks/personalize.py users.jsonl --before FOLDER [--pairs 3]
    python benchmarks/personalize.py users.jsonl --runs 6

Reads the file's first user (`{"user_id", "history": [{"prompt", "completion"}], "queries": […]}`),
the newest items, and measures

1. the seconds of each stage of one whole run: SFT, negatives, DPO, and the evaluation on the
   queries;
2. `chain_vs_bare_trl`: our SFT and DPO over bare TRL doing the same: both trainers constructed from
   text and `train()` called, with the same arguments and the same reference forwards, in the dtype
   (float32 or bfloat16) that is the faster one for TRL on this machine. Alternating in one process,
   the median of the ratios. Imports and the load of the model are left out on both sides; mining
   and evaluation, which TRL does not do, on ours;
3. `peak_memory_vs_bare_trl`: the greatest resident size of a fresh process that runs the whole
   chain, mining included, over one that runs bare TRL in that dtype;
4. `parameter_storage`: bytes of all distinct matrices and vectors alive after the chain over those
   of the base and the two adapters; keys and values that the engine keeps as known beginnings
   (`EngineOptions.prefix_cache`) do not count;
5. `mining_vs_generate`: the seconds a token of sampling every item's candidates, ours over
   transformers' `generate` on the same weights, items, K, limit, temperature and top-p, in batches
   of 8 items with K answers each; `mining_and_scoring_vs_generate`: the same, with the rewards and
   the log-probabilities for DPO, over `generate` and plain forwards of base and adapter in batches
   of 8. Alternating, the median of the ratios.

With `--before`, a folder with another version of this project: `cope-lc personalize` of the file's
first user from both, in turn, each in a new process; `now_vs_before` is the median of the ratios,
of each stage and of the whole. With `--runs`: memory after each of so many runs in one process.

The last line is one JSON object; its `ratios` holds these names.
"""

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from chain import as_items, whole_chain
from datasets import Dataset
from datasets.utils import logging as datasets_logging
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from worker import alternate

from langchain_cope import PersonalizeUser
from langchain_cope.engine import Engine, load_base
from langchain_cope.evaluation.evaluate import evaluate
from langchain_cope.history.items import Item
from langchain_cope.training.adapter import lora_config, save_adapter
from langchain_cope.training.dpo import train_dpo
from langchain_cope.training.encode import fit
from langchain_cope.training.negatives import Pair, _requests, mine_negatives
from langchain_cope.training.pipeline import TrainingResult, train_user
from langchain_cope.training.progress import Monitor, Stage
from langchain_cope.training.recipe import Negatives, Recipe
from langchain_cope.training.sft import train_sft
from langchain_cope.training.trainer import arguments, tokenizer_copy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STAGES = ("sft", "negatives", "dpo", "evaluate")
GENERATE_ITEMS = 8  # items, or rows to score, of one batch of transformers
TRAINERS = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}
MINING_ROUNDS = 3  # at most: each samples every item's candidates three times


def read_items(options: Any, part: str) -> list[Item]:
    with options.users.open(encoding="utf-8") as file:
        rows = json.loads(file.readline())[part][-options.items :]
    return as_items(rows)


def our_chain(
    base: Any, items: list[Item], pairs: list[Pair], recipe: Recipe, folder: Path
) -> None:
    """Do everything that bare TRL does too: from text to two adapters, the negatives given."""
    monitor = Monitor()
    examples, _ = fit(base, items, recipe.max_length, recipe.max_words)
    with monitor.stage(Stage.SFT):
        train_sft(base, examples, recipe, folder / "sft", monitor)
    with monitor.stage(Stage.DPO):
        train_dpo(base, pairs, recipe, folder / "sft", folder / "dpo", monitor)


def bare_trl(
    base: Any,
    load: Callable[[], Any],
    texts: list[dict[str, Any]],
    recipe: Recipe,
    folder: Path,
    stages: Sequence[str] = tuple(TRAINERS),
) -> float:
    """Do the same with TRL alone, on models of its own; return the seconds without `load`."""
    seconds = 0.0
    for stage in stages:
        trainer_class, config_class = TRAINERS[stage]
        model = load()
        schedule = getattr(recipe, stage)
        extra = {"beta": recipe.dpo.beta, "loss_type": ["sigmoid"]} if stage == "dpo" else {}
        columns = ("prompt", "completion") if stage == "sft" else ("prompt", "chosen", "rejected")
        started = time.perf_counter()
        trainer = trainer_class(
            model=model,
            args=config_class(
                **arguments(base, schedule, len(texts), recipe.seed, str(folder)), **extra
            ),
            train_dataset=Dataset.from_list(
                [{name: row[name] for name in columns} for row in texts]
            ),
            processing_class=tokenizer_copy(base),
            peft_config=lora_config(model, recipe.sft),
        )
        if stage == "dpo":
            set_peft_model_state_dict(
                trainer.model, load_file(folder / "sft" / "adapter_model.safetensors")
            )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        save_adapter(trainer.model, base.name, folder / stage)
        seconds += time.perf_counter() - started
    return seconds


def as_texts(items: list[Item], pairs: list[Pair]) -> list[dict[str, Any]]:
    """Return the pairs as the conversations that TRL tokenizes itself."""
    rows = []
    for pair in pairs:
        item = items[pair.index]
        own = [{"role": "assistant", "content": item.completion}]
        other = [{"role": "assistant", "content": pair.rejected}]
        answers = {"completion": own, "chosen": own, "rejected": other}
        rows.append({"prompt": item.messages, **answers})
    return rows


def loader(base: Any, dtype: torch.dtype) -> Callable[[], Any]:
    return lambda: AutoModelForCausalLM.from_pretrained(base.source, dtype=dtype)


def mine(engine: Engine, items: list[Item], recipe: Recipe, sft: Path) -> list[Pair]:
    monitor = Monitor()
    examples, _ = fit(engine.base, items, recipe.max_length, recipe.max_words)
    with monitor.stage(Stage.NEGATIVES):
        pairs, _ = mine_negatives(engine, examples, recipe, engine.load_adapter(sft), monitor)
    return pairs


def compare_times(
    base: Any, items: list[Item], pairs: list[Pair], recipe: Recipe, options: Any
) -> dict[str, list[float]]:
    """Return the seconds of each way, by round."""
    texts = as_texts(items, pairs)
    paired = [items[pair.index] for pair in pairs]

    def ours() -> float:
        with tempfile.TemporaryDirectory() as scratch:
            started = time.perf_counter()
            our_chain(base, paired, pairs, recipe, Path(scratch))
            return time.perf_counter() - started

    def bare(dtype: torch.dtype) -> float:
        with tempfile.TemporaryDirectory() as scratch:
            return bare_trl(base, loader(base, dtype), texts, recipe, Path(scratch))

    ways = {"ours": ours, **{name: partial(bare, dtype) for name, dtype in DTYPES.items()}}
    return alternate(ways, options.pairs)


def compare_mining(
    engine: Engine, items: list[Item], recipe: Recipe, sft: Path, options: Any
) -> dict[str, Any]:
    """Return seconds a token by way and round, and the medians of ours over theirs."""
    base = engine.base
    examples, _ = fit(base, items, recipe.max_length, recipe.max_words)
    prompts = [base.prompt_ids(example.item.messages) for example in examples]
    dtype = next(base.model.parameters()).dtype
    plain, other = (
        AutoModelForCausalLM.from_pretrained(base.source, dtype=dtype).eval() for _ in range(2)
    )
    personal = PeftModel.from_pretrained(other, sft).eval()
    adapter = engine.load_adapter(sft)
    num_tokens = 0

    def ours(scored: bool) -> float:
        nonlocal num_tokens
        engine.drop_caches()
        started = time.perf_counter()
        if scored:
            monitor = Monitor()
            with monitor.stage(Stage.NEGATIVES):
                mine_negatives(engine, examples, recipe, adapter, monitor)
        else:
            # Nothing closes these answers: all of their tokens are sampled. Seeds make every run
            # sample the same, the scored ones too.
            requests = (each for one in examples for each in _requests(base, one, recipe, ()))
            num_tokens = sum(len(each.token_ids) for each in engine.generate_each(requests))
        return (time.perf_counter() - started) / num_tokens

    def theirs() -> tuple[float, float]:
        started = time.perf_counter()
        answers = generated(plain, prompts, recipe, base)
        sampled = time.perf_counter() - started
        started = time.perf_counter()
        plain_scores(personal, answers)
        plain_scores(plain, answers)
        scored = time.perf_counter() - started
        number = sum(len(answer) for _, answer in answers)
        return sampled / number, (sampled + scored) / number

    rounds = []
    for number in range(min(options.pairs, MINING_ROUNDS)):
        first = (ours(False), ours(True)) if number % 2 else None
        other = theirs()
        rounds.append((first or (ours(False), ours(True)), other))
    ratios = [[own / their for own, their in zip(*each, strict=True)] for each in rounds]
    sampling, scoring = (statistics.median(each) for each in zip(*ratios, strict=True))
    return {"seconds_a_token": rounds, "sampling": sampling, "scoring": scoring}


@torch.inference_mode()
def generated(
    model: Any, prompts: list[list[int]], recipe: Recipe, base: Any
) -> list[tuple[list[int], list[int]]]:
    """Return (prompt, answer) of every candidate, by transformers."""
    settings = recipe.negatives or Negatives()
    answers = []
    for start in range(0, len(prompts), GENERATE_ITEMS):
        batch = prompts[start : start + GENERATE_ITEMS]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in batch])
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=0,
            num_return_sequences=settings.candidates,
            max_new_tokens=recipe.max_new_tokens,
            eos_token_id=sorted(base.eos_ids),
            pad_token_id=0,
        )
        for row, sequence in enumerate(output[:, width:].tolist()):
            ends = [at + 1 for at, token in enumerate(sequence) if token in base.eos_ids]
            answer = sequence[: min(ends, default=len(sequence))]
            answers.append((batch[row // settings.candidates], answer))
    return answers


@torch.inference_mode()
def plain_scores(model: Any, answers: list[tuple[list[int], list[int]]]) -> None:
    """Compute the log-probabilities of the answers, those of like length together."""
    by_length = sorted(answers, key=lambda each: len(each[0]) + len(each[1]))
    for start in range(0, len(by_length), GENERATE_ITEMS):
        batch = [[*prompt, *answer] for prompt, answer in by_length[start : start + GENERATE_ITEMS]]
        width = max(map(len, batch))
        keep = width - min(len(prompt) for prompt, _ in by_length[start : start + GENERATE_ITEMS])
        ids = torch.tensor([each + [0] * (width - len(each)) for each in batch])
        mask = torch.tensor([[1] * len(each) + [0] * (width - len(each)) for each in batch])
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=keep + 1).logits
        targets = ids[:, -keep:].unsqueeze(-1)
        logits[:, :-1].float().log_softmax(-1).gather(-1, targets)


def parameter_storage(result: TrainingResult, base: Any) -> float:
    """Return the distinct tensor storage alive over that of the base and the two adapters."""
    gc.collect()
    alive = {}
    for value in gc.get_objects():
        if (
            issubclass(type(value), torch.Tensor) and value.ndim <= 2
        ):  # isinstance wakes lazy objects
            storage = value.untyped_storage()
            alive[storage.data_ptr()] = storage.nbytes()
    needed = sum(parameter.nbytes for parameter in base.model.parameters())
    for folder in (result.sft, result.dpo):
        needed += (folder / "adapter_model.safetensors").stat().st_size
    return sum(alive.values()) / needed


def peak_memory(options: Any, role: str, pairs_file: Path, dtype: str) -> int:
    """Return the greatest resident size, in bytes, of a fresh process in that role."""
    command = [sys.executable, __file__, str(options.users)]
    command += ["--model", options.model, "--items", str(options.items)]
    command += ["--role", role, "--pairs-file", str(pairs_file), "--dtype", dtype]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(answer.stdout.splitlines()[-1])


def play_role(options: Any) -> None:
    """Do what a fresh process does of which the memory is measured."""
    base = load_base(options.model, dtype=None if options.role == "chain" else options.dtype)
    items = read_items(options, "history")
    recipe = whole_chain(base, items)
    pairs = [Pair(**row) for row in json.loads(options.pairs_file.read_text())]
    with tempfile.TemporaryDirectory() as scratch:
        if options.role == "chain":
            train_user(Engine.of(base), items, recipe, Path(scratch))
        else:  # on the one copy of the weights: the least that bare TRL can do with
            bare_trl(base, base.skeleton, as_texts(items, pairs), recipe, Path(scratch))
    print(peak_resident_bytes())


def peak_resident_bytes() -> int:
    """Return the greatest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include what the parent held when it forked
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_after_runs(options: Any) -> dict[str, Any]:
    """Return the resident bytes of this process after each run, each for a user of its own."""
    rows = [
        {"prompt": item.prompt, "completion": item.completion}
        for item in read_items(options, "history")
    ]
    resident = []
    with tempfile.TemporaryDirectory() as store:
        trainer = PersonalizeUser(model=options.model, store=store, device="cpu")
        for number in range(options.runs):
            trainer.invoke({"user_id": f"user {number}", "history": rows})
            gc.collect()
            resident.append(psutil.Process().memory_info().rss)
            print(f"  run {number}: {resident[-1] / 1e6:8.1f} MB resident", flush=True)
    ratio = round(max(resident) / resident[0], 3)
    print(f"  memory_largest_vs_first {ratio:8.3f}")
    return {"resident_bytes": resident, "ratios": {"memory_largest_vs_first": ratio}}


def compare_trees(options: Any) -> dict[str, Any]:
    """Return the seconds of each stage, here and before, by round, and the ratios' medians."""

    def personalize(tree: Path) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as store:
            command = [sys.executable, "-m", "cope_lc", "personalize", str(options.users)]
            command += ["--model", options.model, "--store", store, "--always", "--json"]
            paths = os.pathsep.join([str(tree), str(tree / "cli")])
            answer = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}
            )
        seconds: dict[str, float] = json.loads(answer.stdout)["timings"]
        return {**{stage: seconds[stage] for stage in STAGES}, "whole": sum(seconds.values())}

    here = Path(__file__).resolve().parents[1]
    ways = {"now": partial(personalize, here), "before": partial(personalize, options.before)}
    rounds: dict[str, Any] = alternate(ways, options.pairs, warm_up=False)
    ratios = {
        f"{stage}_now_vs_before": statistics.median(
            now[stage] / before[stage]
            for now, before in zip(rounds["now"], rounds["before"], strict=True)
        )
        for stage in (*STAGES, "whole")
    }
    for name, ratio in ratios.items():
        print(f"  {name:<28} {ratio:8.3f}")
    return {"seconds": rounds, "ratios": ratios}


def measure(options: Any, scratch: Path) -> dict[str, Any]:
    base = load_base(options.model)
    engine, items = Engine.of(base), read_items(options, "history")
    monitor = Monitor()
    result = train_user(engine, items, whole_chain(base, items), scratch / "whole", monitor)
    storage = parameter_storage(result, base)
    with monitor.stage(Stage.EVALUATE):
        queries = read_items(options, "queries")
        evaluate(engine, queries, result.recipe, result.folder, monitor)
    pairs = mine(engine, items, result.recipe, result.sft)
    pairs_file = scratch / "pairs.json"
    pairs_file.write_text(json.dumps([vars(pair) for pair in pairs]))
    mining = compare_mining(engine, items, result.recipe, result.sft, options)
    times = compare_times(base, items, pairs, result.recipe, options)
    engine.close()
    bare = min(DTYPES, key=lambda name: statistics.median(times[name]))
    chain_ratio = statistics.median(
        ours / theirs for ours, theirs in zip(times["ours"], times[bare], strict=True)
    )
    memory = {role: peak_memory(options, role, pairs_file, bare) for role in ("chain", "bare")}
    return {
        "items": len(items),
        "recipe": result.recipe.as_dict(),
        "stage_seconds": monitor.timings,
        "dtype": str(base.dtype),
        "sft_and_dpo_seconds": times,
        "bare_trl_dtype": bare,
        "mining_seconds_a_token": mining["seconds_a_token"],
        "peak_memory_bytes": memory,
        "ratios": {
            "chain_vs_bare_trl": round(chain_ratio, 3),
            "peak_memory_vs_bare_trl": round(memory["chain"] / memory["bare"], 3),
            "parameter_storage": round(storage, 4),
            "mining_vs_generate": round(mining["sampling"], 3),
            "mining_and_scoring_vs_generate": round(mining["scoring"], 3),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Cost of personalizing one user, against bare TRL."
    )
    parser.add_argument("users", type=Path, help="a JSONL of users; the first is taken")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--pairs", type=int, default=3, help="measured alternating rounds, after one to warm up"
    )
    parser.add_argument("--before", type=Path, help="another version of this project: its folder")
    parser.add_argument(
        "--items", type=int, default=80, help="newest items of the history that are trained on"
    )
    parser.add_argument(
        "--runs", type=int, default=0, help="measure memory after each of so many runs, only"
    )
    parser.add_argument("--role", choices=("chain", "bare"), help=argparse.SUPPRESS)
    parser.add_argument("--pairs-file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    options = parser.parse_args()
    datasets_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    if options.role:
        play_role(options)
        return
    if options.runs:
        print(json.dumps({"model": options.model, **memory_after_runs(options)}))
        return
    if options.before:
        print(json.dumps({"model": options.model, **compare_trees(options)}))
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        report = measure(options, Path(scratch))
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, "
        f"load {load:.1f} at start"
    )
    what = f"{options.model}, {report['dtype']}, {report['items']} items of {options.users.name}"
    print(f"{what}; {machine}")
    for stage, seconds in report["stage_seconds"].items():
        print(f"  {stage:<24} {seconds:8.2f} s")
    for name, ratio in report["ratios"].items():
        print(f"  {name:<24} {ratio:8.3f}")
    print(
        json.dumps(
            {"model": options.model, "machine": machine, "torch": torch.__version__, **report}
        )
    )


if __name__ == "__main__":
    main()
