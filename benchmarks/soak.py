"""Soak: thousands of mixed requests of many users at once, each held against itself decoded alone.

A tiny Llama in float32 makes steps cheap, so that what is tried is everything around them. Threads
and asyncio tasks submit at the same time, to an engine with fewer adapter slots than users have
requests in flight: greedy and sampled, several α, stop strings, repetition penalties,
log-probabilities, budgets from one token on, system prompts that many share, texts that repeat
themselves. Some close their stream at a random moment. While they run, users' adapters become
another version under another name.

Then every finished answer is decoded again, alone, by a fresh engine without speculation and
without prefix cache. Tokens, text, end and log-probabilities must agree. Where tokens differ, two
plain forwards of transformers and peft decide in float64: the first that differs is a tie where the
scores of the two, or some token and the τ line, are within 1e-4 of each other; else it is a
difference.

Also reported: rows, requests and adapters still held at the end, threads still running after
`close`, and how far resident memory grows after the first third of the requests. The last line is
one JSON object. The exit status is 1 after a difference, an error or a leak.
"""

import argparse
import asyncio
import faulthandler
import json
import math
import os
import queue
import random
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from langchain_cope.engine import (
    Adapter,
    AdapterSource,
    Base,
    Completion,
    Contrast,
    Engine,
    EngineOptions,
    Request,
    Sampling,
    load_base,
)
from langchain_cope.engine.decoding import sampling as engine_sampling

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from engine.reference import TIE, Reference, scores
from tiny import make_model

# A base that repeats itself, so that drafts come true.
BASE: dict[str, Any] = {"tie_word_embeddings": True, "initializer_range": 0.15}
NUM_THREADS, NUM_TASKS = 12, 24  # that submit, each one request at a time
NUM_PROMPTS = 400  # fewer than requests, so that whole prompts come again
PREFIX_CACHE = 2 << 20  # bytes: full, and evicting, long before the first third is over
STALL = 120  # seconds without a finished request
# MB that resident memory may grow after the first third: in any case, and for each 1000 requests.
FLAT = (16, 4)
CANCEL_SHARE = 0.2
LIFETIME = 0.2  # seconds that a request lives here, about
STOPS = ("e", "th", "a ", "\n", "he", "ing")


@dataclass(frozen=True)
class Task:
    """One request before its user's version is known, and whether it is cancelled."""

    user: int | None
    prompt: tuple[int, ...]
    alpha: float
    tau: float
    sampling: Sampling
    logprobs: bool
    cancel: float | None
    """Share of its life after which the stream is closed."""
    publishes: bool
    """Whether another version of this user's adapter appears while the request is on its way."""


@dataclass(frozen=True)
class Answer:
    """What came back, packed: thousands of them must not look like a leak."""

    task: Task
    version: int
    tokens: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: tuple[float, ...]


