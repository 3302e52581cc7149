"""The server for hours: many users through few slots, with publishes, rollbacks and cancels.

A server of its own process answers bursts of requests of random users, of whom far more ask than
have slots. Some clients go in the middle of an answer, some ask for two answers, versions are
published, rolled back and activated meanwhile. Every few answers one is decoded again by an engine
alone in this process, in float32, by the version that the server named: its tokens have to be the
same, or to part where the scores of both are within 1e-3 of each other (a tie).

Reported are resident memory, threads, open files and temporary files of the server, as medians of
the second quarter and of the last one, errors, differences and ties, and what the engine holds at
the end. The load is held to `--share` of one core. A line is printed every minute; the last line is
one JSON object. The exit status is 1 after an error, a difference or a leak.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from server_process import port_of
from soak import write_adapter

CHAT = "/v1/chat/completions"
EVERY = 15.0  # seconds between two looks at the server
TIE = 1e-3  # nats
GROWTH = 1.05  # memory may be that much more at the end than in the second quarter
WORDS = (
    """
a bridge, the harbour, an old city, graphs of many kinds, models for speech, small languages,
the market in winter, how people vote, tests of theories, notes for beginners, what lanterns cost,
the far north, parsing, summaries of long texts, small islands
""".replace("\n", " ")
    .strip()
    .split(", ")
)
ASKS = (
    "Generate a title for the following abstract of a paper.\nabstract: We study {0} and {1}.",
    "Generate an abstract for the title 'On {0} and {1}'.",
    "Generate a headline for the following article.\narticle: {0} met {1} on Monday. " * 2,
)


@dataclass
class Found:
    """What was seen."""

    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    seen: dict[str, list[float]] = field(default_factory=dict)
    """Series of looks at the server, by what was looked at."""


def main() -> None:
    options = _options()
    found, started = Found(), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tmp").mkdir()
        fingerprint, adapters = _prepare(folder, options)
        server = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(folder, options.model, options.rows, options.slots)
        )
        log = folder / "server.log"
        log.touch()
        server.start()
        port = port_of(log, server.is_alive)
        soak = Soak(folder, fingerprint, adapters, port, server.pid or 0, options, found)
        try:
            asyncio.run(soak.run())
        finally:
            os.kill(server.pid or 0, signal.SIGTERM)
            server.join(60)
            found.counts["exit_code"] = server.exitcode if server.exitcode is not None else -1
    leaks = _leaks(found)
    for line in [*found.errors, *found.differences, *leaks][:20]:
        print(line)
    hours = (time.monotonic() - started) / 3600
    print(json.dumps({"benchmark": "serve_soak", **vars(options), "hours": round(hours, 2)}
                     | _summary(found, leaks)))  # fmt: skip
    sys.exit(bool(found.errors or found.differences or leaks))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=2, metavar="H")
    parser.add_argument("--model", default="smollm2", metavar="NAME", help="a name or a folder")
    parser.add_argument("--users", type=int, default=200, metavar="N")
    parser.add_argument("--slots", type=int, default=8, metavar="N")
    parser.add_argument("--rows", type=int, default=16, metavar="N", help="in the batch, at most")
    parser.add_argument("--clients", type=int, default=12, metavar="N", help="of a burst")
    parser.add_argument("--share", type=float, default=0.15, metavar="X", help="of one core")
    parser.add_argument("--check-every", type=int, default=5, metavar="N", help="answers")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _prepare(folder: Path, options: argparse.Namespace) -> tuple[dict[str, str], list[Path]]:
    """Write adapters, publish one a user; return the base's fingerprint and the adapters."""
    from adapter_store import AdapterStore
    from langchain_cope.engine import load_base

    base = load_base(options.model, device="cpu", dtype="float32")
    adapters = [
        write_adapter(folder / f"adapter{seed}", base.model, seed=seed, rank=(2, 4, 8)[seed % 3],
                      scale=0.05)
        for seed in range(24)
    ]  # fmt: skip
    fingerprint = dict(base.fingerprint())
    store = AdapterStore(str(folder / "adapters"))
    for user in range(options.users):
        store.publish(_user(user), adapters[user % len(adapters)], base=fingerprint,
                      alpha=0.3, tau=0.1)  # fmt: skip
    return fingerprint, adapters


def _user(number: int) -> str:
    return f"user{number}"


