"""The task adapter: one LoRA on what many users wrote, which learns the task and no person.

It is the first stage of the paper's chain. Merged into the base, it is what each user's own adapter
is trained on and contrasted with. Read `train_task_adapter`.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from langchain_cope.atomic_files import write_json
from langchain_cope.errors import HistoryError, InputError
from langchain_cope.history.items import Item, UserHistory
from langchain_cope.personalization.held_out import (
    MIN_ITEMS,
    count_trained_on,
    fingerprint_items,
    split,
)
from langchain_cope.personalization.run import reserved_device
from langchain_cope.text import count
from langchain_cope.training.progress import Monitor, Stage
from langchain_cope.training.recipe import Recipe, RecipeChoice, recipe_for

if TYPE_CHECKING:
    from langchain_cope.engine import Engine

FACTS = "task_adapter.json"  # beside the two files of the adapter
MIN_USERS = 2  # what one user wrote makes that user's own adapter


@dataclass(frozen=True)
class TaskAdapterResult:
    """What became of a task adapter."""

    folder: str | None
    """Plain peft LoRA folder, for `load_base(task_adapter=…)`; None where it was refused."""
    reason: str
    """Why it was kept or refused, with the numbers."""
    nll: dict[str, float]
    """Nats per token of held-out items under `base` and `task`: means over items, then users."""
    users_better: int
    """Users whose held-out items became likelier."""
    num_users: int
    """Users whose items were trained on."""
    num_judged: int
    """Those of them who also had items to hold out."""
    num_trained: int
    """Items."""
    num_held_out: int
    """Items."""
    timings: dict[str, float]
    """Seconds of each stage, by its name."""
    notes: list[str]
    """In words for people: what was cut or left out."""
    recipe: dict[str, Any]
    """The recipe as used, as plain data."""


def train_task_adapter(
    engine: "Engine",
    users: Sequence[UserHistory],
    folder: str | os.PathLike[str],
    *,
    all_shareable: bool = False,
    always: bool = False,
    recipe: RecipeChoice = Recipe.for_task,
    monitor: Monitor | None = None,
) -> TaskAdapterResult:
    """Train one LoRA on the items of many users, and leave it in `folder` if it helps.

    Of each user with five items or more the newest fifth is held out; nobody's `queries` are read.
    It helps where the users' mean NLL of held-out items is below the base's.

    Args:
        engine: The engine of the base, which has no task adapter yet.
        users: Used are those who are `shareable`.
        folder: A new folder, of a parent that exists. It appears whole or not at all.
        all_shareable: Use everybody: all of them agreed.
        always: Leave it there also where it does not help.
        recipe: Its stage `sft` is used.
        monitor: Hears of stages and steps, and may stop them.

    Raises:
        HistoryError: Fewer than two users are shareable, or nobody has items to hold out.
        InputError: `folder` is there already, or the base has a task adapter.
        ModelError: The base is quantized.
        Cancelled: `monitor` asked for a stop; nothing is left behind.
    """
    from langchain_cope.training.encode import fit
    from langchain_cope.training.pipeline import check_trainable
    from langchain_cope.training.sft import train_sft

    monitor = monitor or Monitor()
    target = _new_folder(folder)
    check_trainable(engine.base)
    if engine.base.task_adapter is not None:
        raise InputError("the base has a task adapter already: load it without one")
    chosen, notes = _shareable(users, all_shareable)
    trained, held_out = _split(chosen)
    used = recipe_for(recipe, engine.base, trained)
    examples, cuts = fit(engine.base, trained, used.max_length, used.max_words)
    if not examples:
        raise HistoryError(f"none of {len(trained)} items can be trained on: {'; '.join(cuts)}")
    with (
        reserved_device(engine.base.device, monitor),
        TemporaryDirectory(dir=target.parent, prefix=".") as scratch,
    ):
        unfinished = Path(scratch) / "adapter"
        with monitor.stage(Stage.SFT):
            train_sft(engine.base, examples, used, unfinished, monitor)
        with monitor.stage(Stage.EVALUATE):
            base, task = _judge(engine, held_out, used, unfinished, monitor)
        nll = {"base": fmean(base), "task": fmean(task)}
        helps = nll["task"] < nll["base"]
        result = TaskAdapterResult(
            folder=str(target) if helps or always else None,
            reason=_reason(nll, helps, always),
            nll=nll,
            users_better=sum(new < old for old, new in zip(base, task, strict=True)),
            num_users=len(chosen),
            num_judged=len(base),
            num_trained=len(examples),
            num_held_out=sum(map(len, held_out)),
            timings=dict(monitor.timings),
            notes=[*notes, *cuts],
            recipe=used.as_dict(),
        )
        if result.folder is not None:
            facts = {"base": engine.base.fingerprint(), "trained_on": fingerprint_items(trained)}
            write_json(unfinished / FACTS, asdict(result) | facts)
            unfinished.rename(target)
    return result


def count_known(task_adapter: Path, items: Sequence[Item]) -> int:
    """Return how many of `items` a task adapter was trained on, as far as its folder tells."""
    from langchain_cope.atomic_files import read_json

    file = task_adapter / FACTS
    if not file.is_file():
        return 0
    return count_trained_on(read_json(file).get("trained_on"), items)


def _new_folder(folder: str | os.PathLike[str]) -> Path:
    target = Path(folder).expanduser().absolute()
    if target.exists():
        raise InputError(f"{target} is there already: name a new folder for the task adapter")
    if not target.parent.is_dir():
        raise InputError(f"there is no folder {target.parent} to put the task adapter in: make it")
    return target


def _shareable(
    users: Sequence[UserHistory], all_shareable: bool
) -> tuple[list[UserHistory], list[str]]:
    """Return the users whose items may be used, and a note on the others."""
    chosen = [user for user in users if user.items and (all_shareable or user.shareable)]
    if len(chosen) < MIN_USERS:
        raise HistoryError(
            f"{len(chosen)} of {count(len(users), 'user')} can be used, and at least {MIN_USERS} "
            'are needed: on the line of each who agreed write "shareable": true, or say '
            "all_shareable (--all-shareable)"
        )
    num_others = len(users) - len(chosen)
    notes = [f"{count(num_others, 'user')} left out: not shareable"] if num_others else []
    return chosen, notes


def _split(users: Sequence[UserHistory]) -> tuple[list[Item], list[list[Item]]]:
    """Return the items to train on, and those held out of each user who has some."""
    trained: list[Item] = []
    held_out = []
    for user in users:
        try:
            older, newest = split(user.items)
        except HistoryError:  # too few
            trained += user.items
        else:
            trained += older
            held_out.append(newest)
    if not held_out:
        raise HistoryError(
            f"no user has {MIN_ITEMS} items or more, so that there is nothing to judge the task "
            "adapter by: collect more"
        )
    return trained, held_out


def _judge(
    engine: "Engine",
    held_out: Sequence[Sequence[Item]],
    recipe: Recipe,
    folder: Path,
    monitor: Monitor,
) -> tuple[list[float], list[float]]:
    """Return each user's mean held-out NLL under the base, and under the adapter in `folder`."""
    from langchain_cope.evaluation.evaluate import item_nll

    adapter = engine.load_adapter(folder)
    base, task = [], []
    for number, items in enumerate(held_out, start=1):
        base.append(fmean(item_nll(engine, items, recipe, None, monitor.should_stop)))
        task.append(fmean(item_nll(engine, items, recipe, adapter, monitor.should_stop)))
        monitor.step_done(number, len(held_out))
    return base, task


def _reason(nll: dict[str, float], helps: bool, always: bool) -> str:
    numbers = f"held-out NLL {nll['task']:.4f} nats a token against {nll['base']:.4f} of the base"
    if helps:
        return f"better: {numbers}"
    return f"not better, {'kept as asked' if always else 'not kept'}: {numbers}"
