"""Speculation on and off in our engine: where answers quote their prompt, and where they do not.

First a small Llama is trained to quote: 2 layers of width 128 and a vocabulary of a few hundred
words, on texts of random words that never come again, so that it has to look the answer up in the
prompt. An instruction after the text says what to answer:

    copy       the text again (rewriting)
    replace    the text with one word replaced by another (editing)
    until      the text up to the sentence with a certain mark (summarising)

It is held to 95 % of the tokens right when it decodes unseen texts. For a figure at full cost the
same weights are also laid into a Llama of 134 million parameters (30 layers, width 576, vocabulary
49152) in bfloat16: its first two layers quote, the others are computed but add nothing, so it
answers the same while a step costs what a step of that size costs.

Two processes hold our engine, one with speculation and one without, and alternate: in each round
both answer the same requests, which no round before had, with a random adapter (α 0.1, two rows).
Seconds are those of whole answers, prompts included; steps are forwards of the decoding. A ratio is
without / with, the median of the rounds', above 1 means that speculation saves.

    speculation_steps         steps, small model, quoting
    speculation_clock         seconds, small model, quoting; a small model's step is mostly fixed
                              cost, which flatters
    speculation_clock_134m    seconds, 134M parameters in bfloat16, quoting
    speculation_worst         seconds, the least of the sets which do not quote: real headlines or
                              abstracts asked of the starter, greedy and sampled, one user and 8
                              together; and samples of a random 134M Llama in bfloat16
    speculation_differences   float32: answers whose first token that differs is no tie (1e-4) by
                              plain float64 forwards; must be 0

The last line is one JSON object. The exit status is 1 where answers differ.
"""

import argparse
import itertools
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from soak import Reference, judge_tie, write_adapter
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from worker import SEED, Worker, machine

from langchain_cope.engine import (
    STARTER,
    Contrast,
    Engine,
    EngineOptions,
    Request,
    Sampling,
    load_base,
)

CONTRAST = Contrast(0.1, 0.1)
EXAMPLES = Path(__file__).parents[1] / "examples" / "data" / "user.jsonl"

WORDS, MARKS = range(200), range(200, 208)
COPY, REPLACE, UNTIL, ANSWER, END, PADDING = range(208, 214)
SMALL_VOCABULARY, LARGE_VOCABULARY = 214, 49152
KINDS = ("copy", "replace", "until")
ACCURACY = 0.95

Quote = tuple[list[int], list[int]]
"""A prompt and its answer."""


@dataclass(frozen=True)
class Case:
    """A set of requests: what is asked of which model, how many at a time."""

    name: str
    base: Path
    adapter: Path
    dtype: str
    rounds: list[list[list[int]]]
    """Per round the prompts."""
    num_tokens: int
    quotes: bool
    temperature: float = 0.0
    together: int = 1

    @property
    def exact(self) -> bool:
        """Whether answers must not depend on speculation."""
        return self.dtype == "float32"


@dataclass
class Run:
    """What one side did in one round."""

    seconds: float
    steps: int
    answers: list[tuple[int, ...]]


@dataclass
class Comparison:
    """Per round: without and with speculation."""

    case: Case
    off: list[Run] = field(default_factory=list)
    on: list[Run] = field(default_factory=list)

    def ratios(self, figure: str) -> list[float]:
        """Return without / with, round by round, of `seconds` or `steps`."""
        return [
            getattr(off, figure) / getattr(on, figure)
            for off, on in zip(self.off, self.on, strict=True)
        ]

    def answers(self) -> Iterator[tuple[list[int], tuple[int, ...], tuple[int, ...], int]]:
        """Yield (prompt, answer without, answer with, seed) of all rounds after the warm-up."""
        for prompts, off, on in zip(self.case.rounds[1:], self.off, self.on, strict=True):
            answers = zip(prompts, off.answers, on.answers, strict=True)
            for seed, (prompt, plain, fast) in enumerate(answers):
                yield prompt, plain, fast, seed


