"""Latency under load: waits for the first token and between tokens, in our engine and in a queue.

Requests arrive at random moments (Poisson), from 16 users with an adapter each, with prompts of 32
to 256 tokens and answers of 16 to 64. Two servers get the same requests at the same moments, one
server after the other, each in a process of its own:

    ours     our engine: a request joins at the next step after its arrival; per user two rows in
             one forward, contrasted; read with `astream`
    queue    first come, first served: transformers' `generate` of the base with that user's adapter
             switched on, one request at a time, without contrast; tokens are taken as they come

The model is the random Llama of 134 million parameters of `peers`, in bfloat16, decoded greedily;
every token is a piece of text. Such a model repeats itself, so our engine's speculation is off:
here it would gain what no real text gives it.

    load A   50 % and 80 % of the queue's capacity: one over its mean service time
    load B   50 % and 80 % of ours: requests/s with all of them there from the start. The queue is
             overloaded then. It stops when twice the time is over in which requests arrive; for
             those that it has not served by then, the wait so far counts

Every round measures both capacities afresh. Per load and server: p50 and p99, over the requests of
all rounds, of the time to first token (from arrival) and of the time between tokens, in
milliseconds. Ratios are ours / queue: **smaller is better**, below 1 we are faster. `…_50` and
`…_80` are load A, `…_50_of_ours` and `…_80_of_ours` load B. The last line is one JSON object.
"""

import argparse
import asyncio
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import peers
import torch
from torch import Tensor
from transformers.generation import BaseStreamer
from worker import SEED, VOCABULARY, Setting, Worker, machine, prepared, print_report

from langchain_cope.engine import (
    Contrast,
    Engine,
    EngineOptions,
    Piece,
    Request,
    Sampling,
    load_base,
)

NUM_USERS = 16
PROMPT_TOKENS = 32, 256
ANSWER_TOKENS = 16, 64
CAPACITY_REQUESTS = {"ours": 48, "queue": 10}
LOADS_A, LOADS_B = ("50", "80"), ("50_of_ours", "80_of_ours")  # percent of a capacity
FIGURES = ("ttft_p50", "ttft_p99", "between_p50", "between_p99")

Figures = dict[str, dict[str, dict[str, float]]]
"""By server, load and name of a figure."""


@dataclass(frozen=True)
class Arrival:
    """One request and when it comes, in seconds from the start."""

    at: float
    user: int
    prompt: tuple[int, ...]
    num_tokens: int


@dataclass
class Waits:
    """Seconds that users waited, and how many were not answered."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    unserved: int = 0

    def add(self, arrived: float, moments: Sequence[float]) -> None:
        """Add the waits of a request that arrived then and of which tokens came at `moments`."""
        self.first.append(moments[0] - arrived)
        self.between += [later - earlier for earlier, later in itertools.pairwise(moments)]

    def extend(self, other: "Waits") -> None:
        """Pool with another round's."""
        self.first += other.first
        self.between += other.between
        self.unserved += other.unserved


def main() -> None:
    options = _options()
    state = {
        **machine("latency", options),
        "prompt_tokens": PROMPT_TOKENS,
        "answer_tokens": ANSWER_TOKENS,
    }
    print(json.dumps(state), flush=True)
    capacities: dict[str, list[float]] = {"ours": [], "queue": []}
    pooled: dict[tuple[str, str], Waits] = {}
    with prepared(options.device, NUM_USERS) as (setting, _):
        for number in range(options.rounds):
            for key, waits in _Round(setting, options.seconds, number).run(capacities).items():
                pooled.setdefault(key, Waits()).extend(waits)
    figures = {
        server: {load: _figures(pooled[server, load]) for load in LOADS_A + LOADS_B}
        for server in capacities
    }
    _print_table(figures)
    capacity = {server: round(statistics.median(each), 3) for server, each in capacities.items()}
    print_report(state, requests_per_second=capacity, figures=figures, ratios=_ratios(figures))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--seconds", type=int, default=60, help="for which requests of one load arrive"
    )
    parser.add_argument(
        "--rounds", type=int, default=2, help="rounds in which both serve every load once"
    )
    return parser.parse_args()


