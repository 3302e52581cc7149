"""What personalizing one user costs, and what of that is ours.

    python benchmarks/personalize.py users.jsonl [--pairs 5] [--items 32] [--model starter]

Reads the file's first user (`{"user_id", "history": [{"prompt", "completion"}], "queries": […]}`), the newest items, and measures

1. the seconds of each stage of one whole run: SFT, negatives, DPO, and the evaluation on the queries;
2. `chain_vs_bare_trl`: our SFT and DPO over bare TRL doing the same: both trainers constructed from text and `train()` called,
   with the same arguments and the same reference forwards. Alternating pairs in one process, the median of their ratios.
   Imports and the load of the model are left out on both sides; mining and evaluation, which TRL has not, on ours;
3. `peak_memory_vs_bare_trl`: the greatest resident size of a fresh process that runs the whole chain, mining included, over
   one that runs bare TRL;
4. `parameter_storage`: bytes of all distinct matrices and vectors alive after the chain over those of the base and the two
   adapters; keys and values that the engine keeps as known beginnings (`EngineOptions.prefix_cache`) are none.

Targets: 2 at most 1.10, 3 at most 1.15, 4 at most 1.02. The last line is one JSON object; its `ratios` holds these names.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils import logging as datasets_logging
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from langchain_cope.engine import STARTER, Engine, load_base
from langchain_cope.evaluation.evaluate import evaluate
from langchain_cope.training.adapter import lora_config, save_adapter
from langchain_cope.training.dpo import train_dpo
from langchain_cope.training.encode import Example, fit
from langchain_cope.training.negatives import Pair, mine_negatives
from langchain_cope.training.pipeline import TrainingResult, train_user
from langchain_cope.training.progress import Watch, never, unheard
from langchain_cope.training.recipe import Recipe
from langchain_cope.training.sft import train_sft
from langchain_cope.training.trainer import arguments, tokenizer_copy


def read_examples(options: Any, part: str) -> list[Example]:
    with options.users.open(encoding="utf-8") as file:
        rows = json.loads(file.readline())[part][-options.items :]
    return [
        Example([{"role": "user", "content": row["prompt"]}], row["completion"]) for row in rows
    ]


def our_chain(
    base: Any, examples: list[Example], pairs: list[Pair], recipe: Recipe, folder: Path
) -> None:
    """Everything that bare TRL does too: from text to two adapters, the negatives given."""
    items, _ = fit(base, examples, recipe.max_length, recipe.max_words)
    train_sft(base, items, recipe, folder / "sft", Watch("sft", unheard, never))
    train_dpo(base, pairs, recipe, folder / "sft", folder / "dpo", Watch("dpo", unheard, never))


def bare_trl(
    base: Any, load: Callable[[], Any], texts: list[dict[str, Any]], recipe: Recipe, folder: Path
) -> float:
    """The same with TRL alone, on models of its own; returns the seconds without those that `load` takes."""
    seconds = 0.0
    for stage, trainer_class, config_class in (
        ("sft", SFTTrainer, SFTConfig),
        ("dpo", DPOTrainer, DPOConfig),
    ):
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


def as_texts(examples: list[Example], pairs: list[Pair]) -> list[dict[str, Any]]:
    """The pairs as the conversations that TRL tokenizes itself."""
    rows = []
    for pair in pairs:
        example = examples[pair.index]
        own, other = (
            [{"role": "assistant", "content": text}] for text in (example.completion, pair.rejected)
        )
        rows.append({"prompt": example.prompt, "completion": own, "chosen": own, "rejected": other})
    return rows


def loader(model: str) -> Callable[[], Any]:
    source = STARTER if model == "starter" else model
    return lambda: AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


def mine(engine: Engine, examples: list[Example], recipe: Recipe, sft: Path) -> list[Pair]:
    items, _ = fit(engine.base, examples, recipe.max_length, recipe.max_words)
    return mine_negatives(
        engine, items, recipe, engine.load_adapter(sft), Watch("negatives", unheard, never)
    )[0]


def compare_times(
    base: Any, examples: list[Example], pairs: list[Pair], recipe: Recipe, options: Any
) -> dict[str, Any]:
    load, texts = loader(options.model), as_texts(examples, pairs)
    kept = [examples[pair.index] for pair in pairs]
    ours, bare = [], []

    def run_ours(scratch: str) -> None:
        started = time.perf_counter()
        our_chain(base, kept, pairs, recipe, Path(scratch))
        ours.append(time.perf_counter() - started)

    def run_bare(scratch: str) -> None:
        bare.append(bare_trl(base, load, texts, recipe, Path(scratch)))

    for turn in range(options.pairs + 1):  # the first pair warms up; who goes first alternates
        for run in (run_ours, run_bare) if turn % 2 else (run_bare, run_ours):
            with tempfile.TemporaryDirectory() as scratch:
                run(scratch)
        print(f"  pair {turn}: ours {ours[-1]:6.2f} s, bare TRL {bare[-1]:6.2f} s", file=sys.stderr)
    ratios = [own / other for own, other in zip(ours[1:], bare[1:], strict=True)]
    return {
        "ours_seconds": ours[1:],
        "bare_trl_seconds": bare[1:],
        "ratio": statistics.median(ratios),
    }


def parameter_storage(result: TrainingResult, base: Any) -> float:
    """Distinct tensor storage alive in the process over that of the base and the two adapters."""
    gc.collect()
    tensors = [
        found
        for found in gc.get_objects()
        if issubclass(type(found), torch.Tensor) and found.ndim <= 2
    ]  # isinstance wakes lazy objects
    alive = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors
    }
    adapters = sum(
        (folder / "adapter_model.safetensors").stat().st_size for folder in (result.sft, result.dpo)
    )
    return sum(alive.values()) / (sum(p.nbytes for p in base.model.parameters()) + adapters)


def peak_memory(options: Any, role: str, pairs_file: Path) -> int:
    """Greatest resident size, in bytes, of a fresh process in that role."""
    command = [
        sys.executable,
        __file__,
        str(options.users),
        "--model",
        options.model,
        "--role",
        role,
    ]
    command += ["--pairs-file", str(pairs_file), "--items", str(options.items)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(answer.stdout.splitlines()[-1])


def play_role(options: Any) -> None:
    """What a fresh process does whose memory is measured."""
    base, examples = (
        load_base(options.model, dtype="float32", device="cpu"),
        read_examples(options, "history"),
    )
    recipe = Recipe.for_model(base, examples)
    pairs = [Pair(**row) for row in json.loads(options.pairs_file.read_text())]
    with tempfile.TemporaryDirectory() as scratch:
        if options.role == "chain":
            train_user(Engine.of(base), examples, recipe, Path(scratch))
        else:  # on the one copy of the weights: the least that bare TRL can do with
            bare_trl(base, base.skeleton, as_texts(examples, pairs), recipe, Path(scratch))
    print(peak_resident_bytes())


def peak_resident_bytes() -> int:
    """Greatest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include what the parent held when it forked
        return next(
            int(line.split()[1]) * 1024
            for line in status.read_text().splitlines()
            if line.startswith("VmHWM")
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def measure(options: Any, scratch: Path) -> dict[str, Any]:
    base = load_base(options.model, dtype="float32", device="cpu")
    engine, examples = Engine.of(base), read_examples(options, "history")
    result = train_user(engine, examples, Recipe.for_model(base, examples), scratch / "whole")
    storage = parameter_storage(result, base)
    started = time.perf_counter()
    evaluate(
        engine, read_examples(options, "queries"), result.recipe, sft=result.sft, dpo=result.dpo
    )
    seconds = {**result.timings, "evaluate": round(time.perf_counter() - started, 3)}
    pairs = mine(engine, examples, result.recipe, result.sft)
    pairs_file = scratch / "pairs.json"
    pairs_file.write_text(json.dumps([vars(pair) for pair in pairs]))
    times = compare_times(base, examples, pairs, result.recipe, options)
    engine.close()
    memory = {role: peak_memory(options, role, pairs_file) for role in ("chain", "bare")}
    return {
        "items": len(examples),
        "recipe": result.recipe.as_dict(),
        "stage_seconds": seconds,
        "ours_seconds": times["ours_seconds"],
        "bare_trl_seconds": times["bare_trl_seconds"],
        "peak_memory_bytes": memory,
        "ratios": {
            "chain_vs_bare_trl": round(times["ratio"], 3),
            "peak_memory_vs_bare_trl": round(memory["chain"] / memory["bare"], 3),
            "parameter_storage": round(storage, 4),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Cost of personalizing one user, against bare TRL."
    )
    parser.add_argument("users", type=Path, help="a JSONL of users; the first is taken")
    parser.add_argument("--model", default="starter")
    parser.add_argument(
        "--pairs", type=int, default=5, help="measured alternating pairs, after one to warm up"
    )
    parser.add_argument(
        "--items", type=int, default=32, help="newest items of the history that are trained on"
    )
    parser.add_argument("--role", choices=("chain", "bare"), help=argparse.SUPPRESS)
    parser.add_argument("--pairs-file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    datasets_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    if options.role:
        play_role(options)
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        report = measure(options, Path(scratch))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, load {load:.1f} at start"
    print(f"{options.model}, float32, {report['items']} items of {options.users.name}; {machine}")
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