def main() -> None:
    options = _options()
    state = machine("speculation", options)
    state["model"] = (
        "trained to quote: 2 layers, width 128; the same laid into 134M parameters; starter; "
        "random Llama 134M"
    )
    print(json.dumps(state), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        accuracy, seconds = _write_models(Path(folder), options.train_steps)
        compared = [_measure(case, options.device) for case in _cases(Path(folder), options)]
        exact = [each for each in compared if each.case.exact]
        differences = [line for each in exact for line in _differences(each)]
    for line in differences[:10]:
        print(line)
    figures = {each.case.name: _figures(each) for each in compared}
    report = {
        **state,
        "accuracy": accuracy,
        "training_seconds": seconds,
        "figures": figures,
        "ratios": {**_ratios(compared), "speculation_differences": len(differences)},
    }
    print(json.dumps(report))
    sys.exit(bool(differences))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds in which both answer the same requests once"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        default=EXAMPLES,
        help="users' texts as JSON lines, asked of the starter",
    )
    parser.add_argument("--train-steps", type=int, default=2000)
    return parser.parse_args()


# A model that quotes


def draw_quote(chance: random.Random, kind: str, sentences: int, words: int) -> Quote:
    """Draw a text of so many sentences of so many words, an instruction, and the answer.

    No word comes twice, and each sentence has a mark of its own.
    """
    drawn, marks = chance.sample(WORDS, sentences * words + 1), chance.sample(MARKS, sentences)
    new, drawn = drawn[0], drawn[1:]
    text: list[int] = []
    for number, mark in enumerate(marks):
        text += [*drawn[number * words : (number + 1) * words], mark]
    if kind == "copy":
        return [*text, COPY, ANSWER], [*text, END]
    if kind == "replace":
        old = chance.choice(drawn)
        replaced = [new if word == old else word for word in text]
        return [*text, REPLACE, old, new, ANSWER], [*replaced, END]
    last = chance.choice(marks[sentences // 2 :])
    return [*text, UNTIL, last, ANSWER], [*text[: text.index(last) + 1], END]


def train(steps: int) -> LlamaForCausalLM:
    """Train a small Llama to quote, on the answers only: short texts first, then longer ones."""
    # Forward and backward run on two threads; their OpenMP pools would keep each other waiting.
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    chance = random.Random(SEED)
    model = LlamaForCausalLM(_small_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))
    )
    for step in range(steps):
        if step < 0.4 * steps:
            sentences, words = chance.randint(2, 3), (2, 6)
        else:
            sentences, words = chance.randint(2, 6), (3, 8)
        quotes = [
            draw_quote(chance, chance.choice(KINDS), sentences, chance.randint(*words))
            for _ in range(64 if sentences < 4 else 32)
        ]
        loss = _loss(model, quotes)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            print(f"training step {step + 1}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def _small_config() -> LlamaConfig:
    """Return a shape with heads of the large shape's size, so that they can be laid into it."""
    return LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=SMALL_VOCABULARY,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PADDING,
    )


def _loss(model: nn.Module, quotes: Sequence[Quote]) -> Tensor:
    longest = max(len(prompt) + len(answer) for prompt, answer in quotes)
    ids = torch.full((len(quotes), longest), PADDING)
    labels = torch.full((len(quotes), longest), -100)
    for row, (prompt, answer) in enumerate(quotes):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    logits = model(input_ids=ids).logits[:, :-1]
    return nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
    )


@torch.inference_mode()
def accuracy(model: Any, num_texts: int = 20) -> dict[str, float]:
    """Return per kind the share of tokens that greedy decoding of unseen texts gets right."""
    chance = random.Random(f"{SEED} unseen")
    shares = {}
    for kind in KINDS:
        right = total = 0
        for _ in range(num_texts):
            prompt, answer = draw_quote(chance, kind, 6, 8)
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            decoded = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=len(answer)
            )
            pairs = zip(decoded[0, len(prompt) :].tolist(), answer, strict=False)
            right += len([1 for ours, expected in pairs if ours == expected])
            total += len(answer)
        shares[kind] = round(right / total, 3)
    return shares


