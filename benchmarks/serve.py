"""The server under load: clients that stream answers over HTTP, each the next at once.

    64 clients of 16 users for two minutes on `smollm2`: tokens/s of the server, the time to the
    first token and between two pieces at the clients, errors, and how memory grows. In turns with
    it, `--rounds` of them, the same requests in the engine alone (`serve_engine`), each turn of the
    server against the mean of the two beside it: `server_vs_engine` is their median

    --train     the same clients without and with one training of the server's own beside them:
                `p99_with_training`, seconds between two pieces against those without

    --peer      our server, every user in a voice of their own, against another one on the same
                base, without adapters: `users16_vs_peer_server` with `--clients 16`. It is
                `transformers` (`transformers serve` with continuous batching, in bfloat16), or
                `llama.cpp` with the base's own file (Q4_1), by npm's node-llama-cpp in `--npm`

Clients run on the machine that serves, and what they cost is the server's loss. Tokens are the
engine's own count, of the peer the clients'. The last line is one JSON object.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from serve_engine import AROUND, MODEL, TEXTS, first_tokens, user_id
from server_process import READY, port_of, server_process, wait_for
from worker import Worker, beside_npm, machine, print_report

HEADS = "POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
PEER_PORT = 8917


@dataclass
class Seen:
    """What the clients saw while it was measured."""

    first: list[float] = field(default_factory=list)
    """Seconds to first pieces."""
    between: list[float] = field(default_factory=list)
    """Seconds between two pieces of an answer."""
    answers: int = 0
    errors: int = 0
    measuring: bool = False

    def clear(self) -> None:
        """Forget it all."""
        self.first, self.between, self.answers, self.errors = [], [], 0, 0

    def report(self, seconds: float) -> dict[str, Any]:
        """Return percentiles in seconds, and the counts."""
        return {
            "answers": self.answers,
            "errors": self.errors,
            "pieces_per_second": round(len(self.between) / seconds, 1),
            "first_token_p50_p99": percentiles(self.first),
            "between_pieces_p50_p99": percentiles(self.between),
        }


def main() -> None:
    options = _options()
    state = machine("serve", options) | {"model": MODEL}
    print(json.dumps(state), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder, base = Path(name), Path(name) / "base"
        peer_base = base if options.peer == "transformers" else None
        Worker("serve_engine:prepare", folder, options.users, peer_base).close()
        if options.peer:
            results = _against_peer(folder, base, options)
        elif options.train:
            results = _beside_training(folder, options)
        else:
            results = _against_engine(folder, options)
    print_report(state, **results)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64, metavar="N")
    parser.add_argument("--users", type=int, default=16, metavar="N")
    parser.add_argument("--seconds", type=float, default=40, metavar="S", help="of a turn")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="against the engine")
    parser.add_argument("--engine-seconds", type=float, default=20, metavar="S")
    parser.add_argument("--warm-up", type=float, default=10, metavar="S", help="before each turn")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of an answer, at most")
    parser.add_argument("--rows", type=int, default=128, metavar="N", help="in the batch, at most")
    parser.add_argument("--train", action="store_true", help="measure beside a training, too")
    parser.add_argument("--peer", choices=("transformers", "llama.cpp"), help="compare with it")
    parser.add_argument("--npm", type=Path, metavar="FOLDER", help="has node-llama-cpp")
    parser.set_defaults(device="cpu")
    options = parser.parse_args()
    if options.peer == "llama.cpp" and options.npm is None:
        parser.error("--peer llama.cpp needs --npm FOLDER (npm install --prefix FOLDER …)")
    return options


def _against_engine(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure in turns: the machine's speed changes by more than what is to be told."""
    alone, turns = [], []
    with (
        Worker("serve_engine:Alone", folder, options.users, options.rows, options.tokens) as engine,
        _our_server(folder, options) as (port, process),
    ):

        def measure_engine() -> None:
            seconds, warm_up = options.engine_seconds, options.warm_up
            rate = engine.run("rate", clients=options.clients, seconds=seconds, warm_up=warm_up)
            print(f"the engine alone: {rate:.1f} tokens/s", flush=True)
            alone.append(rate)

        measure_engine()
        for _ in range(options.rounds):
            turns.append(asyncio.run(_load(port, MODEL, user_id, folder, options, process)))
            print(f"the server: {turns[-1]['tokens_per_second']} tokens/s", flush=True)
            measure_engine()
    beside = [statistics.mean(pair) for pair in itertools.pairwise(alone)]
    ratios = [turn["tokens_per_second"] / rate for turn, rate in zip(turns, beside, strict=True)]
    return {
        "engine_tokens_per_second": [round(rate, 1) for rate in alone],
        "server": turns,
        "ratios": [round(ratio, 3) for ratio in ratios],
        "server_vs_engine": round(statistics.median(ratios), 3),
    }


