"""What both of TRL's trainers need to run inside somebody else's process: quietly, reproducibly, on weights they do not own.

TRL and transformers are made for scripts that own their process. Here they get explicit arguments where their defaults cut, cast
or warn; they report through a `Watch` rather than by printing; and the process's random state is put back when they are done.
"""

import copy
import math
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
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
from langchain_cope.training.progress import Watch
from langchain_cope.training.recipe import Schedule

# peft asks for a property that transformers has renamed; whoever trains a user can do nothing about it.
warnings.filterwarnings(
    "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
)

# From this size on, the activations of a batch outweigh the fifth of the speed that recomputing them costs.
CHECKPOINTING_PARAMETERS = 1_000_000_000


def arguments(
    base: Base, schedule: Schedule, num_rows: int, seed: int, output_dir: str
) -> dict[str, Any]:
    """The arguments that SFTConfig and DPOConfig share, for ``num_rows`` rows. Nothing is written to ``output_dir``.

    Raises ``ModelError`` for a base on a GPU that is not the first visible one: the trainer would move it there.
    """
    if base.device.type == "cuda" and base.device.index not in (None, 0):
        raise ModelError(
            f"the base is on {base.device}, but training runs on the first visible GPU: "
            f"start the process with CUDA_VISIBLE_DEVICES={base.device.index} and load the base on 'cuda'"
        )
    # `gradient_checkpointing` was renamed in transformers 5.2x; the old name warns, the new one is unknown before.
    renamed = any(option.name == "activation_checkpointing" for option in fields(TrainingArguments))
    checkpointing = "activation_checkpointing" if renamed else "gradient_checkpointing"
    num_steps = math.ceil(num_rows / schedule.batch_size) * schedule.epochs
    return {
        "output_dir": output_dir,
        "learning_rate": schedule.learning_rate,
        "num_train_epochs": schedule.epochs,
        "per_device_train_batch_size": schedule.batch_size,
        "weight_decay": schedule.weight_decay,
        "max_grad_norm": schedule.max_grad_norm,
        # The trainer rounds up to whole steps, the first at rate 0: DPO on eight pairs would be that one step and learn nothing.
        "warmup_steps": schedule.warmup if num_steps * schedule.warmup >= 1 else 0,
        "lr_scheduler_type": "linear",
        "optim": "adamw_torch",
        "bf16": base.dtype == torch.bfloat16,  # TRL's default casts whatever it gets
        "fp16": base.dtype == torch.float16 and base.device.type == "cuda",
        checkpointing: base.num_parameters >= CHECKPOINTING_PARAMETERS,
        "max_length": None,  # TRL's 1024 would cut the end of the turn, and drop pairs in silence; `encode.fit` has cut
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
    """``args`` for the base's device alone: with several GPUs in sight the trainer would copy the base to each of them."""
    _ = args.device  # counts the GPUs
    args._n_gpu = min(1, args._n_gpu)
    return args


def tokenizer_copy(base: Base) -> PreTrainedTokenizerBase:
    """A tokenizer that the trainers may change: they set its padding token, and the base's is part of its fingerprint."""
    return copy.deepcopy(base.tokenizer)


def train(trainer: Trainer, watch: Watch) -> None:
    """Run ``trainer``, reporting each step to ``watch``; raises ``Cancelled`` at the next step after a stop was asked for."""
    trainer.remove_callback(PrinterCallback)  # it prints every log to standard output
    trainer.add_callback(_Reporter(watch))
    watch.raise_if_stopped()
    trainer.train()
    watch.raise_if_stopped()


class _Reporter(TrainerCallback):
    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs and "loss" in logs:
            self._watch.report(state.global_step, state.max_steps, loss=float(logs["loss"]))
        if self._watch.should_stop():
            control.should_training_stop = True


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the process's random states back afterwards: trainers seed all of them."""
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