class _Round:
    """Both servers under every load, never at the same time.

    The queue under A, ours under A and B, the queue under B.
    """

    def __init__(self, setting: Setting, seconds: float, number: int) -> None:
        self._setting, self._seconds, self._number = setting, seconds, number
        self._arrivals: dict[str, tuple[Arrival, ...]] = {}
        self._waits: dict[tuple[str, str], Waits] = {}

    def run(self, capacities: dict[str, list[float]]) -> dict[tuple[str, str], Waits]:
        """Return waits by server and load; add the capacities that were measured."""
        with Worker("__main__:Queue", self._setting) as queue:
            capacities["queue"].append(self._plan("queue", queue, LOADS_A))
            self._serve("queue", queue, LOADS_A)
        with Worker("__main__:Ours", self._setting) as ours:
            capacities["ours"].append(self._plan("ours", ours, LOADS_B))
            self._serve("ours", ours, LOADS_A + LOADS_B)
        with Worker("__main__:Queue", self._setting) as queue:
            self._serve("queue", queue, LOADS_B)
        return self._waits

    def _plan(self, name: str, server: Worker, loads: Sequence[str]) -> float:
        """Measure a capacity and draw the requests of the loads that are shares of it."""
        chance = random.Random(SEED)
        all_at_once = [_request_at(0, chance) for _ in range(CAPACITY_REQUESTS[name])]
        rate: float = server.run("capacity", arrivals=all_at_once)
        print(f"round {self._number}: capacity of {name} {rate:.2f} requests/s", flush=True)
        for load in loads:
            share = int(load.split("_")[0]) / 100
            self._arrivals[load] = _draw(
                rate * share, self._seconds, f"{SEED} {self._number} {load}"
            )
        return rate

    def _serve(self, name: str, server: Worker, loads: Sequence[str]) -> None:
        for load in loads:
            waits = server.run("serve", arrivals=self._arrivals[load], until=2 * self._seconds)
            self._waits[name, load] = waits
            print(
                f"round {self._number}: {name}, load {load}, {len(waits.first)} requests",
                flush=True,
            )


def _draw(rate: float, seconds: float, seed: str) -> tuple[Arrival, ...]:
    """Draw requests at `rate` a second for so many seconds; the first comes at once."""
    chance = random.Random(seed)
    arrivals: list[Arrival] = []
    at = 0.0
    while at < seconds:
        arrivals.append(_request_at(at, chance))
        at += chance.expovariate(rate)
    return tuple(arrivals)


def _request_at(at: float, chance: random.Random) -> Arrival:
    prompt = tuple(chance.choices(range(10, VOCABULARY), k=chance.randint(*PROMPT_TOKENS)))
    return Arrival(at, chance.randrange(NUM_USERS), prompt, chance.randint(*ANSWER_TOKENS))


class Ours:
    """Our engine behind an event loop."""

    def __init__(self, setting: Setting) -> None:
        base = load_base(setting.base, device=setting.device, dtype=torch.bfloat16)
        self._engine = Engine.of(base, EngineOptions(speculation=False))
        self._adapters = [self._engine.load_adapter(folder) for folder in setting.adapters]
        self.capacity(_draw(1e9, 4e-9, "warm up"))

    def capacity(self, arrivals: Sequence[Arrival]) -> float:
        """Return requests/s while all of them are there."""
        start = time.perf_counter()
        self._engine.generate([self._request(arrival) for arrival in arrivals])
        return len(arrivals) / (time.perf_counter() - start)

    def serve(self, arrivals: Sequence[Arrival], until: float) -> Waits:
        """Answer every request, each from the moment of its arrival on."""
        return asyncio.run(self._serve(arrivals))

    async def _serve(self, arrivals: Sequence[Arrival]) -> Waits:
        waits = Waits()
        start = time.perf_counter()
        await asyncio.gather(*(self._answer(arrival, start, waits) for arrival in arrivals))
        return waits

    async def _answer(self, arrival: Arrival, start: float, waits: Waits) -> None:
        await asyncio.sleep(start + arrival.at - time.perf_counter())
        events = self._engine.astream(self._request(arrival))
        moments = [
            time.perf_counter() - start async for event in events if isinstance(event, Piece)
        ]
        assert len(moments) == arrival.num_tokens
        waits.add(arrival.at, moments)

    def _request(self, arrival: Arrival) -> Request:
        sampling = Sampling(max_tokens=arrival.num_tokens)
        contrast = Contrast(peers.ALPHA, peers.TAU)
        return Request(arrival.prompt, self._adapters[arrival.user], contrast, sampling)


