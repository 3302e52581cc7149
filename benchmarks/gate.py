"""How often the gate publishes what it should not, and what it should: on really trained adapters.

    python benchmarks/gate.py runs.jsonl --users users.jsonl --base-users others.jsonl [--runs 50]
        [--kinds real,shuffled,other,mixed,written] [--items 5,10,20,30,80] [--seconds 3000]

Both files have one user a line (`{"user_id", "history": [{"prompt", "completion"}], "queries"}`),
of other people. A run takes the newest n items of one user, holds out the newest of them as
`PersonalizeUser` does, trains by SFT on items of its kind and judges by the user's held-out items.

| kind | trained on | to be published |
|---|---|---|
| `real` | the user's own items | yes, from 30 items on |
| `shuffled` | the user's items, the answers in another order among the prompts | no |
| `other` | as many items of one other user of the file | no |
| `mixed` | half of them one other user's, half of them another one's | no |
| `written` | the user's prompts, each answered by the base itself (temperature 1) | no |

The base carries a task adapter, trained once on items of the base users. For each n another adapter
is trained once on as many items of theirs: anybody's, the reference of the rule "and anybody's".

Every finished run is a line of `runs.jsonl`, with all likelihoods and no text, and is not run
again; the adapters lie in `runs.jsonl.adapters`. So it can be stopped and go on, by `--seconds`
too; `--runs 0` reports alone, by the rules as they are now. Rules:

- `old`: the NLL of all held-out tokens together is lower than the base's;
- `new`: the verdict, with the base (task adapter merged) as the reference;
- `new2`: the same, with anybody's adapter as a second reference.

Targets: of each null kind at most 10 % published; of `real` at 30 items and more at least 80 %. The
last line is one JSON object. Its `prior` is what `personalization/priors.json` may hold for the
base: mean and standard deviation of the users' true gains in units of an item's, by moments.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets.utils import logging as datasets_logging
from transformers.utils import logging as transformers_logging

from langchain_cope.engine import Engine, Request, Sampling, load_base
from langchain_cope.evaluation.evaluate import item_nll
from langchain_cope.history import read_users
from langchain_cope.history.items import Item
from langchain_cope.personalization.certainty import prior_of
from langchain_cope.personalization.evidence import Evidence, gather
from langchain_cope.personalization.held_out import divide, split
from langchain_cope.personalization.verdict import Reference, judge
from langchain_cope.training.encode import fit
from langchain_cope.training.first_sight import FIRST_SIGHT
from langchain_cope.training.progress import Monitor, Stage
from langchain_cope.training.recipe import SFT, Recipe
from langchain_cope.training.sft import train_sft

KINDS = ("real", "shuffled", "other", "mixed", "written")
RULES = ("old", "new", "new2")
# Of the task adapter: higher than the paper's rate, whose base has 50 times the parameters.
TASK = SFT(learning_rate=3e-4, epochs=1, batch_size=8, rank=16, lora_alpha=16, targets="linear")
WRITTEN_TOKENS = 64  # of an answer that the base writes, at most


@dataclass(frozen=True)
class Plan:
    """One run to be made."""

    kind: str
    num_items: int
    user: int
    """Index in the file of users."""

    @property
    def key(self) -> tuple[str, int, int]:
        """Return what the run is known by."""
        return self.kind, self.num_items, self.user


def plans(options: Any, users: Sequence[list[Item]]) -> Iterator[Plan]:
    """Yield what is to be run, a little of everything first."""
    made = dict.fromkeys(options.kinds, 0)
    for user in range(len(users)):
        for num_items in options.items:
            for kind in options.kinds:
                # Every length begins with another user, so that few runs see many users.
                which = (user + options.items.index(num_items)) % len(users)
                if len(users[which]) >= num_items and made[kind] < options.runs:
                    made[kind] += 1
                    yield Plan(kind, num_items, which)


def items_to_train_on(engine: Engine, plan: Plan, users: Sequence[list[Item]]) -> list[Item]:
    """Return the items of that kind, as many as of the user's own would be trained on."""
    chance = random.Random(f"{plan.key}")
    own, _ = split(users[plan.user][-plan.num_items :])
    others = [user for index, user in enumerate(users) if index != plan.user]
    if plan.kind == "shuffled":
        answers = [item.completion for item in own]
        chance.shuffle(answers)
        return [
            item.model_copy(update={"completion": answer})
            for item, answer in zip(own, answers, strict=True)
        ]
    if plan.kind == "other":
        return chance.choice([user for user in others if len(user) >= len(own)])[-len(own) :]
    if plan.kind == "mixed":
        one, another = chance.sample(others, 2)
        half = len(own) // 2
        return one[-half:] + another[half - len(own) :]
    if plan.kind == "written":
        requests = [
            Request(
                engine.base.prompt_ids(item.messages),
                sampling=Sampling(
                    max_tokens=WRITTEN_TOKENS, temperature=1.0, seed=chance.getrandbits(40)
                ),
                offline=True,
            )
            for item in own
        ]
        texts = [answer.text.strip() for answer in engine.generate(requests)]
        return [
            item.model_copy(update={"completion": text})
            for item, text in zip(own, texts, strict=True)
            if text
        ]
    return own