@dataclass
class Findings:
    """Counts and findings of a run."""

    counts: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def main() -> None:
    options = _options()
    # Transformers' warnings about names that peft still uses.
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.disable_progress_bar()
    state = {
        "benchmark": "soak",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        **vars(options),
    }
    print(json.dumps(state), flush=True)
    findings = Findings()
    with tempfile.TemporaryDirectory() as folder:
        base = load_base(make_model(Path(folder) / "base", **BASE), device="cpu", dtype="float32")
        adapters = _make_adapters(Path(folder), base.model, options.users)
        start = time.perf_counter()
        answers, memory = _soak(base, adapters, options, findings)
        seconds = time.perf_counter() - start
        cancelled = findings.counts["cancelled"]
        print(
            f"{len(answers)} answers and {cancelled} cancelled in {seconds:.0f} s; now each alone"
        )
        _compare_all(base, adapters, answers, findings)
    for line in [*findings.errors, *findings.leaks, *findings.differences][:20]:
        print(line)
    print(json.dumps({**state, "seconds": round(seconds, 1), **memory, **_summary(findings)}))
    sys.exit(bool(findings.errors or findings.leaks or findings.differences))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument(
        "--slots", type=int, default=10, help="adapters that the engine keeps ready"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _summary(findings: Findings) -> dict[str, Any]:
    names = ("answers", "cancelled", "published", "tokens", "alone", "ties", "drafted", "accepted")
    names += ("prefix_tokens_reused", "adapters_loaded", "adapters_evicted")
    counts: dict[str, Any] = {name: findings.counts[name] for name in names}
    return {
        **counts,
        "differences": len(findings.differences),
        "leaks": findings.leaks,
        "errors": len(findings.errors),
    }


# What is asked


def _make_tasks(options: argparse.Namespace, vocabulary: int) -> list[Task]:
    chance = random.Random(options.seed)
    prompts = _make_prompts(chance, vocabulary)
    return [_make_task(chance, prompts, options.users) for _ in range(options.requests)]


def _make_prompts(chance: random.Random, vocabulary: int) -> list[tuple[int, ...]]:
    """Return prompts, most of which start with one of a few system prompts; some repeat words."""

    def words(least: int, most: int) -> tuple[int, ...]:
        return tuple(chance.randrange(3, vocabulary) for _ in range(chance.randint(least, most)))

    systems = [words(20, 80) for _ in range(6)]
    prompts = []
    for _ in range(NUM_PROMPTS):
        question = words(1, 40)
        question *= chance.choice((1, 1, 2))
        prompts.append((chance.choice(systems) if chance.random() < 0.7 else ()) + question)
    return prompts


def _make_task(chance: random.Random, prompts: Sequence[tuple[int, ...]], num_users: int) -> Task:
    sampling = Sampling(
        max_tokens=chance.choice((1, 2, 8, 16, 32, 48)),
        temperature=chance.choice((0.0, 0.0, 0.7, 1.0)),
        repetition_penalty=chance.choice((1.0, 1.0, 1.0, 1.3)),
        stop=tuple(chance.sample(STOPS, 2)) if chance.random() < 0.2 else (),
        seed=chance.randrange(1000),
    )
    user = None
    if chance.random() >= 0.1:
        user = int(num_users * chance.random() ** 2)  # some ask more than others
    return Task(
        user=user,
        prompt=chance.choice(prompts),
        alpha=chance.choice((0.0, 0.1, 0.1, 0.5)),
        tau=chance.choice((0.01, 0.1, 0.1, 0.5)),
        sampling=sampling,
        logprobs=chance.random() < 0.2,
        cancel=chance.random() if chance.random() < CANCEL_SHARE else None,
        publishes=chance.random() < 0.1,
    )


def _make_adapters(folder: Path, model: nn.Module, num_users: int) -> list[tuple[Path, Path]]:
    """Write per user two peft folders, which alternate as versions."""
    adapters = []
    for user in range(num_users):
        rank = (2, 4, 8)[user % 3]
        one = write_adapter(folder / f"user{user}a", model, seed=2 * user, rank=rank)
        other = write_adapter(folder / f"user{user}b", model, seed=2 * user + 1, rank=rank)
        adapters.append((one, other))
    return adapters


def write_adapter(
    folder: Path, model: nn.Module, *, seed: int, rank: int = 4, scale: float = 0.15
) -> Path:
    """Write a peft LoRA folder with random A and B for every linear layer but the output head.

    Peft itself is not used.
    """
    generator = torch.Generator().manual_seed(seed)
    linear = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name != "lm_head"
    }
    tensors: dict[str, Tensor] = {}
    for name, layer in linear.items():
        bound = 1 / math.sqrt(layer.in_features)
        down = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        up = torch.empty(layer.out_features, rank).normal_(0, scale, generator=generator)
        tensors |= {
            f"base_model.model.{name}.lora_A.weight": down,
            f"base_model.model.{name}.lora_B.weight": up,
        }
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in linear}),
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8"
    )
    return folder


# The soak