class Queue:
    """One request at a time, in the order of arrival.

    The arrivals are known beforehand, so the queue takes no thread.
    """

    def __init__(self, setting: Setting) -> None:
        self._device = setting.device
        self._model = peers._with_adapters(peers._load(setting), setting.adapters)
        self._model.generation_config.eos_token_id = None  # no answer stops early
        self.capacity(_draw(1e9, 2e-9, "warm up"))

    def capacity(self, arrivals: Sequence[Arrival]) -> float:
        """Return requests/s when one follows the other."""
        start = time.perf_counter()
        for arrival in arrivals:
            self._answer(arrival)
        return len(arrivals) / (time.perf_counter() - start)

    def serve(self, arrivals: Sequence[Arrival], until: float) -> Waits:
        """Answer requests as they come, but begin with none after `until` seconds."""
        waits = Waits()
        start = time.perf_counter()
        for arrival in arrivals:
            now = time.perf_counter() - start
            if now >= until:
                waits.unserved += 1
                waits.first.append(now - arrival.at)
                continue
            time.sleep(max(0.0, arrival.at - now))
            waits.add(arrival.at, [moment - start for moment in self._answer(arrival)])
        return waits

    def _answer(self, arrival: Arrival) -> list[float]:
        """Answer a request and return when each token came."""
        self._model.set_adapter(f"user{arrival.user}")
        ids = torch.tensor([arrival.prompt], device=self._device)
        clock = _Clock()
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=arrival.num_tokens,
                streamer=clock,
            )
        assert len(clock.moments) == arrival.num_tokens
        return clock.moments


class _Clock(BaseStreamer):
    """When `generate` had each token.

    The tokens it is handed lie on the CPU: the device has been waited for.
    """

    def __init__(self) -> None:
        self.moments: list[float] = []
        self._had_prompt = False

    def put(self, value: Tensor) -> None:
        if self._had_prompt:
            self.moments.append(time.perf_counter())
        self._had_prompt = True

    def end(self) -> None:
        pass


def _figures(waits: Waits) -> dict[str, float]:
    return {
        "requests": len(waits.first),
        "unserved": waits.unserved,
        "ttft_p50": _percentile(waits.first, 50),
        "ttft_p99": _percentile(waits.first, 99),
        "between_p50": _percentile(waits.between, 50),
        "between_p99": _percentile(waits.between, 99),
    }


def _percentile(seconds: Sequence[float], percent: int) -> float:
    """Return the milliseconds that `percent` of the values do not exceed: one of the values."""
    ordered = sorted(seconds)
    return round(1000 * ordered[math.ceil(len(ordered) * percent / 100) - 1], 2)


def _print_table(figures: Figures) -> None:
    names = "".join(f"{name:>13}" for name in FIGURES)
    print(f"\n{'load, %':<14}{'server':<8}{'requests':>9}{'unserved':>9}{names}")
    for load in LOADS_A + LOADS_B:
        for server in figures:
            cells = figures[server][load]
            counts = f"{cells['requests']:>9}{cells['unserved']:>9}"
            milliseconds = "".join(f"{cells[name]:>13.1f}" for name in FIGURES)
            print(f"{load:<14}{server:<8}{counts}{milliseconds}")
    print("milliseconds; loads are shares of the queue's capacity, or else `of_ours`")


def _ratios(figures: Figures) -> dict[str, float]:
    """Ours / queue: smaller is better."""
    return {
        f"{name}_vs_queue_{load}": round(
            figures["ours"][load][name] / figures["queue"][load][name], 3
        )
        for load in LOADS_A + LOADS_B
        for name in FIGURES
    }


if __name__ == "__main__":
    main()