def train(engine: Engine, items: Sequence[Item], recipe: Recipe, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    examples, _ = fit(engine.base, items, recipe.max_length, recipe.max_words)
    monitor = Monitor()
    with monitor.stage(Stage.SFT):
        train_sft(engine.base, examples, recipe, folder, monitor)


def run(engine: Engine, plan: Plan, users: Sequence[list[Item]], anybody: Path) -> dict[str, Any]:
    """Train and score one run, and return all that a rule may ask of it."""
    started = time.perf_counter()
    trained = items_to_train_on(engine, plan, users)
    _, newest = split(users[plan.user][-plan.num_items :])
    held_out = [newest[index] for index in divide(newest)[1]]
    recipe = Recipe.for_model(engine.base, trained)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "sft"
        train(engine, trained, recipe, folder)
        first_sights = json.loads((folder.parent / FIRST_SIGHT).read_text())
        adapter = engine.load_adapter(folder)
        of_base = item_nll(engine, held_out, recipe)
        trained_at = time.perf_counter()
        prior = prior_of(engine.base.fingerprint())
        evidence = gather(engine, trained, held_out, recipe, first_sights, of_base, prior)
        judged_at = time.perf_counter()
        nll = {
            "base": of_base,
            "adapter": item_nll(engine, held_out, recipe, adapter),
            "anybody": item_nll(engine, held_out, recipe, engine.load_adapter(anybody)),
        }
    examples, _ = fit(engine.base, held_out, recipe.max_length, recipe.max_words)
    return {
        "kind": plan.kind,
        "items": plan.num_items,
        "user": plan.user,
        "nll": nll,
        "tokens": [len(example.completion_ids) for example in examples],
        "evidence": asdict(evidence),
        "base": engine.base.fingerprint(),
        "seconds": {
            "train": round(trained_at - started, 2),
            "gather": round(judged_at - trained_at, 2),
        },
    }


def published(record: dict[str, Any]) -> dict[str, bool]:
    """Return what each rule says of a run."""
    nll, tokens = record["nll"], record["tokens"]
    pooled = {
        name: sum(each * number for each, number in zip(nll[name], tokens, strict=True))
        for name in ("base", "adapter")
    }
    base = Reference("the base", nll["base"], is_base=True)
    anybody = Reference("anybody's adapter", nll["anybody"])
    evidence, prior = Evidence(**record["evidence"]), prior_of(record["base"])
    verdicts = {
        rule: judge("sft", nll["adapter"], references, range(len(tokens)), evidence, prior)
        for rule, references in (("new", [base]), ("new2", [base, anybody]))
    }
    return {
        "old": pooled["adapter"] < pooled["base"],
        **{rule: verdict.published for rule, verdict in verdicts.items()},
    }


def report(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Print the table, and return the same as numbers."""
    cells: dict[tuple[str, int], list[dict[str, bool]]] = {}
    for record in records:
        cells.setdefault((record["kind"], record["items"]), []).append(published(record))
    print(f"{'kind':<10}{'items':>6}{'runs':>6}" + "".join(f"{rule:>8}" for rule in RULES))
    shares = []
    for kind in KINDS:
        groups: list[tuple[str, list[dict[str, bool]]]] = [
            (str(length), said) for (of, length), said in sorted(cells.items()) if of == kind
        ]
        if not groups:
            continue
        everything = [verdict for _, said in groups for verdict in said]
        long = [verdict for length, said in groups if int(length) >= 30 for verdict in said]
        for length, said in [*groups, ("≥ 30", long), ("all", everything)]:
            if said:
                share = {rule: statistics.fmean(one[rule] for one in said) for rule in RULES}
                shares.append({"kind": kind, "items": length, "runs": len(said), **share})
                figures = "".join(f"{share[rule]:>8.0%}" for rule in RULES)
                print(f"{kind:<10}{length:>6}{len(said):>6}{figures}")
    seconds = [record["seconds"] for record in records]
    cost = sum(each["gather"] for each in seconds) / sum(each["train"] for each in seconds)
    print(f"the evidence took {cost:.1%} of SFT's time")
    return {"shares": shares, "evidence_over_sft": round(cost, 4), "prior": moments(records)}


def moments(records: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Return mean and SD of the real users' true gains, in units of their items' SD."""
    effects, variances = [], []
    for record in records:
        gains = [
            b - a for b, a in zip(record["nll"]["base"], record["nll"]["adapter"], strict=True)
        ]
        if record["kind"] == "real" and len(gains) >= 4:
            effects.append(statistics.fmean(gains) / statistics.stdev(gains))
            variances.append(1 / len(gains))
    if len(effects) < 4:
        return None
    spread = statistics.variance(effects) - statistics.fmean(variances)
    sd = max(0.0, spread) ** 0.5
    return {"mean": round(statistics.fmean(effects), 3), "sd": round(sd, 3), "runs": len(effects)}


def read_items(file: Path) -> list[list[Item]]:
    return [[*user.items, *user.queries] for user in read_users(file)]


def make_runs(options: Any, done: set[tuple[str, int, int]]) -> None:
    started = time.monotonic()
    users, base_users = read_items(options.users), read_items(options.base_users)
    others = [item for user in base_users for item in user]
    adapters = Path(f"{options.out}.adapters")
    task = adapters / "task" / "sft"
    if not task.exists():
        engine = Engine.of(load_base(options.model))
        train(engine, others[: options.task_items], Recipe(sft=TASK, max_length=512), task)
        engine.close()
    engine = Engine.of(load_base(options.model, task_adapter=task))
    # Not those that the task adapter has seen.
    unseen = others[options.task_items :] or others
    for plan in plans(options, users):
        if plan.key in done:
            continue
        if options.seconds and time.monotonic() - started > options.seconds:
            break
        anybody = adapters / f"anybody_{plan.num_items}" / "sft"
        if not anybody.exists():
            num_trained = plan.num_items - max(2, round(0.2 * plan.num_items))
            items = random.Random(plan.num_items).sample(unseen, num_trained)
            train(engine, items, Recipe.for_model(engine.base, items), anybody)
        record = run(engine, plan, users, anybody)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{plan.key}: {published(record)} {record['seconds']}", file=sys.stderr, flush=True)
    engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="How often the gate is right.")
    parser.add_argument("out", type=Path, help="a JSONL of finished runs, made or gone on with")
    parser.add_argument("--users", type=Path, help="a JSONL of users")
    parser.add_argument("--base-users", type=Path, help="others, for the task adapter")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--runs", type=int, default=50, help="of each kind, over all lengths")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS))
    parser.add_argument(
        "--items", type=lambda text: [int(n) for n in text.split(",")], default=[5, 10, 20, 30, 80]
    )
    parser.add_argument("--task-items", type=int, default=2000)
    parser.add_argument("--seconds", type=float, help="begin no run after that time")
    options = parser.parse_args()
    datasets_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()

    def records() -> list[dict[str, Any]]:
        if not options.out.exists():
            return []
        return [json.loads(line) for line in options.out.read_text(encoding="utf-8").splitlines()]

    if options.runs:
        if options.users is None or options.base_users is None:
            parser.error("--users and --base-users are needed to make runs")
        make_runs(options, {(r["kind"], r["items"], r["user"]) for r in records()})
    finished = records()
    if not finished:
        parser.error(f"no run is in {options.out}")
    print(json.dumps({"model": options.model, "runs": len(finished), **report(finished)}))


if __name__ == "__main__":
    main()
