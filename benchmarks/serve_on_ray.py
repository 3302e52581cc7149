"""What Ray adds to the server, and what a replica that is killed under load costs.

    python benchmarks/serve_on_ray.py [--seconds 15] [--only local,ray,kill]

`smollm2`, each of 16 users in a voice of their own, answers streamed over HTTP, keys on both sides:

local   `cope-lc serve`: 1 client with answers of 8 tokens, 16 with answers of 64, each with the
        next question at once
ray     `cope-lc serve --ray local` with one replica, that has all cores: the same
kill    two replicas, 16 clients, thrice as long; after a third one replica is killed by signal 9

`ray_vs_local` is pieces (about tokens) a second of Ray over those of the local server, and
`added_first_token` by how many seconds first tokens come later (median and 99th percentile), by
number of clients. An answer is doubled where a stream holds pieces of two answers. The last line is
one JSON object.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from serve import percentiles
from serve_engine import MODEL, TEXTS, user_id
from server_process import server_process, wait_for
from worker import Worker, machine, print_report

from langchain_cope.serving.keys import add_key, new_key
from langchain_cope.serving.principals import ANYBODY, APP_SCOPES

PORT = 18917  # Ray takes ports of its own among those that a system hands out
USERS = 16
TOKENS = {1: 8, 16: 64}  # of an answer at most, by number of clients
REPLICA = "ray::ServeReplica:langchain-cope:Replica"


@dataclass
class Seen:
    """What the clients saw."""

    first: list[float] = field(default_factory=list)
    """Seconds to first pieces."""
    pieces: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    """How answers ended."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--warm-up", type=float, default=5)
    parser.add_argument("--only", default="local,ray,kill")
    parser.set_defaults(device="cpu")
    options = parser.parse_args()
    parts: list[str] = options.only.split(",")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Worker("serve_engine:prepare", folder, USERS, None).close()
        key, record = new_key("clients", APP_SCOPES, ANYBODY)
        add_key(folder / "keys.json", record)
        for part in parts:
            found[part] = _serve(part, folder, key, options)
            print(f"{part}: {found[part]}", file=sys.stderr, flush=True)
    if "local" in parts and "ray" in parts:
        found |= _compared(found["local"], found["ray"])
    print_report(machine("serve_on_ray", options) | {"model": MODEL}, **found)


def _serve(part: str, folder: Path, key: str, options: argparse.Namespace) -> dict[str, Any]:
    words = [
        sys.executable, "-m", "cope_lc", "serve", "--model", MODEL, "--port", str(PORT),
        "--store", str(folder / "adapters"), "--data", str(folder / f"data-{part}"),
        "--keys", str(folder / "keys.json"),
    ]  # fmt: skip
    if part != "local":
        words += ["--ray", "local", "--replicas", "2" if part == "kill" else "1"]
    with server_process(words, folder / f"{part}.log") as process:
        wait_for(f"http://127.0.0.1:{PORT}/readyz")
        if part == "kill":
            return asyncio.run(_load(key, folder, 16, options, process))
        return {
            str(clients): asyncio.run(_load(key, folder, clients, options)) for clients in TOKENS
        }


async def _load(
    key: str,
    folder: Path,
    num_clients: int,
    options: argparse.Namespace,
    victim: "subprocess.Popen[bytes] | None" = None,
) -> dict[str, Any]:
    """Let the clients ask, and return what they saw; of `victim` one replica is killed."""
    texts = json.loads((folder / TEXTS).read_text(encoding="utf-8"))
    seen = Seen()
    clients = [
        asyncio.create_task(_client(key, texts, number, TOKENS[num_clients], seen))
        for number in range(num_clients)
    ]
    await asyncio.sleep(options.warm_up)
    seen.first, seen.pieces, seen.ended = [], 0, Counter()
    started = time.perf_counter()
    if victim is not None:
        await asyncio.sleep(options.seconds)
        os.kill(_replicas(victim)[0].pid, signal.SIGKILL)
        await asyncio.sleep(options.seconds)
    await asyncio.sleep(options.seconds)
    seconds = time.perf_counter() - started
    report = {
        "pieces_per_second": round(seen.pieces / seconds, 1),
        "first_token_p50_p99": percentiles(seen.first),
        "ended": dict(seen.ended),
    }
    for client in clients:
        client.cancel()
    await asyncio.wait(clients)
    return report


async def _client(key: str, texts: list[str], number: int, tokens: int, seen: Seen) -> None:
    """Ask one question after another."""
    turn = number
    while True:
        body = {
            "model": MODEL,
            "user": user_id(number % USERS),
            "messages": [{"role": "user", "content": texts[(number + 7 * turn) % len(texts)]}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
        }
        turn += 1
        try:
            how = await _answer(key, json.dumps(body).encode(), seen)
        except (OSError, asyncio.IncompleteReadError):
            how = "broken connection"
        seen.ended[how] += 1
        if how != "well":
            await asyncio.sleep(0.5)


async def _answer(key: str, body: bytes, seen: Seen) -> str:
    """Read one answer, and return how it ended."""
    started, is_first = time.perf_counter(), True
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{PORT}\r\n"
        f"Content-Type: application/json\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    ids: set[str] = set()
    try:
        writer.write(head.encode() + body)
        status = (await reader.readline()).split()[1].decode()
        if status != "200":
            return f"status {status}"
        while (line := await reader.readline()) and not line.startswith(b"data: [DONE]"):
            if not line.startswith(b"data: {"):
                continue
            piece = json.loads(line[len("data: ") :])
            if "error" in piece:
                return f"error event {piece['error']['code']}"
            ids.add(piece["id"])
            if not piece["choices"] or not piece["choices"][0]["delta"].get("content"):
                continue
            seen.pieces += 1
            if is_first:
                is_first = False
                seen.first.append(time.perf_counter() - started)
        if len(ids) > 1:
            return "doubled"
        return "well" if line else "broken off without a word"
    finally:
        writer.close()


def _replicas(server: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    children = psutil.Process(server.pid).children(recursive=True)
    return [one for one in children if one.cmdline()[:1] and one.cmdline()[0].startswith(REPLICA)]


def _compared(local: dict[str, Any], ray: dict[str, Any]) -> dict[str, Any]:
    both = {clients: (each, ray[clients]) for clients, each in local.items()}
    return {
        "ray_vs_local": {clients: _ratio(*pair) for clients, pair in both.items()},
        "added_first_token": {clients: _added(*pair) for clients, pair in both.items()},
    }


def _ratio(here: dict[str, Any], there: dict[str, Any]) -> float | str:
    if not here["pieces_per_second"]:
        return "no piece came: give more --seconds"
    ratio: float = there["pieces_per_second"] / here["pieces_per_second"]
    return round(ratio, 3)


def _added(here: dict[str, Any], there: dict[str, Any]) -> list[float] | str:
    soon, late = here["first_token_p50_p99"], there["first_token_p50_p99"]
    if not soon or not late:
        return "fewer than two first tokens came: give more --seconds"
    return [round(later - sooner, 4) for sooner, later in zip(soon, late, strict=True)]


if __name__ == "__main__":
    main()