def _soak(
    base: Base, adapters: list[tuple[Path, Path]], options: argparse.Namespace, findings: Findings
) -> tuple[list[Answer], dict[str, float]]:
    """Return the answers to every task that was not cancelled, and what memory did."""
    threads_before = set(threading.enumerate())
    engine = Engine(base, EngineOptions(adapter_slots=options.slots, prefix_cache=PREFIX_CACHE))
    users = _Users(engine, adapters, _make_tasks(options, base.vocabulary_size), findings)
    workers = [
        threading.Thread(target=users.ask_from_thread, daemon=True) for _ in range(NUM_THREADS)
    ]
    workers.append(
        threading.Thread(target=lambda: asyncio.run(users.ask_from_tasks()), daemon=True)
    )
    for worker in workers:
        worker.start()
    resident = _watch(workers, users, options.requests)
    _look_for_leaks(engine, findings)
    engine.close()
    left = [t.name for t in threading.enumerate() if t not in threads_before]
    if left:
        findings.leaks.append(f"{len(left)} threads after close: {', '.join(left)}")
    return users.answers, _growth(resident, options.requests, findings)


class _Users:
    """All users: sends task after task in the version published by then, and keeps the answers."""

    def __init__(
        self,
        engine: Engine,
        adapters: list[tuple[Path, Path]],
        tasks: Sequence[Task],
        findings: Findings,
    ) -> None:
        self.answers: list[Answer] = []
        self.num_done = 0
        self._engine, self._adapters, self._findings = engine, adapters, findings
        self._published = [0] * len(adapters)
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
        for task in tasks:
            self._tasks.put(task)

    def ask_from_thread(self) -> None:
        """Send task after task through `Engine.stream`.

        A cancelled one closes its stream after some pieces.
        """
        while task := self._next():
            version = self._version(task)
            pieces: list[str] = []
            try:
                stream = self._engine.stream(self._request(task, version))
                self._publish(task)
                num_pieces = None
                if task.cancel is not None:
                    num_pieces = int(task.cancel * task.sampling.max_tokens)
                while len(pieces) != num_pieces:
                    event = next(stream)
                    if isinstance(event, Completion):
                        self._keep(task, version, pieces, event)
                        break
                    pieces.append(event.text)
                else:
                    stream.close()
                    self._cancelled()
            except Exception as error:
                self._failed(task, error)

    async def ask_from_tasks(self) -> None:
        """Send tasks through `Engine.astream`, from many asyncio tasks at once.

        A cancelled one is stopped after some time.
        """
        await asyncio.gather(*(self._ask_from_task() for _ in range(NUM_TASKS)))

    async def _ask_from_task(self) -> None:
        while task := self._next():
            version = self._version(task)
            pieces: list[str] = []
            try:
                limit = None if task.cancel is None else task.cancel * LIFETIME
                async with asyncio.timeout(limit), aclosing(self._astream(task, version)) as events:
                    async for event in events:
                        if isinstance(event, Completion):
                            self._keep(task, version, pieces, event)
                        else:
                            pieces.append(event.text)
            except TimeoutError:
                self._cancelled()
            except Exception as error:
                self._failed(task, error)

    def _astream(self, task: Task, version: int) -> Any:
        events = self._engine.astream(self._request(task, version))
        self._publish(task)
        return events

    def _next(self) -> Task | None:
        try:
            return self._tasks.get_nowait()
        except queue.Empty:
            return None

    def _version(self, task: Task) -> int:
        return 0 if task.user is None else self._published[task.user]

    def _publish(self, task: Task) -> None:
        if task.publishes and task.user is not None:
            with self._lock:
                self._published[task.user] += 1
                self._findings.counts["published"] += 1

    def _request(self, task: Task, version: int) -> Request:
        source = None
        if task.user is not None:
            folder = self._adapters[task.user][version % 2]
            source = AdapterSource(f"user{task.user}@{version}", lambda: folder)
        return _request(task, source)

    def _keep(
        self, task: Task, version: int, pieces: Sequence[str], completion: Completion
    ) -> None:
        answer = _answer(task, version, completion)
        with self._lock:
            self.num_done += 1
            self.answers.append(answer)
            self._findings.counts.update(answers=1, tokens=len(answer.tokens))
            if "".join(pieces) != completion.text:
                self._findings.differences.append(
                    f"the pieces {pieces} are not the text {completion.text!r}"
                )

    def _cancelled(self) -> None:
        with self._lock:
            self.num_done += 1
            self._findings.counts["cancelled"] += 1

    def _failed(self, task: Task, error: Exception) -> None:
        with self._lock:
            self.num_done += 1
            self._findings.errors.append(f"{type(error).__name__}: {error} ({task.sampling})")


