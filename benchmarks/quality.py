"""What rounding does to answers: float32, bfloat16, and products with a GGUF file's 4-bit blocks.

    python benchmarks/quality.py [USERS.jsonl] [--prompts 200] [--adapter FOLDER]

Three engines on `smollm2` answer prompts of the file's users: in float32, in bfloat16, and in
bfloat16 with packed products, which compute steps of few rows (the default). Beside each stands:

    equal answers       share of greedy answers of 24 tokens, of the base alone, that are float32's
    first difference    mean position of the first token that differs, where one does
    perplexity          of what the users wrote, under the base, read token by token: few rows
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
SIDES = {"float32": ("float32", False), "bfloat16": ("bfloat16", False), "packed": (None, True)}
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


def train(users: Path, folder: Path) -> None:
    """Train an adapter on the newest items of the file's first user."""
    from chain import as_items

    from langchain_cope.training.encode import fit
    from langchain_cope.training.progress import Monitor, Stage
    from langchain_cope.training.recipe import Recipe
    from langchain_cope.training.sft import train_sft

    base = load_base("smollm2", device="cpu", dtype="float32")
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

    def forced(self, texts: Texts) -> list[tuple[list[int], list[list[float]]]]:
        """Read each text token by token, in two rows as an answer's.

        Per text: the tokens that the contrast would have chosen, and the log-probabilities of the
        text's own tokens under the user's model and under the base.
        """
        return [self._engine._call(partial(self._read, *text)) for text in texts]

    def _read(self, prompt: list[int], text: list[int]) -> tuple[list[int], list[list[float]]]:
        batch = self._engine._batch
        rows, forward = batch.new_rows(), batch.forward
        rows.kv.reserve(2, len(prompt) + len(text))
        for adapter in (self._adapter, None):
            rows.add(Row([*prompt, *text], adapter))
        chosen, log_probs = [], []
        rows.forward(forward, [prompt[:-1]] * 2, [(0, 0)])
        for row in rows.all():
            row.length = len(prompt) - 1
        for last, token in itertools.pairwise([prompt[-1], *text]):
            logits = rows.forward(forward, [[last]] * 2, [(0, 0), (1, 0)])
            scores = contrast(logits[0], logits[1], CONTRAST.alpha, CONTRAST.tau)
            chosen.append(int(scores.argmax()))
            log_probs.append(torch.log_softmax(logits.float(), -1)[:, token].tolist())
            for row in rows.all():
                row.length += 1
        return chosen, log_probs


def measure(users: Path, number: int, adapter: Path) -> tuple[dict[str, Any], int]:
    """Return the figures of each side, and the number of prompts."""
    figures: dict[str, Any] = {}
    for name, settings in SIDES.items():
        with Worker("quality:Side", adapter, *settings) as side:
            if name == "float32":
                texts: Texts = side.run("texts", users=users, number=number)
                prompts = [prompt for prompt, _ in texts]
                exact = side.run("answers", prompts=prompts, together=1, contrastive=False)
                talks = side.run("answers", prompts=prompts, together=1, contrastive=True)
                along = list(zip(prompts, talks, strict=True))
                read = side.run("forced", texts=texts)
            figures[name] = figures_of(side, texts, exact, along, read)
            print(name, figures[name], flush=True)
    return figures, len(prompts)


def figures_of(
    side: Worker, texts: Texts, exact: Answers, along: Texts, read: Any
) -> dict[str, Any]:
    """Return the figures of one side, against the `exact` answers and what float32 `read`."""
    prompts = [prompt for prompt, _ in texts]
    alone = side.run("answers", prompts=prompts, together=1, contrastive=False)
    differences = [place for pair in zip(alone, exact, strict=True) if (place := differs(*pair))]
    forced = side.run("forced", texts=texts)
    own = [token for _, log_probs in forced for token in log_probs]
    theirs = [token for _, log_probs in read for token in log_probs]
    chosen = [token for tokens, _ in side.run("forced", texts=along) for token in tokens]
    expected = [token for _, answer in along for token in answer]
    same = [one == other for one, other in zip(chosen, expected, strict=True)]
    return {
        "equal": share_equal(alone, exact),
        "first_difference": statistics.mean(differences) if differences else None,
        "perplexity": math.exp(-statistics.mean(base for _, base in own)),
        "nats": distance(own, theirs),
        "contrastive_tokens": statistics.mean(same),
        **beside_others(side, prompts, alone),
        **side.run("about"),
    }


def beside_others(side: Worker, prompts: Answers, alone: Answers) -> dict[str, float]:
    """Return the shares of answers that stay the same beside others."""
    contrastive = [
        side.run("answers", prompts=prompts, together=together, contrastive=True)
        for together in (1, TOGETHER)
    ]
    together = side.run("answers", prompts=prompts, together=TOGETHER, contrastive=False)
    return {
        "beside_others": share_equal(together, alone),
        "beside_others_contrastive": share_equal(*contrastive),
    }


def differs(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Return the position, from 1, of the first token that differs; None where none does."""
    pairs = enumerate(itertools.zip_longest(one, other), start=1)
    return next((place for place, (a, b) in pairs if a != b), None)


def share_equal(some: Answers, others: Answers) -> float:
    """Return the share of answers that are the same."""
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
    print(f"\n{number} prompts{'':<13}" + "".join(f"{name:>12}" for name in SIDES))
    for title, key in COLUMNS.items():
        cells = [figures[name][key] for name in SIDES]
        texts = ["none" if cell is None else f"{cell:.4f}" for cell in cells]
        print(f"{title:<24}" + "".join(f"{text:>12}" for text in texts))
    print_report(state, users=options.users.name, num_prompts=number, figures=figures)


if __name__ == "__main__":
    main()