def _beside_training(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    measured = _measure_ours(folder, options)
    job = measured.pop("job")
    (_, alone), (_, beside) = (
        measured[name]["between_pieces_p50_p99"] for name in ("without", "with")
    )
    return {
        **measured,
        "job": job["status"],  # `running`: it went on all the while
        "p99_with_training": round(beside / alone, 2),
    }


def _against_peer(folder: Path, base: Path, options: argparse.Namespace) -> dict[str, Any]:
    ours = _measure_ours(folder, options)
    print(f"ours: {ours['tokens_per_second']} tokens/s", flush=True)
    words = _llama_cpp(folder, options) if options.npm else _transformers(base)
    log = folder / "peer.log"
    with server_process(words, log) as process:
        if options.npm:
            port = port_of(log, lambda: process.poll() is None)
        else:
            port = PEER_PORT
            wait_for(f"http://127.0.0.1:{port}/health")
        report = asyncio.run(_load(port, str(base), None, folder, options, process))
    print(f"{options.peer}: {report}", flush=True)
    ratio = ours["pieces_per_second"] / report["pieces_per_second"]
    name = f"users{options.clients}_vs_peer_server"
    return {"ours": ours, "peer": report, name: round(ratio, 2)}


def _transformers(base: Path) -> list[str]:
    return [
        sys.executable, "-m", "transformers.cli.transformers", "serve", str(base),
        "--device", "cpu", "--dtype", "bfloat16", "--continuous-batching",
        "--host", "127.0.0.1", "--port", str(PEER_PORT),
    ]  # fmt: skip


def _llama_cpp(folder: Path, options: argparse.Namespace) -> list[str]:
    """Return the command of llama.cpp's server."""
    from langchain_cope.engine import smollm2_file

    program = beside_npm("llama_cpp_server.mjs", options.npm)
    around = (folder / AROUND).read_text(encoding="utf-8")
    threads = str(os.environ.get("OMP_NUM_THREADS") or os.cpu_count())
    return ["node", str(program), str(smollm2_file()), threads, str(options.clients), around]


def _measure_ours(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return what the server did."""
    with _our_server(folder, options) as (port, process):
        return asyncio.run(_load(port, MODEL, user_id, folder, options, process))


@contextlib.contextmanager
def _our_server(
    folder: Path, options: argparse.Namespace
) -> "Iterator[tuple[int, subprocess.Popen[bytes]]]":
    """Run our server, started as people start it, and yield its port and process."""
    words = [
        sys.executable, "-m", "cope_lc", "serve", "--model", MODEL, "--port", "0",
        "--store", str(folder / "adapters"), "--data", str(folder / "data"),
        "--max-rows", str(options.rows),
    ]  # fmt: skip
    log = folder / "server.log"
    with server_process(words, log) as process:
        yield port_of(log, lambda: process.poll() is None), process


async def _load(
    port: int,
    model: str,
    name: Any,
    folder: Path,
    options: argparse.Namespace,
    process: "subprocess.Popen[bytes]",
) -> dict[str, Any]:
    """Let the clients ask; return what they saw and what else was measured.

    `name` gives the id of a user by number; None: nobody is named. With `--train` it is measured
    twice, the second time beside a training.
    """
    texts = json.loads((folder / TEXTS).read_text(encoding="utf-8"))
    seen = Seen()
    clients = [
        asyncio.create_task(_client(port, model, name, texts, number, options, seen))
        for number in range(options.clients)
    ]
    await asyncio.sleep(options.warm_up)
    report = await _measured(port if name else None, seen, options.seconds, process)
    if options.train:
        job = await asyncio.to_thread(_train, port, texts)
        seen.clear()
        report = {"without": report}
        report["with"] = await _measured(port, seen, options.seconds, process)
        report["job"] = await asyncio.to_thread(_get, port, f"/v1/personalize/{job}")
    for client in clients:
        client.cancel()
    await asyncio.wait(clients)
    return report


async def _measured(
    port: int | None, seen: Seen, seconds: float, process: "subprocess.Popen[bytes]"
) -> dict[str, Any]:
    """Return what the clients see from now on, for so many seconds; `port`: of our own server."""

    def metric(name: str) -> float:
        return 0 if port is None else _metric(port, name)

    async def look() -> None:
        memory.append(_memory(process))
        kv.append(await asyncio.to_thread(metric, "cope_kv_cache_bytes"))

    memory: list[int] = []
    kv: list[float] = []
    before = await asyncio.to_thread(metric, "cope_generation_tokens_total")
    await look()
    cpu, own = (psutil.Process(pid).cpu_times() for pid in (process.pid, None))
    started = time.perf_counter()
    seen.measuring = True
    for _ in range(4):
        await asyncio.sleep(seconds / 4)
        await look()
    seen.measuring, seconds = False, time.perf_counter() - started
    tokens = await asyncio.to_thread(metric, "cope_generation_tokens_total") - before
    cores = [
        round((now.user + now.system - then.user - then.system) / seconds, 3)
        for now, then in (
            (psutil.Process(process.pid).cpu_times(), cpu),
            (psutil.Process().cpu_times(), own),
        )
    ]
    return {
        **seen.report(seconds),
        "tokens_per_second": round(tokens / seconds, 1),
        "memory_mb": [round(each / 2**20) for each in memory],
        "keys_and_values_mb": [round(each / 2**20) for each in kv],
        "server_cores": cores[0],
        "clients_cores": cores[1],
    }


def _train(port: int, texts: list[str]) -> str:
    """Begin a training of somebody who does not ask; return the job's id once it trains."""
    rows = [{"prompt": text, "completion": f"Well, {text.lower()}"} for text in texts]
    _post(port, "/v1/history", {"user": "learner", "rows": rows})
    job = str(_post(port, "/v1/personalize", {"user": "learner"})["id"])
    url = f"http://127.0.0.1:{port}/v1/personalize/{job}/events"
    with urllib.request.urlopen(url, timeout=READY) as events:
        for line in events:
            if b'"label":"SFT"' in line:
                break
    return job


def _post(port: int, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=READY) as answer:
        return json.load(answer)


def _get(port: int, path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=READY) as answer:
        return json.load(answer)


async def _client(
    port: int,
    model: str,
    name: Any,
    texts: list[str],
    number: int,
    options: argparse.Namespace,
    seen: Seen,
) -> None:
    """Ask one question after another on one connection."""
    turn = number
    num_tokens = first_tokens(number, options.clients, options.tokens)
    while True:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": texts[(number + 7 * turn) % len(texts)]}],
            "max_tokens": num_tokens,
            "temperature": 0,
            "stream": True,
        }
        if name is not None:
            body["user"] = name(number % options.users)
        turn, num_tokens = turn + 1, options.tokens
        try:
            await _answer(port, json.dumps(body).encode(), seen)
        except (OSError, ValueError, asyncio.IncompleteReadError):
            seen.errors += seen.measuring
            await asyncio.sleep(0.5)


async def _answer(port: int, body: bytes, seen: Seen) -> None:
    """Read one answer; raise ValueError for one that is none."""
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = HEADS.format(path="/v1/chat/completions", port=port)
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if b" 200 " not in await reader.readline():
            raise ValueError("no 200")
        last, finished = None, False
        while True:
            line = await reader.readline()
            now = time.perf_counter()
            if line.startswith(b"data: [DONE]") or (finished and not line):  # some send no mark
                break
            if line.startswith(b'data: {"error"') or not line:
                raise ValueError("it broke off")
            finished = finished or b'"finish_reason":"' in line
            if not line.startswith(b"data: ") or b'"content":' not in line:
                continue
            if b'"content":""' in line or b'"content": ""' in line:
                continue
            if seen.measuring:
                (seen.first if last is None else seen.between).append(
                    now - (started if last is None else last)
                )
            last = now
        seen.answers += seen.measuring
    finally:
        writer.close()


def _metric(port: int, name: str) -> float:
    """Return one of our own server's metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def _memory(process: "subprocess.Popen[bytes]") -> int:
    return int(psutil.Process(process.pid).memory_info().rss)


def percentiles(values: list[float]) -> list[float]:
    """Return p50 and p99; nothing of fewer than two."""
    if len(values) < 2:
        return []
    ordered = statistics.quantiles(values, n=100)
    return [round(ordered[49], 4), round(ordered[98], 4)]


if __name__ == "__main__":
    main()