def _request(task: Task, adapter: Adapter | AdapterSource | None) -> Request:
    return Request(
        task.prompt, adapter, Contrast(task.alpha, task.tau), task.sampling, logprobs=task.logprobs
    )


def _answer(task: Task, version: int, completion: Completion) -> Answer:
    logprobs = tuple(
        value for token in completion.logprobs for value in (token.log_p_user, token.log_p_base)
    )
    return Answer(
        task, version, completion.token_ids, completion.text, completion.finish_reason, logprobs
    )


# Memory, rows and threads


def _watch(
    workers: Sequence[threading.Thread], users: _Users, num_requests: int
) -> list[tuple[int, float]]:
    """Return (requests done, resident MB) from time to time until all workers have ended.

    Exits with the threads' stacks after a standstill.
    """
    resident: list[tuple[int, float]] = []
    moved, done = time.monotonic(), 0
    while any(worker.is_alive() for worker in workers):
        time.sleep(0.05)
        if users.num_done != done:
            moved, done = time.monotonic(), users.num_done
        if done >= (len(resident) + 1) * max(1, num_requests // 60):
            resident.append((done, _resident_mb()))
        if time.monotonic() - moved > STALL:
            faulthandler.dump_traceback(all_threads=True)
            error = f"no request ended for {STALL} s, {done} had"
            print(json.dumps({"benchmark": "soak", "errors": error}))
            os._exit(1)
    return resident


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _growth(
    resident: list[tuple[int, float]], num_requests: int, findings: Findings
) -> dict[str, float]:
    """Return memory after the first third and at the end.

    It is a leak where it grew by more than `FLAT` allows.
    """
    later = [(done, megabytes) for done, megabytes in resident if done >= num_requests / 3]
    if len(later) < 2:
        return {}
    (first, warm), (last, end) = later[0], later[-1]
    thousands = (last - first) / 1000
    in_any_case, each_thousand = FLAT
    if end - warm > in_any_case + each_thousand * thousands:
        findings.leaks.append(
            f"resident memory grew from {warm:.0f} to {end:.0f} MB over {last - first} requests"
        )
    print(f"resident memory: {warm:.1f} MB after {first} requests, {end:.1f} MB after {last}")
    return {
        "resident_mb_after_a_third": round(warm, 1),
        "resident_mb_at_the_end": round(end, 1),
        "growth_mb_per_1000_requests": round((end - warm) / thousands, 2),
    }


def _look_for_leaks(engine: Engine, findings: Findings) -> None:
    """Note what the engine still holds after the last answer.

    Requests that were cancelled last get 10 s to leave.
    """
    held: dict[str, int] = {}
    for _ in range(100):
        now = engine.statistics()
        held = {name: getattr(now, name) for name in ("rows", "waiting", "adapters_in_use")}
        if not any(held.values()):
            break
        time.sleep(0.1)
    findings.leaks += [f"{number} {name} at the end" for name, number in held.items() if number]
    names = ("drafted", "accepted", "prefix_tokens_reused", "adapters_loaded", "adapters_evicted")
    findings.counts.update({name: getattr(now, name) for name in names})


# Each alone


def _compare_all(
    base: Base, adapters: list[tuple[Path, Path]], answers: Sequence[Answer], findings: Findings
) -> None:
    """Hold every answer against that of an engine which decodes nothing else."""
    alone = Engine(base, EngineOptions(speculation=False, prefix_cache=0))
    load = lru_cache(maxsize=None)(alone.load_adapter)
    decoded: dict[tuple[Any, ...], Answer] = {}
    judge = _Judge(base, adapters)
    for answer in answers:
        task, version = answer.task, answer.version % 2
        key = (task.user, version, task.prompt, task.alpha, task.tau, task.sampling, task.logprobs)
        if key not in decoded:
            adapter = None if task.user is None else load(adapters[task.user][version])
            [completion] = alone.generate([_request(task, adapter)])
            decoded[key] = _answer(task, version, completion)
            findings.counts["alone"] += 1
        _compare(answer, decoded[key], judge, findings)
    alone.close()


def _compare(answer: Answer, alone: Answer, judge: "_Judge", findings: Findings) -> None:
    what = f"user {answer.task.user}, α {answer.task.alpha}, {answer.task.sampling}"
    if answer.tokens != alone.tokens:
        finding = judge.first_difference(answer, alone)
        if finding is None:
            findings.counts["ties"] += 1
        else:
            findings.differences.append(f"{what}: {finding}")
    elif (answer.text, answer.finish_reason) != (alone.text, alone.finish_reason):
        findings.differences.append(
            f"{what}: {answer.text!r} {answer.finish_reason}, alone {alone.text!r}"
        )
    elif not _close(answer.logprobs, alone.logprobs):
        findings.differences.append(f"{what}: log-probabilities differ")


def _close(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    if len(ours) != len(theirs):
        return False
    return all(abs(a - b) <= 1e-3 for a, b in zip(ours, theirs, strict=True))


class _Judge:
    """Tells, in float64, whether the first token that differs was too close to call."""

    def __init__(self, base: Base, adapters: list[tuple[Path, Path]]) -> None:
        self._base, self._adapters = base, adapters

    def first_difference(self, answer: Answer, alone: Answer) -> str | None:
        """Return None for a tie, else what differs."""
        task = answer.task
        both = list(zip(answer.tokens, alone.tokens, strict=False))
        step = next((i for i, (ours, theirs) in enumerate(both) if ours != theirs), None)
        if step is None:
            return f"{len(answer.tokens)} tokens, alone {len(alone.tokens)}"
        adapter = None if task.user is None else self._adapters[task.user][answer.version % 2]
        ids = [*task.prompt, *answer.tokens[:step]]
        user, base = (
            rows[-1] for rows in Reference(Path(self._base.source), adapter).log_probs(ids)
        )
        ours, theirs = both[step]
        alpha = task.alpha if adapter else 0.0
        return judge_tie(user, base, alpha, task.tau, task.sampling, ids, step, ours, theirs)


def judge_tie(
    user: Tensor,
    base: Tensor,
    alpha: float,
    tau: float,
    sampling: Sampling,
    ids: Sequence[int],
    step: int,
    ours: int,
    theirs: int,
) -> str | None:
    """Return what differs, or None where it is open which of two tokens comes next.

    `user` and `base` are float64 log-probabilities `(V,)` after `ids`.
    """
    final = scores(user, base, alpha, tau)
    tolerance = TIE
    if sampling.repetition_penalty != 1:
        engine_sampling._penalize(final, ids, sampling.repetition_penalty)
    if sampling.temperature > 0:
        final = sampled_scores(final / sampling.temperature, sampling, step, ours, theirs)
        tolerance = TIE / min(1.0, sampling.temperature)
    gap = float(final.max() - torch.minimum(final[ours], final[theirs]))
    from_line = float((user - user.amax() - math.log(tau)).abs().amin()) if alpha else math.inf
    if gap <= tolerance or from_line <= TIE:
        return None
    return f"step {step}: {ours}, alone {theirs}, best {int(final.argmax())}, gap {gap:.2e}"


def sampled_scores(final: Tensor, sampling: Sampling, step: int, ours: int, theirs: int) -> Tensor:
    """Return what the greatest of chose between two tokens: their blocks, or within one block."""
    size = engine_sampling._BLOCK
    noise = engine_sampling._gumbel_noise([sampling], [step], 0, len(final))[0]
    blocks = list(final.split(size))
    if ours // size == theirs // size:
        number = ours // size
        scores = torch.full_like(final, -math.inf)
        within = blocks[number] + noise[: len(blocks[number])]
        scores[number * size : number * size + len(within)] = within
        return scores
    sums = torch.stack([block.logsumexp(0) for block in blocks]) + noise[size:]
    return sums.repeat_interleave(size)[: len(final)]


if __name__ == "__main__":
    main()
