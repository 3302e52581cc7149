"""What rounding does to answers: float32, bfloat16, and products with a GGUF file's 4-bit blocks.

    python benchmarks/quality.py [USERS.jsonl] [--prompts 200] [--adapter FOLDER]

Three engines on `smollm2` answer prompts of the file's users: in float32, in bfloat16, and in
bfloat16 with packed products, which compute steps of few rows (the default). float32 is the
reference, and answers 16 prompts at a time, as it rounds too little for that to matter. Beside each
stands:

    equal answers       share of greedy answers of 24 tokens, of the base alone, that are float32's
    first difference    mean position of the first token that differs, where one does
    perplexity          of what the users wrote, under the base, read token by token, in as many
                        rows as packed products compute where they compute two, else in 32
    nats                mean distance from float32's log-probability of those tokens, base and user
    contrastive tokens  share of steps, along float32's contrastive answers (α 0.3), at which the
                        same token is chosen
    beside 15 others    share of answers that stay the same when 16 requests are answered together,
                        of the base alone and contrastive

The adapter is trained here on the first user's items (SFT) unless one is given. A table, then one
JSON object.
"""

import argparse
import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from worker import Worker, machine, print_report

from langchain_cope.engine import (
    Contrast,
    Engine,
    EngineOptions,
    Request,
    Sampling,
    load_base,
)
from langchain_cope.engine.decoding.contrast import contrast
from langchain_cope.engine.rows import Row

EXAMPLES = Path(__file__).parents[1] / "examples" / "data" / "user.jsonl"
CONTRAST = Contrast(0.3, 0.1)
NUM_TOKENS = 24
TOGETHER = 16
MAX_PROMPT, MAX_WRITTEN = 256, 32  # tokens; longer prompts are left out, longer texts cut
TRAINING_ITEMS = 32
SIDES = {"bfloat16": ("bfloat16", False), "packed": ("bfloat16", True)}
COLUMNS = {
    "equal answers": "equal",
    "first difference": "first_difference",
    "perplexity": "perplexity",
    "nats": "nats",
    "contrastive tokens": "contrastive_tokens",
    "beside 15 others": "beside_others",
    "the same, contrastive": "beside_others_contrastive",
}

Answers = list[list[int]]
Texts = list[tuple[list[int], list[int]]]
"""Prompts, and what follows them."""
Reading = tuple[list[int], list[list[float]]]
"""Of a text: the tokens that the contrast would have chosen, and the log-probabilities of its
own tokens under the user's model and under the base."""


def train(users: Path, folder: Path) -> None:
    """Train an adapter on the newest items of the file's first user."""
    from chain import as_items

    from langchain_cope.training.encode import fit
    from langchain_cope.training.progress import Monitor, Stage
    from langchain_cope.training.recipe import Recipe
    from langchain_cope.training.sft import train_sft

    base = load_base("smollm2", device="cpu")
    rows = read_users(users)[0]["history"][-TRAINING_ITEMS:]
    items = as_items(rows)
    recipe, monitor = Recipe.for_model(base, items), Monitor()
    examples, _ = fit(base, items, recipe.max_length, recipe.max_words)
    with monitor.stage(Stage.SFT):
        train_sft(base, examples, recipe, folder, monitor)


def read_users(users: Path) -> list[dict[str, Any]]:
    """Return the users of a file of JSON lines."""
    lines = users.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