@torch.no_grad()
def enlarge(small: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return a Llama of 134 million parameters that computes what `small` does.

    Its first layers compute that, the others add nothing.
    """
    have = small.config
    large = _random_llama(eos_token_id=END, rms_norm_eps=have.rms_norm_eps * have.hidden_size / 576)
    width, inner, size = have.hidden_size, have.intermediate_size, large.config.head_dim
    group = large.config.num_attention_heads // large.config.num_key_value_heads
    # A root mean square over 576 numbers of which only the first are not 0.
    shrink = math.sqrt(width / 576)
    large.model.embed_tokens.weight.zero_()[:SMALL_VOCABULARY, :width] = (
        small.model.embed_tokens.weight
    )
    large.model.norm.weight[:width] = shrink * small.model.norm.weight
    for layer in large.model.layers:  # what they write to the residual stream
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    for ours, theirs in zip(large.model.layers, small.model.layers, strict=False):
        ours.input_layernorm.weight[:width] = shrink * theirs.input_layernorm.weight
        ours.post_attention_layernorm.weight[:width] = (
            shrink * theirs.post_attention_layernorm.weight
        )
        ours.mlp.gate_proj.weight[:inner, :width] = theirs.mlp.gate_proj.weight
        ours.mlp.up_proj.weight[:inner, :width] = theirs.mlp.up_proj.weight
        ours.mlp.down_proj.weight[:width, :inner] = theirs.mlp.down_proj.weight
        attention, from_attention = ours.self_attn, theirs.self_attn
        attention.k_proj.weight[:width, :width] = from_attention.k_proj.weight
        attention.v_proj.weight[:width, :width] = from_attention.v_proj.weight
        # The first of each group of heads that share keys and values.
        for head in range(have.num_attention_heads):
            here = slice(head * size, (head + 1) * size)
            there = slice(head * group * size, (head * group + 1) * size)
            attention.q_proj.weight[there, :width] = from_attention.q_proj.weight[here]
            attention.o_proj.weight[:width, there] = from_attention.o_proj.weight[:, here]
    return large


def _random_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=18,
        num_key_value_heads=6,
        vocab_size=LARGE_VOCABULARY,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        **{"eos_token_id": None, **changes},
    )
    return LlamaForCausalLM(config)


def _write_models(folder: Path, steps: int) -> tuple[dict[str, float], float]:
    """Train; write every model but the starter, and an adapter for each.

    Returns accuracy and seconds of training.
    """
    start = time.perf_counter()
    small = train(steps)
    seconds = round(time.perf_counter() - start, 1)
    right = accuracy(small)
    print(
        f"trained in {seconds:.0f} s; tokens right when decoding unseen texts: {right}", flush=True
    )
    if min(right.values()) < ACCURACY:
        sys.exit(f"the model did not learn to quote ({right}): give it more --train-steps")
    for name, model in (("small", small), ("large", enlarge(small)), ("random", _random_llama())):
        _write(model, folder / name)
        write_adapter(folder / f"{name}_adapter", model, seed=SEED, rank=8, scale=0.001)
    starter = LlamaForCausalLM.from_pretrained(STARTER, dtype=torch.float32)
    write_adapter(folder / "starter_adapter", starter, seed=SEED, rank=8, scale=0.02)
    return right, seconds


def _write(model: LlamaForCausalLM, folder: Path) -> None:
    """Save a model with a tokenizer to which each token is a word."""
    small = model.config.vocab_size == SMALL_VOCABULARY
    model.to(torch.float32 if small else torch.bfloat16).save_pretrained(folder)
    words = {f"word{i}": i for i in range(model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    context = model.config.max_position_embeddings
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=context, chat_template="{{ messages }}"
    )
    fast.save_pretrained(folder)


# The requests


def _cases(folder: Path, options: argparse.Namespace) -> list[Case]:
    rounds = options.rounds + 1  # the first one warms up
    small = (folder / "small", folder / "small_adapter", "float32")
    large = (folder / "large", folder / "large_adapter", "bfloat16")
    noise = (folder / "random", folder / "random_adapter", "bfloat16")
    starter = (STARTER, folder / "starter_adapter", "float32")
    quoting = [Case(kind, *small, _quotes(rounds, 8, [kind]), 80, quotes=True) for kind in KINDS]
    quoting.append(
        Case("8 users, all kinds", *small, _quotes(rounds, 16, KINDS), 80, quotes=True, together=8)
    )
    quoting.append(Case("134M, all kinds", *large, _quotes(rounds, 3, KINDS), 80, quotes=True))
    texts = _starter_prompts(options.prompts, rounds)
    random_words = [[_random_prompt(f"{number} {i}") for i in range(8)] for number in range(rounds)]
    first_two = [prompts[:2] for prompts in random_words]
    others = [
        Case("starter", *starter, texts, 32, quotes=False),
        Case("starter, 8 users", *starter, texts, 32, quotes=False, together=8),
        Case("starter, sampled", *starter, texts, 32, quotes=False, temperature=1.0),
        Case("134M, sampled", *noise, first_two, 32, quotes=False, temperature=1.0),
        Case(
            "134M, sampled, 8 users",
            *noise,
            random_words,
            32,
            quotes=False,
            temperature=1.0,
            together=8,
        ),
    ]
    return quoting + others


def _quotes(rounds: int, each: int, kinds: Sequence[str]) -> list[list[list[int]]]:
    """Return prompts of texts of 54 tokens, other ones in each round."""
    chance = random.Random(f"{SEED} {kinds}")
    cycle = itertools.cycle(kinds)
    return [[draw_quote(chance, next(cycle), 6, 8)[0] for _ in range(each)] for _ in range(rounds)]


def _starter_prompts(path: Path, rounds: int, each: int = 8) -> list[list[list[int]]]:
    """Return token ids of that many real prompts a round, of as many users as the file has.

    None comes twice while there are enough.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    users = [json.loads(line) for line in lines if line.strip()]
    columns = itertools.zip_longest(
        *([item["prompt"] for item in user["history"]] for user in users)
    )
    texts = itertools.cycle([text for column in columns for text in column if text is not None])
    base = load_base(STARTER, device="cpu", dtype="float32")
    ids = (base.prompt_ids([{"role": "user", "content": text}]) for text in texts)
    fitting = (prompt for prompt in ids if len(prompt) < base.context - 64)
    return [list(itertools.islice(fitting, each)) for _ in range(rounds)]


def _random_prompt(seed: str) -> list[int]:
    return random.Random(f"{SEED} {seed}").choices(range(10, LARGE_VOCABULARY), k=64)


# The two sides


class Side:
    """Our engine over one base, with speculation or without."""

    def __init__(
        self, base: Path, adapter: Path, dtype: str, device: str, speculation: bool
    ) -> None:
        loaded = load_base(base, device=device, dtype=dtype)
        self._engine = Engine.of(loaded, EngineOptions(speculation=speculation))
        self._adapter = self._engine.load_adapter(adapter)

    def answer(
        self, prompts: list[list[int]], num_tokens: int, temperature: float, together: int
    ) -> Run:
        """Answer `prompts`, so many at a time."""
        requests = [
            Request(prompt, self._adapter, CONTRAST, Sampling(num_tokens, temperature, seed=seed))
            for seed, prompt in enumerate(prompts)
        ]
        steps_before = self._engine.statistics().steps
        start = time.perf_counter()
        groups = [requests[i : i + together] for i in range(0, len(requests), together)]
        completions = [
            completion for group in groups for completion in self._engine.generate(group)
        ]
        seconds = time.perf_counter() - start
        steps = self._engine.statistics().steps - steps_before
        return Run(seconds, steps, [completion.token_ids for completion in completions])


def _measure(case: Case, device: str) -> Comparison:
    """Run both sides, which begin a round alternately; the first round is not counted."""
    comparison = Comparison(case)
    with ExitStack() as stack:

        def side(speculation: bool) -> Worker:
            files = (case.base, case.adapter, case.dtype)
            return stack.enter_context(Worker("__main__:Side", *files, device, speculation))

        sides = [(comparison.off, side(False)), (comparison.on, side(True))]
        for number, prompts in enumerate(case.rounds):
            for runs, worker in reversed(sides) if number % 2 else sides:
                run = worker.run(
                    "answer",
                    prompts=prompts,
                    num_tokens=case.num_tokens,
                    temperature=case.temperature,
                    together=case.together,
                )
                if number:
                    runs.append(run)
    _print_case(comparison)
    return comparison


# The figures


def _print_case(comparison: Comparison) -> None:
    case = comparison.case
    seconds, steps = comparison.ratios("seconds"), comparison.ratios("steps")
    print(
        f"{case.name:<24}{'quotes' if case.quotes else '':<8}"
        f"steps {statistics.median(steps):.2f}   "
        f"seconds {statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
        flush=True,
    )


def _figures(comparison: Comparison) -> dict[str, Any]:
    answers = list(comparison.answers())
    num_differing = len([1 for _, plain, fast, _ in answers if plain != fast])
    return {
        "quotes": comparison.case.quotes,
        "steps_off": sum(run.steps for run in comparison.off),
        "steps_on": sum(run.steps for run in comparison.on),
        "seconds_off": round(statistics.median(run.seconds for run in comparison.off), 3),
        "seconds_on": round(statistics.median(run.seconds for run in comparison.on), 3),
        "tokens": sum(len(plain) for _, plain, _, _ in answers),
        "answers": len(answers),
        "answers_that_differ": num_differing,
        "seconds_ratio": round(statistics.median(comparison.ratios("seconds")), 3),
    }


def _ratios(compared: Sequence[Comparison]) -> dict[str, float]:
    quoting = [each for each in compared if each.case.quotes]
    small = [each for each in quoting if each.case.exact and each.case.together == 1]
    large = [each for each in quoting if not each.case.exact]
    others = [each for each in compared if not each.case.quotes]

    def median(cases: Sequence[Comparison], figure: str) -> float:
        return round(statistics.median(ratio for each in cases for ratio in each.ratios(figure)), 3)

    return {
        "speculation_steps": median(small, "steps"),
        "speculation_clock": median(small, "seconds"),
        "speculation_clock_134m": median(large, "seconds"),
        "speculation_worst": min(median([each], "seconds") for each in others),
    }


def _differences(comparison: Comparison) -> list[str]:
    """Return what differs between the two sides and is no tie."""
    case = comparison.case
    alpha, tau = CONTRAST.alpha, CONTRAST.tau
    differing = [each for each in comparison.answers() if each[1] != each[2]]
    if not differing:
        return []
    reference = Reference(case.base, case.adapter)
    lines = []
    for prompt, plain, fast, seed in differing:
        step = next((i for i, (a, b) in enumerate(zip(plain, fast, strict=False)) if a != b), None)
        if step is None:
            lines.append(f"{case.name}: {len(plain)} tokens without speculation, {len(fast)} with")
            continue
        ids = [*prompt, *plain[:step]]
        user, base = (rows[-1] for rows in reference.log_probs(ids))
        sampling = Sampling(case.num_tokens, case.temperature, seed=seed)
        finding = judge_tie(user, base, alpha, tau, sampling, ids, step, fast[step], plain[step])
        if finding is not None:
            lines.append(f"{case.name}: {finding}")
    return lines


if __name__ == "__main__":
    main()
