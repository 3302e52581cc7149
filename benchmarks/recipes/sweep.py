"""Which numbers of the training chain pay: one user's adapter a run, by likelihood and by words.

    python benchmarks/recipes/sweep.py runs.jsonl --task NAME=USERS.jsonl[=TASK_ADAPTER] …
        [--model smollm2] [--arms NAME,…] [--contrasts 0,0.3:0.1] [--users 4] [--items N]
        [--rate 5e-4] [--seconds 3000]

A file has one user a line (`{"user_id", "history", "queries"}`); adapters are trained on the newest
`--items` of the history and judged by the queries. `arms.py` says what each arm changes in
`Recipe.for_model`; the rate that arms multiply is `--rate`, else that recipe's. The NLL is the mean
over queries of nats a token; ROUGE-L is that of greedy answers, for every `α:τ` of `--contrasts`.

Every finished run is a line of `runs.jsonl` and is not run again; adapters lie in
`runs.jsonl.adapters`. So it can be stopped and go on, by `--seconds` too. All of it holds users'
texts: `report.py` makes tables of it, and the figures that may be kept.
"""

import argparse
import hashlib
import json
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from arms import ARMS, COOL, Arm, candidates_of, pairs_of
from datasets.utils import logging as datasets_logging
from transformers.utils import logging as transformers_logging

from langchain_cope.engine import Adapter, Contrast, Engine, Request, Sampling, load_base
from langchain_cope.evaluation.evaluate import item_nll
from langchain_cope.evaluation.rouge import mean_rouge
from langchain_cope.history import read_users
from langchain_cope.history.items import Item
from langchain_cope.training.dpo import train_dpo
from langchain_cope.training.encode import Encoded, fit, parts_of_reply
from langchain_cope.training.first_sight import FIRST_SIGHT
from langchain_cope.training.negatives import Pair
from langchain_cope.training.progress import Monitor, Stage
from langchain_cope.training.recipe import Recipe
from langchain_cope.training.sft import train_sft

MOST_TOKENS = 120  # of an answer


@dataclass(frozen=True)
class Task:
    """One file of users and the task adapter under them."""

    name: str
    users: str
    adapter: str | None

    @classmethod
    def of(cls, text: str) -> "Task":
        """Return the task that the command line writes as NAME=USERS.jsonl[=TASK_ADAPTER]."""
        name, users, *adapter = text.split("=")
        return cls(name, users, adapter[0] if adapter else None)


@dataclass
class Person:
    """One user as the runs need them."""

    task: Task
    number: int
    examples: list[Encoded]
    queries: list[Item]
    query_examples: list[Encoded]
    items: list[Item]
    recipe: Recipe

    @property
    def key(self) -> list[Any]:
        """Return what the user's runs are known by."""
        return [self.task.name, bool(self.task.adapter), self.number, len(self.items)]


def people(engine: Engine, task: Task, options: Any) -> Iterator[Person]:
    for number, user in enumerate(read_users(task.users)):
        if number < options.users:
            items = list(user.items)[-options.items :]
            recipe = Recipe.for_model(engine.base, items)
            examples, _ = fit(engine.base, items, recipe.max_length, recipe.max_words)
            queries, _ = fit(engine.base, user.queries, recipe.max_length, recipe.max_words)
            longest = max(len(example.completion_ids) for example in examples)
            recipe = replace(recipe, max_new_tokens=min(MOST_TOKENS, longest))
            yield Person(task, number, examples, list(user.queries), queries, items, recipe)


