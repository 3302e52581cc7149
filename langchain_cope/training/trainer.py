"""What both of TRL's trainers need to run inside another program's process.

TRL and transformers are made for scripts that own their process. Here they get explicit arguments
where their defaults cut, cast or warn; they report through a `Monitor` rather than by printing; and
the process's random state is put back when they are done.
"""

import copy
import math
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import torch
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from langchain_cope.engine import Base
from langchain_cope.errors import ModelError
from langchain_cope.training.fast import logits_of_completions_alone
from langchain_cope.training.launchers import launchers_hidden
from langchain_cope.training.progress import Monitor
from langchain_cope.training.recipe import Schedule

# peft asks for a property that transformers has renamed; our callers can do nothing about it.
warnings.filterwarnings(
    "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
)

# From this size on, a batch's activations outweigh the fifth of the speed that recomputing costs.
CHECKPOINTING_PARAMETERS = 1_000_000_000


def arguments(
    base: Base, schedule: Schedule, num_rows: int, seed: int, output_dir: str
) -> dict[str, Any]:
    """Return the arguments that SFTConfig and DPOConfig share, for `num_rows` rows of data.

    Nothing is written to `output_dir`. Raises `ModelError` for a base on a GPU that is not the
    first visible one: the trainer would move it there.
    """
    if base.device.type == "cuda" and base.device.index not in (None, 0):
        raise ModelError(
            f"the base is on {base.device}, but training runs on the first visible GPU: start the "
            f"process with CUDA_VISIBLE_DEVICES={base.device.index} and load the base on 'cuda'"
        )
    # `gradient_checkpointing` was renamed in transformers 5.2x: the old name warns there, and the
    # new one is unknown before.
    names = {option.name for option in fields(TrainingArguments)}
    checkpointing = "gradient_checkpointing"
    if "activation_checkpointing" in names:
        checkpointing = "activation_checkpointing"
    # The trainer rounds the warm-up up to whole steps, the first of them at rate 0: DPO on eight
    # pairs would be that one step and learn nothing.
    num_steps = math.ceil(num_rows / schedule.batch_size) * schedule.epochs
    has_warmup = num_steps * schedule.warmup >= 1
    return {
        "output_dir": output_dir,
        "learning_rate": schedule.learning_rate,
        "num_train_epochs": schedule.epochs,
        "per_device_train_batch_size": schedule.batch_size,
        "weight_decay": schedule.weight_decay,
        "max_grad_norm": schedule.max_grad_norm,
        "warmup_steps": schedule.warmup if has_warmup else 0,
        "lr_scheduler_type": "linear",
        "optim": "adamw_torch_fused",
        "bf16": base.dtype == torch.bfloat16,  # TRL's default casts whatever it gets
        "fp16": base.dtype == torch.float16 and base.device.type == "cuda",
        checkpointing: base.num_parameters >= CHECKPOINTING_PARAMETERS,
        # TRL's 1024 would cut the end of the turn and drop pairs in silence; `encode.fit` has cut.
        "max_length": None,
        "use_cpu": base.device.type == "cpu",
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": base.device.type == "cuda",
        "seed": seed,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }


def on_one_device(args: TrainingArguments) -> Any:
    """Return `args` for the base's device alone.

    With several GPUs in sight the trainer would copy the base to each of them.
    """
    _ = args.device  # counts the GPUs
    args._n_gpu = min(1, args._n_gpu)
    return args


def tokenizer_copy(base: Base) -> PreTrainedTokenizerBase:
    """Return a tokenizer that the trainers may change.

    They set its padding token, and the base's own is part of its fingerprint.
    """
    return copy.deepcopy(base.tokenizer)


def train(trainer: Trainer, monitor: Monitor) -> None:
    """Run `trainer` and report each step to `monitor`.

    Raises `Cancelled` at the next step after `monitor` asks for a stop.
    """
    trainer.remove_callback(PrinterCallback)  # it prints every log to standard output
    trainer.add_callback(_StepReporter(monitor))
    monitor.raise_if_stopped()
    model: Any = trainer.model
    with logits_of_completions_alone(model.get_output_embeddings().weight):
        trainer.train()
    monitor.raise_if_stopped()


class _StepReporter(TrainerCallback):
    """Tells a monitor of each step, and the trainer of a stop."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs and "loss" in logs:
            loss = float(logs["loss"])
            self._monitor.step_done(state.global_step, state.max_steps, loss=loss)
        if self._monitor.should_stop():
            control.should_training_stop = True


@contextmanager
def undisturbed(folder: Path) -> Iterator[str]:
    """Yield a scratch folder beside `folder` for a trainer that neither disturbs nor is disturbed.

    Random states and launchers' leftovers are as before after the block.
    """
    with (
        random_state_kept(),
        launchers_hidden(),
        TemporaryDirectory(dir=folder.parent, prefix=".") as scratch,
    ):
        yield scratch


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the process's random states back after the block: trainers seed all of them."""
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    torch_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
