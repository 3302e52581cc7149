"""One user by the rules of the paper's public scripts, beside the same user by this package.

    python benchmarks/authors_rules.py USERS.jsonl [--user ID] [--model smollm2] [--queries 12]

Both train on the same base, items and recipe, in float32. What differs are the rules, written here
anew as `Theirs` has them: two whole models in memory and two forwards a token; prompt and answer
tokenized apart; a candidate's reward as the mean over the tokens of prompt *and* answer, without
chat template; the logarithms of decoding taken of probabilities plus 1e-8. Printed is a table:

    SFT, DPO        mean loss of the first and of the last third of the steps
    NLL             of the queries under each adapter, read by this package
    rewards         on the same candidates: how often both rules choose the same negative
    answers         to the queries: greedy answers of the same adapter that are equal, and ROUGE-L

The last line is one JSON object. Their figures depend on the seed as ours do: `--seeds 2` trains
both twice, and shows how much of a difference is the seed.
"""

import argparse
import copy
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from langchain_cope import Recipe
from langchain_cope.engine import ADAPTER_ALONE, Contrast, Engine, Request, Sampling, load_base
from langchain_cope.evaluation.evaluate import over_all_tokens
from langchain_cope.evaluation.rouge import mean_rouge
from langchain_cope.history import read_users
from langchain_cope.history.items import Item
from langchain_cope.training.adapter import lora_config
from langchain_cope.training.encode import encode
from langchain_cope.training.pipeline import train_user
from langchain_cope.training.progress import Monitor, Progress
from langchain_cope.training.recipe import Schedule

TINY = 1e-8  # what their decoding adds to probabilities before logarithms
MAX_NEW_TOKENS = 40


class Losses(Monitor):
    """Keeps the loss of every step, by stage."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, list[float]] = {}

    def report(self, progress: Progress) -> None:
        """Keep it."""
        if progress.loss is not None:
            self.of.setdefault(progress.stage.value, []).append(progress.loss)


class Theirs:
    """One user by the scripts' rules: a base in memory, and a second one that learns the user."""

    def __init__(self, engine: Engine, recipe: Recipe, seed: int) -> None:
        self.base = copy.deepcopy(engine.base.skeleton()).eval()
        self.recipe = recipe
        self._seed = seed
        self._tokenizer = engine.base.tokenizer
        self._template = engine.base.prompt_ids  # a prompt in the chat template
        self._end = max(engine.base.eos_ids)
        whole = copy.deepcopy(engine.base.skeleton())
        config = lora_config(whole, recipe.sft)  # which layers: a setting, and no rule
        torch.manual_seed(seed)
        self.user: PeftModel = get_peft_model(whole, LoraConfig(**config.to_dict()))
        self.losses: dict[str, list[float]] = {}

    def ids(self, item: Item, answer: str) -> tuple[list[int], list[int]]:
        """Return prompt and answer as token ids, tokenized apart, the turn's end included."""
        prompt = self._template(item.messages)
        return prompt, [*self._tokenizer(answer, add_special_tokens=False).input_ids, self._end]

    def train_sft(self, items: Sequence[Item]) -> None:
        """Train on the items: mean over the answer tokens of a batch."""
        pairs = [self.ids(item, item.completion) for item in items]

        def loss(batch: Sequence[int]) -> Tensor:
            log_probs = [_log_probs(self.user, *pairs[index]) for index in batch]
            return -torch.cat(log_probs).mean()

        self.losses["sft"] = self._train(loss, len(pairs), self.recipe.sft, dropout=True)

    def train_dpo(self, items: Sequence[Item], negatives: Sequence[str | None]) -> None:
        """Prefer the items to their negatives; the reference is the base."""
        pairs = [
            (self.ids(item, item.completion), self.ids(item, negative))
            for item, negative in zip(items, negatives, strict=True)
            if negative is not None
        ]

        def margin(model: PreTrainedModel | PeftModel, index: int) -> Tensor:
            chosen, rejected = pairs[index]
            return _log_probs(model, *chosen).sum() - _log_probs(model, *rejected).sum()

        with torch.no_grad():
            reference = [margin(self.base, index) for index in range(len(pairs))]

        def loss(batch: Sequence[int]) -> Tensor:
            gains = torch.stack([margin(self.user, index) - reference[index] for index in batch])
            return -logsigmoid(self.recipe.dpo.beta * gains).mean()

        self.losses["dpo"] = self._train(loss, len(pairs), self.recipe.dpo, dropout=False)

    def _train(self, loss: Any, num: int, settings: Schedule, *, dropout: bool) -> list[float]:
        """Take AdamW's steps over `num` examples in random order, the rate linear."""
        parameters = [weight for weight in self.user.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, settings.learning_rate, weight_decay=settings.weight_decay
        )
        shuffled = random.Random(self._seed)
        orders = [shuffled.sample(range(num), num) for _ in range(round(settings.epochs))]
        size = settings.batch_size
        batches = [order[at : at + size] for order in orders for at in range(0, num, size)]
        warmup = round(settings.warmup * len(batches))
        schedule = get_linear_schedule_with_warmup(optimizer, warmup, len(batches))
        self.user.train(dropout)
        losses = []
        for batch in batches:
            value = loss(batch)
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(value.item())
        self.user.eval()
        return losses

    def reward(self, text: str, candidate: str) -> float:
        """Return log p_user − log p_base, the mean over prompt and answer, no chat template."""
        ids = self._tokenizer(text).input_ids + self._tokenizer(candidate).input_ids
        with torch.no_grad():
            user, base = (_log_probs(model, ids[:1], ids[1:]) for model in (self.user, self.base))
        return float(user.mean() - base.mean())

    def answer(self, item: Item, contrast: Contrast, user: PeftModel | None = None) -> str:
        """Return the greedy contrastive answer: two models, two forwards a token."""
        models, states = (user or self.user, self.base), [None, None]
        ids = torch.tensor([self._template(item.messages)])
        given: list[int] = []
        while len(given) < MAX_NEW_TOKENS:
            probabilities = []
            for number, model in enumerate(models):
                with torch.no_grad():
                    out = model(input_ids=ids, past_key_values=states[number], use_cache=True)
                states[number] = out.past_key_values
                probabilities.append(out.logits[0, -1].float().softmax(-1))
            mine, others = probabilities
            kept = mine * (mine >= contrast.tau * mine.max())
            kept = kept / (kept.sum() + TINY)
            score = torch.log(kept + TINY) - contrast.alpha * torch.log(others + TINY)
            given.append(int(score.argmax()))
            if given[-1] == self._end:
                break
            ids = torch.tensor([given[-1:]])
        return str(self._tokenizer.decode(given, skip_special_tokens=True)).strip()