def _serve(folder: Path, model: str, rows: int, slots: int) -> None:
    """Serve in this process, a new one, until a signal comes."""
    sys.stderr = (folder / "server.log").open("w", encoding="utf-8", buffering=1)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "tmp")
    from langchain_cope import EngineOptions
    from langchain_cope.serving import ServeSettings, serve

    engine_options = EngineOptions(max_rows=rows, adapter_slots=slots, prefix_cache=32 << 20)
    serve(
        ServeSettings(
            model=model,
            served_name="base",
            dtype="float32",
            device="cpu",
            store=str(folder / "adapters"),
            data=folder / "data",
            port=0,
            engine_options=engine_options,
        )
    )


class Soak:
    """The clients, the one who publishes, and the one who looks at the server."""

    def __init__(
        self,
        folder: Path,
        fingerprint: dict[str, str],
        adapters: list[Path],
        port: int,
        pid: int,
        options: argparse.Namespace,
        found: Found,
    ) -> None:
        from adapter_store import AdapterStore

        self._folder, self._adapters, self._fingerprint = folder, adapters, fingerprint
        self._options, self._found = options, found
        self._url = f"http://127.0.0.1:{port}"
        self._process = psutil.Process(pid)
        self._store = AdapterStore(str(folder / "adapters"))
        self._random = random.Random(options.seed)
        self._alone = Alone(folder, options.model)
        self._published: list[str] = []
        self._ends_at = time.monotonic() + options.hours * 3600

    async def run(self) -> None:
        """Send burst after burst until the time is over; then look at what is held."""
        watching = asyncio.create_task(self._watch())
        try:
            async with httpx.AsyncClient(base_url=self._url, timeout=600) as client:
                while time.monotonic() < self._ends_at:
                    started, used = time.monotonic(), self._cpu()
                    size = self._random.randint(1, self._options.clients)
                    await asyncio.gather(*(self._ask(client) for _ in range(size)))
                    await self._change(client)
                    pause = (self._cpu() - used) / self._options.share
                    await asyncio.sleep(max(0.0, started + pause - time.monotonic()))
                await asyncio.sleep(2)
                text = (await client.get("/metrics")).text
        finally:
            watching.cancel()
        held = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        for name in ("num_requests_running", "num_requests_waiting", "adapters_in_use"):
            self._found.counts[f"held_{name}"] = int(float(held[f"cope_{name}"]))
        for name in ("adapter_loads", "adapter_evictions", "generation_tokens"):
            self._found.counts[name] = int(float(held[f"cope_{name}_total"]))

    def _cpu(self) -> float:
        """Return the seconds of a processor that server and this process have used."""
        times = [self._process.cpu_times(), psutil.Process().cpu_times()]
        return sum(each.user + each.system for each in times)

    async def _ask(self, client: httpx.AsyncClient) -> None:
        chance, counts = self._random, self._found.counts
        user = _user(int(self._options.users * chance.random() ** 2))  # some ask more than others
        text = chance.choice(ASKS).format(*chance.sample(WORDS, 2))
        body: dict[str, Any] = {
            "model": "base",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": chance.choice((1, 4, 12, 24)),
            "logprobs": True,
            "stream": chance.random() < 0.7,
            "user": user,
        }
        kind = chance.random()
        try:
            if kind < 0.15:
                await self._go_away(client, body)
            elif kind < 0.25:
                body |= {"n": 2, "temperature": 1, "seed": chance.randrange(1000)}
                (await client.post(CHAT, json={**body, "stream": False})).raise_for_status()
                counts["answers"] += 2
            else:
                await self._check(user, text, body, *await _answer(client, body))
        except (httpx.HTTPError, ValueError, KeyError) as error:
            self._found.errors.append(f"{type(error).__name__}: {error}"[:300])

    async def _go_away(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        """Close the connection before or in the middle of the answer."""
        self._found.counts["cancelled"] += 1
        seconds = self._random.random() * 0.3
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await _answer(client, {**body, "max_tokens": 200})

    async def _check(
        self, user: str, text: str, body: dict[str, Any], version: str, tokens: list[Any]
    ) -> None:
        """Hold every so many answers against the engine alone."""
        counts = self._found.counts
        counts["answers"] += 1
        if counts["answers"] % self._options.check_every:
            return
        expected = await asyncio.to_thread(
            self._alone.answer, user, version, text, body["max_tokens"]
        )
        counts["compared"] += 1
        seen = [(bytes(token["bytes"]), token["reward"]) for token in tokens]
        for (own, reward), (other, other_reward) in zip(seen, expected, strict=False):
            if own != other:
                is_tie = abs(reward - other_reward) < TIE
                counts["ties"] += is_tie
                if not is_tie:
                    self._found.differences.append(f"{own!r} {reward}, alone {other!r}")
                return
        if len(seen) != len(expected):
            self._found.differences.append(f"{len(seen)} tokens, alone {len(expected)}")

    async def _change(self, client: httpx.AsyncClient) -> None:
        """Publish another version of somebody's, or roll somebody back, now and then."""
        kind = self._random.random()
        user = _user(self._random.randrange(self._options.users))
        if kind < 0.2:
            adapter = self._random.choice(self._adapters)
            publish = self._store.publish
            await asyncio.to_thread(
                publish, user, adapter, base=self._fingerprint, alpha=0.3, tau=0.1
            )
            self._found.counts["published"] += 1
            self._published.append(user)
        elif kind < 0.3 and self._published:
            user = self._random.choice(self._published)
            answer = await client.post("/v1/adapters/rollback", json={"user": user})
            self._found.counts["rolled_back"] += answer.status_code == 200
        elif kind < 0.4:
            row = {"text": f"What {user} wrote about {self._random.choice(WORDS)}."}
            await client.post("/v1/history", json={"user": user, "rows": [row]})
            await client.delete("/v1/history", params={"user": user})

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(EVERY)
            now = {
                "memory_mb": self._process.memory_info().rss / 2**20,
                "threads": self._process.num_threads(),
                "files": self._process.num_fds(),
                "temporary_files": sum(1 for _ in (self._folder / "tmp").rglob("*")),
            }
            for name, value in now.items():
                self._found.seen.setdefault(name, []).append(value)
            if len(self._found.seen["files"]) % 4 == 0:
                print(json.dumps(_summary(self._found, [])), flush=True)


async def _answer(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, list[Any]]:
    """Return the version that answered and the answer's tokens."""
    if not body["stream"]:
        answer = (await client.post(CHAT, json=body)).raise_for_status().json()
        return answer["cope"]["adapter_version"], answer["choices"][0]["logprobs"]["content"]
    tokens: list[Any] = []
    version = ""
    async with client.stream("POST", CHAT, json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                for choice in chunk["choices"]:
                    tokens += (choice.get("logprobs") or {}).get("content", [])
                version = chunk.get("cope", {}).get("adapter_version", version)
    return version, tokens


class Alone:
    """An engine in this process, which answers one request at a time, without any of the caches."""

    def __init__(self, folder: Path, model: str) -> None:
        from langchain_cope import ChatCoPe, EngineOptions

        options = EngineOptions(
            max_rows=2, adapter_slots=2, prefix_cache=0, speculation=False, packed_weights=False
        )
        self._chat = ChatCoPe(
            model=model,
            store=str(folder / "adapters"),
            device="cpu",
            dtype="float32",
            engine_options=options,
        )

    def answer(self, user: str, version: str, text: str, num_tokens: int) -> list[Any]:
        """Return the answer's tokens, each with its reward."""
        from langchain_core.messages import HumanMessage

        call = self._chat.prepare(
            [HumanMessage(text)],
            user_id=user,
            adapter_version=version,
            max_tokens=num_tokens,
            logprobs=True,
        )
        (answer,) = call.engine.generate([call.request])
        return [(token.data, token.reward) for token in answer.logprobs]


def _leaks(found: Found) -> list[str]:
    """Return what grew, or was held at the end."""
    leaks = [f"{name}: {value}" for name, value in found.counts.items() if "held" in name and value]
    if found.counts["exit_code"]:
        leaks.append(f"the server ended with {found.counts['exit_code']}")
    for name, (before, after) in _quarters(found).items():
        bound = before * GROWTH if name == "memory_mb" else before + 2
        if after > bound:
            leaks.append(f"{name} grew from {before} to {after}")
    return leaks


def _quarters(found: Found) -> dict[str, tuple[float, float]]:
    """Return the medians of the second quarter and the last one, by what was looked at."""
    medians = {}
    for name, values in found.seen.items():
        size = len(values) // 4
        if size:
            parts = values[size : 2 * size], values[-size:]
            medians[name] = tuple(round(statistics.median(part), 1) for part in parts)
    return medians  # type: ignore[return-value]


def _summary(found: Found, leaks: list[str]) -> dict[str, Any]:
    return {
        **found.counts,
        **{name: list(values) for name, values in _quarters(found).items()},
        "errors": len(found.errors),
        "differences": len(found.differences),
        "leaks": leaks,
    }


if __name__ == "__main__":
    main()