class Sweep:
    """All runs of one model, those of `file` done already."""

    def __init__(self, file: Path, model: str, rate: float | None, deadline: float) -> None:
        self._file, self._model, self._rate, self._deadline = file, model, rate, deadline
        self._adapters = Path(f"{file}.adapters")
        self._adapters.mkdir(parents=True, exist_ok=True)
        self.persons: list[Person] = []
        self.done: dict[str, dict[str, Any]] = {}
        if file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                run = json.loads(line)
                self.done[json.dumps(run["key"])] = run

    def out_of_time(self) -> bool:
        """Return whether no run is to be begun any more."""
        return time.monotonic() > self._deadline

    def is_done(self, key: list[Any]) -> bool:
        """Return whether the run of that key has its line."""
        return json.dumps(key) in self.done

    def keep(self, key: list[Any], **figures: Any) -> None:
        """Write the line of a run."""
        run = {"key": key, **figures}
        self.done[json.dumps(key)] = run
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run, ensure_ascii=False) + "\n")

    def folder(self, *parts: Any) -> Path:
        """Return where the adapter of these settings lies."""
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
        return self._adapters / digest

    def run(self, engine: Engine, person: Person, name: str, contrasts: Sequence[Contrast]) -> None:
        """Train, score and answer what is not done yet."""
        key = [self._model, *person.key, name]
        wanted = [
            contrast
            for contrast in contrasts
            if not self.is_done([*key, contrast.alpha, contrast.tau])
        ]
        if self.is_done(key) and not wanted:
            return
        adapter = self.adapter(engine, person, ARMS[name], key)
        if not self.is_done(key):
            self.keep(key, nll=item_nll(engine, person.queries, person.recipe, adapter))
        answers = generate(engine, person, adapter, wanted)
        references = [example.item.completion for example in person.query_examples]
        for contrast, texts in zip(wanted, answers, strict=True):
            pairs = zip(references, texts, strict=True)
            rouge = [mean_rouge([own], [text])["rougeL"] for own, text in pairs]
            self.keep([*key, contrast.alpha, contrast.tau], rougeL=rouge, texts=texts)

    def adapter(self, engine: Engine, person: Person, arm: Arm, key: list[Any]) -> Adapter | None:
        """Return the arm's adapter, trained where that was not done yet; None for the base."""
        if not arm.trains:
            return None
        recipe = arm.recipe(person.recipe, self._rate or person.recipe.sft.learning_rate)
        identity = [self._model, person.key, asdict(recipe.sft)]
        folder = self.folder(identity)
        sft = folder / "sft"
        if not sft.exists():
            folder.mkdir(exist_ok=True)
            seconds = timed(
                Stage.SFT,
                lambda monitor: train_sft(engine.base, person.examples, recipe, sft, monitor),
            )
            sights = json.loads((folder / FIRST_SIGHT).read_text(encoding="utf-8"))
            self.keep([*key, "sft"], seconds=seconds, first_sight=sights)
        if arm.dpo_rate is None:
            return engine.load_adapter(sft)
        dpo = folder / self.folder(asdict(recipe.dpo), arm.rejected).name
        if not dpo.exists():
            pairs = self.pairs(engine, person, recipe, arm.rejected, folder)
            seconds = timed(
                Stage.DPO,
                lambda monitor: train_dpo(engine.base, pairs, recipe, sft, dpo, monitor),
            )
            self.keep([*key, "dpo"], seconds=seconds, num_pairs=len(pairs))
        return engine.load_adapter(dpo)

    def pairs(
        self, engine: Engine, person: Person, recipe: Recipe, kind: str, folder: Path
    ) -> list[Pair]:
        """Return what DPO trains on; what was sampled is kept beside the adapter."""
        writer = "peer" if kind == "peers" else "base"
        temperature = COOL if kind == "lowest-cool" else 1
        file = folder / f"candidates-{writer}-{temperature:g}.pickle"
        if not file.exists():
            sft = engine.load_adapter(folder / "sft")
            peer = engine.load_adapter(self.peer(person, recipe)) if kind == "peers" else None
            found = candidates_of(engine, person.examples, recipe, sft, peer, temperature)
            file.write_bytes(pickle.dumps(found))
        return pairs_of(engine, pickle.loads(file.read_bytes()), kind)

    def peer(self, person: Person, recipe: Recipe) -> Path:
        """Return the SFT adapter of the next user."""
        others = [each for each in self.persons if each is not person]
        other = others[person.number % len(others)]
        return self.folder([self._model, other.key, asdict(recipe.sft)]) / "sft"


def timed(stage: Stage, work: Any) -> float:
    monitor = Monitor()
    with monitor.stage(stage):
        work(monitor)
    return monitor.timings[stage.value]


def generate(
    engine: Engine, person: Person, adapter: Adapter | None, contrasts: Sequence[Contrast]
) -> list[list[str]]:
    """Return for each contrast the greedy answers to the person's queries."""
    requests = []
    for contrast in contrasts:
        for example in person.query_examples:
            prompt = engine.base.prompt_ids(example.item.messages)
            requests.append(
                Request(
                    prompt,
                    adapter=adapter,
                    contrast=contrast,
                    sampling=Sampling(max_tokens=person.recipe.max_new_tokens or MOST_TOKENS),
                    parts=parts_of_reply(engine.base, prompt),
                    offline=True,
                )
            )
    texts = [answer.text for answer in engine.generate(requests)] if requests else []
    count = len(person.query_examples)
    return [texts[start : start + count] for start in range(0, len(texts), count)]


def contrast_of(text: str) -> Contrast:
    alpha, _, tau = text.partition(":")
    return Contrast(float(alpha), float(tau or 0.1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--task", type=Task.of, action="append", required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rate", type=float)
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS))
    parser.add_argument("--contrasts", default="")
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=3000)
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    datasets_logging.disable_progress_bar()
    contrasts = [contrast_of(text) for text in options.contrasts.split(",") if text]
    sweep = Sweep(options.runs, options.model, options.rate, time.monotonic() + options.seconds)
    for task in options.task:
        engine = Engine.of(load_base(options.model, task_adapter=task.adapter))
        sweep.persons = list(people(engine, task, options))
        for name in options.arms:
            for person in sweep.persons:
                if sweep.out_of_time():
                    sys.exit("out of time: start it again to go on")
                started = time.monotonic()
                sweep.run(engine, person, name, contrasts)
                took = time.monotonic() - started
                print(task.name, name, person.number, f"{took:.0f} s", file=sys.stderr)
        engine.close()


if __name__ == "__main__":
    main()