def _log_probs(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Return the log-probability of each token of `answer`, shape (tokens,)."""
    ids = torch.tensor([[*prompt, *answer]])
    logits = model(input_ids=ids[:, :-1]).logits[0, len(prompt) - 1 :]
    return -cross_entropy(logits.float(), ids[0, len(prompt) :], reduction="none")


def candidates_of(engine: Engine, items: Sequence[Item], recipe: Recipe) -> list[list[str]]:
    """Return what the base writes to each prompt, sampled, as many as the recipe says."""
    settings, number = recipe.negatives, recipe.negatives.candidates
    requests = [
        Request(
            engine.base.prompt_ids(item.messages),
            sampling=Sampling(
                max_tokens=MAX_NEW_TOKENS,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=index * number + sample,
            ),
            offline=True,
        )
        for index, item in enumerate(items)
        for sample in range(number)
    ]
    texts = [completion.text.strip() for completion in engine.generate(requests)]
    return [texts[first : first + number] for first in range(0, len(texts), number)]


def our_rewards(
    engine: Engine, sft: Path, items: Sequence[Item], candidates: Sequence[Sequence[str]]
) -> list[list[float]]:
    """Return the mean over answer tokens, in the chat template, of log p_user − log p_base."""
    base, adapter = engine.base, engine.load_adapter(sft)
    pairs = [
        encode(base, item.messages, text)
        for item, texts in zip(items, candidates, strict=True)
        for text in texts
    ]
    scores = zip(engine.score(pairs, adapter), engine.score(pairs, None), strict=True)
    flat = [float((user - base).mean()) for user, base in scores]
    sizes = [len(texts) for texts in candidates]
    return [flat[sum(sizes[:index]) :][: sizes[index]] for index in range(len(sizes))]


def nll(engine: Engine, queries: Sequence[Item], folder: Path | None) -> float:
    """Return nats a token of the queries' answers."""
    pairs = [encode(engine.base, query.messages, query.completion) for query in queries]
    adapter = None if folder is None else engine.load_adapter(folder)
    return over_all_tokens([scores.tolist() for scores in engine.score(pairs, adapter)])


def our_answers(
    engine: Engine, queries: Sequence[Item], folder: Path, contrast: Contrast
) -> list[str]:
    """Return the engine's greedy contrastive answers."""
    adapter = engine.load_adapter(folder)
    sampling = Sampling(max_tokens=MAX_NEW_TOKENS)
    requests = [
        Request(
            engine.base.prompt_ids(query.messages),
            adapter=adapter,
            contrast=contrast,
            sampling=sampling,
            offline=True,
        )
        for query in queries
    ]
    return [completion.text.strip() for completion in engine.generate(requests)]


def compare(engine: Engine, items: list[Item], queries: list[Item], seed: int) -> dict[str, Any]:
    """Return the figures of both, of one seed."""
    base_recipe = Recipe.for_model(engine.base, items, seed=seed)
    contrast, found = Contrast(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as name:
        ours = Path(name) / "ours"
        monitor = Losses()
        recipe = train_user(engine, items, base_recipe, ours, monitor).recipe
        theirs = Theirs(engine, recipe, seed)
        theirs.train_sft(items)
        theirs.user.save_pretrained(str(Path(name) / "sft"))
        candidates = candidates_of(engine, items, recipe)
        found["rewards"], chosen = rewards(engine, theirs, ours / "sft", items, candidates)
        theirs.train_dpo(items, chosen)
        theirs.user.save_pretrained(str(Path(name) / "dpo"))
        found["losses"] = {"ours": monitor.of, "theirs": theirs.losses}
        found["nll"] = {
            "base": nll(engine, queries, None),
            "ours": {s: nll(engine, queries, ours / s) for s in ("sft", "dpo")},
            "theirs": {s: nll(engine, queries, Path(name) / s) for s in ("sft", "dpo")},
        }
        engines = our_answers(engine, queries, Path(name) / "dpo", contrast)
        found["answers"] = answers(engine, theirs, queries, ours / "dpo", engines, contrast)
    return found


def rewards(
    engine: Engine,
    theirs: Theirs,
    sft: Path,
    items: Sequence[Item],
    candidates: Sequence[Sequence[str]],
) -> tuple[dict[str, float], list[str | None]]:
    """Return how the two scorings of the same candidates agree, and what theirs chooses."""
    ours = our_rewards(engine, sft, items, candidates)
    chosen: list[str | None] = []
    same = []
    for item, texts, mine in zip(items, candidates, ours, strict=True):
        text = str(item.messages[-1]["content"])
        other = [theirs.reward(text, candidate) for candidate in texts]
        lowest = other.index(min(other))
        chosen.append(texts[lowest] or None)
        same.append(lowest == mine.index(min(mine)))
    return {"same negative": fmean(same), "by chance": 1 / len(candidates[0])}, chosen


def answers(
    engine: Engine,
    theirs: Theirs,
    queries: Sequence[Item],
    ours: Path,
    engines: Sequence[str],
    contrast: Contrast,
) -> dict[str, float]:
    """Return the share of equal answers of the same adapter, ROUGE-L, and tokens a second."""
    started = time.perf_counter()
    two_models = [theirs.answer(query, contrast) for query in queries]
    seconds = time.perf_counter() - started
    references = [query.completion for query in queries]
    of_ours = our_answers(engine, queries, ours, contrast)
    adapter_alone = our_answers(engine, queries, ours, ADAPTER_ALONE)
    return {
        "equal, same adapter": fmean(a == b for a, b in zip(two_models, engines, strict=True)),
        "ROUGE-L theirs": mean_rouge(references, two_models)["rougeL"],
        "ROUGE-L ours": mean_rouge(references, of_ours)["rougeL"],
        "ROUGE-L ours, no contrast": mean_rouge(references, adapter_alone)["rougeL"],
        "seconds an answer, two models": seconds / len(queries),
    }


def _thirds(losses: Sequence[float]) -> str:
    third = max(1, len(losses) // 3)
    return f"{fmean(losses[:third]):.4f} → {fmean(losses[-third:]):.4f}"


def _show(runs: Sequence[dict[str, Any]]) -> None:
    for seed, run in enumerate(runs):
        print(f"\nseed {seed}          ours                theirs")
        for stage in ("sft", "dpo"):
            loss = [_thirds(run["losses"][who][stage]) for who in ("ours", "theirs")]
            print(f"{stage} loss        {loss[0]:<20}{loss[1]}")
        for stage in ("sft", "dpo"):
            print(
                f"{stage} NLL         "
                + "".join(f"{run['nll'][who][stage]:<20.4f}" for who in ("ours", "theirs"))
            )
        print(f"base NLL        {run['nll']['base']:.4f}")
        for name, value in {**run["rewards"], **run["answers"]}.items():
            print(f"{name}: {value:.3f}")


def main() -> None:
    """Compare the two on one user."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("users", type=Path)
    parser.add_argument("--user", help="the user's id; else the first")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--queries", type=int, default=12)
    parser.add_argument("--items", type=int, default=60, help="the newest so many are trained on")
    parser.add_argument("--seeds", type=int, default=1)
    chosen = parser.parse_args()
    users = read_users(chosen.users)
    user = next((u for u in users if chosen.user in (None, u.user_id)), None)
    if user is None:
        parser.error(f"{chosen.users} has no user {chosen.user!r}")
    engine = Engine.of(load_base(chosen.model, device="cpu", dtype="float32"))
    items, queries = user.items[-chosen.items :], user.queries[: chosen.queries]
    runs = [compare(engine, items, queries, seed) for seed in range(chosen.seeds)]
    _show(runs)
    facts = {"model": chosen.model, "user": user.user_id, "items": len(items), "runs": runs}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