class Side:
    """One of the three engines."""

    def __init__(self, adapter: Path, dtype: str | None, packed: bool) -> None:
        base = load_base("smollm2", device="cpu", dtype=dtype)
        options = EngineOptions(speculation=False, prefix_cache=0, packed_weights=packed)
        self._engine = Engine(base, options)
        self._adapter = self._engine.load_adapter(adapter)

    def about(self) -> dict[str, Any]:
        """Return the dtype, and up to how many rows products are packed."""
        forward = self._engine._batch.forward
        return {"dtype": str(self._engine.base.dtype), "packed_rows": forward.packed_rows}

    def texts(self, users: Path, number: int) -> Texts:
        """Return prompts of the users in turn, and what they wrote, as token ids."""
        base = self._engine.base
        items = [user["history"] + user.get("queries", []) for user in read_users(users)]
        found: Texts = []
        for item in itertools.chain.from_iterable(itertools.zip_longest(*items)):
            if item is None or len(found) == number:
                continue
            prompt = base.prompt_ids([{"role": "user", "content": item["prompt"]}])
            written = base.tokenizer(item["completion"], add_special_tokens=False).input_ids
            if written and len(prompt) <= MAX_PROMPT:
                found.append((prompt, written[:MAX_WRITTEN]))
        return found

    def answers(self, prompts: Answers, together: int, contrastive: bool) -> Answers:
        """Return greedy answers, so many decoded at a time."""
        adapter = self._adapter if contrastive else None
        requests = [
            Request(prompt, adapter, CONTRAST, Sampling(max_tokens=NUM_TOKENS))
            for prompt in prompts
        ]
        groups = [requests[i : i + together] for i in range(0, len(requests), together)]
        return [
            list(answer.token_ids) for group in groups for answer in self._engine.generate(group)
        ]

    def forced(self, texts: Texts) -> list[Reading]:
        """Read each text token by token, in two rows as an answer's."""
        packed_rows = self._engine._batch.forward.packed_rows
        together = min([rows // 2 for rows in packed_rows if rows >= 2], default=TOGETHER)
        groups = [texts[i : i + together] for i in range(0, len(texts), together)]
        return [
            reading
            for group in groups
            for reading in self._engine._call(partial(self._read, group))
        ]

    def _read(self, texts: Texts) -> list[Reading]:
        batch, number = self._engine._batch, len(texts)
        rows, forward = batch.new_rows(), batch.forward
        longest = max(len(text) for _, text in texts)
        rows.kv.reserve(2 * number, max(len(prompt) for prompt, _ in texts) + longest)
        for adapter in (self._adapter, None):
            for prompt, text in texts:
                rows.add(Row([*prompt, *text], adapter))
        rows.forward(forward, [prompt[:-1] for prompt, _ in texts * 2], [(0, 0)])
        for row, (prompt, _) in zip(rows.all(), texts * 2, strict=True):
            row.length = len(prompt) - 1
        readings: list[Reading] = [([], []) for _ in texts]
        for step in range(longest):  # what is read of a shorter text after its end does not count
            logits = rows.forward(
                forward,
                [row.tokens[row.length :][:1] or [0] for row in rows.all()],
                [(index, 0) for index in range(2 * number)],
            ).float()
            for index, (_, text) in enumerate(texts):
                if step < len(text):
                    pair = logits[[index, number + index]]
                    scores = contrast(pair[0], pair[1], CONTRAST.alpha, CONTRAST.tau)
                    chosen, log_probs = readings[index]
                    chosen.append(int(scores.argmax()))
                    log_probs.append(torch.log_softmax(pair, -1)[:, text[step]].tolist())
            for row in rows.all():
                row.length += 1
        return readings


@dataclass(frozen=True)
class Reference:
    """What float32 gives."""

    texts: Texts
    answers: Answers
    """Of the base alone."""
    talks: Texts
    """The prompts with the contrastive answers."""
    read: list[Reading]
    """Of `texts`."""


def measure(users: Path, number: int, adapter: Path) -> tuple[dict[str, Any], int]:
    """Return the figures of each side, and the number of prompts."""
    figures: dict[str, Any] = {}
    with Worker("quality:Side", adapter, "float32", False) as side:
        texts: Texts = side.run("texts", users=users, number=number)
        prompts = [prompt for prompt, _ in texts]
        answers, talks = (
            side.run("answers", prompts=prompts, together=TOGETHER, contrastive=contrastive)
            for contrastive in (False, True)
        )
        read = side.run("forced", texts=texts)
        figures["float32"] = {"perplexity": perplexity(read), **side.run("about")}
    exact = Reference(texts, answers, list(zip(prompts, talks, strict=True)), read)
    for name, settings in SIDES.items():
        with Worker("quality:Side", adapter, *settings) as side:
            figures[name] = figures_of(side, exact)
            figures[name]["beside_others_contrastive"] = contrastive_beside_others(side, exact)
            print(name, figures[name], flush=True)
    return figures, len(prompts)


def figures_of(side: Worker, exact: Reference) -> dict[str, Any]:
    """Return the figures of one side against float32's."""
    prompts = [prompt for prompt, _ in exact.texts]
    alone = side.run("answers", prompts=prompts, together=1, contrastive=False)
    together = side.run("answers", prompts=prompts, together=TOGETHER, contrastive=False)
    pairs = zip(alone, exact.answers, strict=True)
    differences = [place for pair in pairs if (place := differs(*pair))]
    read = side.run("forced", texts=exact.texts)
    own = [token for _, log_probs in read for token in log_probs]
    theirs = [token for _, log_probs in exact.read for token in log_probs]
    chosen = [token for tokens, _ in side.run("forced", texts=exact.talks) for token in tokens]
    expected = [token for _, answer in exact.talks for token in answer]
    return {
        "equal": share_equal(alone, exact.answers),
        "first_difference": statistics.mean(differences) if differences else None,
        "perplexity": perplexity(read),
        "nats": distance(own, theirs),
        "contrastive_tokens": share_equal(chosen, expected),
        "beside_others": share_equal(together, alone),
        **side.run("about"),
    }


def contrastive_beside_others(side: Worker, exact: Reference) -> float:
    """Return the share of contrastive answers that stay the same beside others."""
    prompts = [prompt for prompt, _ in exact.texts]
    alone, together = (
        side.run("answers", prompts=prompts, together=number, contrastive=True)
        for number in (1, TOGETHER)
    )
    return share_equal(alone, together)


def perplexity(read: list[Reading]) -> float:
    """Return that of texts under the base."""
    return math.exp(-statistics.mean(base for _, each in read for _, base in each))


def differs(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Return the position, from 1, of the first token that differs; None where none does."""
    pairs = enumerate(itertools.zip_longest(one, other), start=1)
    return next((place for place, (a, b) in pairs if a != b), None)


def share_equal(some: Sequence[object], others: Sequence[object]) -> float:
    """Return the share that are the same."""
    return statistics.mean(one == other for one, other in zip(some, others, strict=True))


def distance(own: list[list[float]], theirs: list[list[float]]) -> float:
    """Return the mean distance of log-probabilities, both models' together."""
    pairs = zip(itertools.chain(*own), itertools.chain(*theirs), strict=True)
    return statistics.mean(abs(one - other) for one, other in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("users", type=Path, nargs="?", default=EXAMPLES, help="a JSONL of users")
    parser.add_argument("--prompts", type=int, default=200, help="at most; as many as there are")
    parser.add_argument("--adapter", type=Path, help="a peft folder for smollm2")
    options = parser.parse_args()
    state = machine("quality", argparse.Namespace(device="cpu", prompts=options.prompts))
    state["model"] = "smollm2 (Q4_1)"
    with tempfile.TemporaryDirectory() as folder:
        adapter = options.adapter
        if adapter is None:
            adapter = Path(folder) / "adapter"
            Worker("quality:train", options.users, adapter).close()
        figures, number = measure(options.users, options.prompts, adapter)
    print(f"\n{number} prompts{'':<13}" + "".join(f"{name:>12}" for name in figures))
    for title, key in COLUMNS.items():
        cells = [of_side.get(key) for of_side in figures.values()]
        texts = ["" if cell is None else f"{cell:.4f}" for cell in cells]
        print(f"{title:<24}" + "".join(f"{text:>12}" for text in texts))
    print_report(state, users=options.users.name, num_prompts=number, figures=figures)


if __name__ == "__main__":
    main()
