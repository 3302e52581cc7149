"""A server killed by signal 9 under 64 clients and started again: what it said it kept is there.

Each client is a user who chats, adds texts and feedback to the own history, and goes on as soon as
the server is back; a few have asked to be personalized. The server is killed at random moments and
started anew on the same folders. At the end the histories are read without the server.

Counted: texts and feedback that were acknowledged, those that are missing; trainings that were
accepted, how they ended, versions published for them; statuses that clients saw, connections that
broke. The last line is one JSON object; the exit status is 1 where anything acknowledged is
missing, or a training has not ended or published another number of versions than it says.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from server_process import port_of, server_process

PATIENCE = 240.0  # seconds for the trainings after the last start


@dataclass
class Told:
    """What the server told its clients."""

    texts: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Acknowledged texts, by user."""
    jobs: dict[str, str] = field(default_factory=dict)
    """Users of accepted trainings, by job."""
    counts: Counter[str] = field(default_factory=Counter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="starter")
    parser.add_argument("--clients", type=int, default=64, metavar="N")
    parser.add_argument("--trainings", type=int, default=3, metavar="N")
    parser.add_argument("--kills", type=int, default=3, metavar="N")
    parser.add_argument("--seconds", type=float, default=20, metavar="S", help="between two kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    told = Told()
    with tempfile.TemporaryDirectory() as name:
        jobs = asyncio.run(run(Path(name), options, told))
        missing, versions = look(Path(name), told)
    published = Counter(
        told.jobs[job] for job, shown in jobs.items() if (shown["result"] or {}).get("published")
    )
    ended = Counter(shown["status"] for shown in jobs.values())
    acknowledged = sum(map(len, told.texts.values()))
    report = {"acknowledged": acknowledged, "missing": len(missing), **told.counts}
    report |= {"trainings": dict(ended), "published": sum(published.values())}
    report["errors"] = [shown["error"]["message"] for shown in jobs.values() if shown["error"]]
    print(json.dumps({"benchmark": "serve_kills", **vars(options), **report}))
    unfinished = ended["queued"] + ended["running"]
    sys.exit(bool(missing or unfinished or versions != published))


async def run(folder: Path, options: argparse.Namespace, told: Told) -> dict[str, Any]:
    """Let clients ask while the server is killed and started; return the trainings' records."""
    chance, port = random.Random(options.seed), 0
    clients: list[asyncio.Task[None]] = []
    for start in range(options.kills + 1):
        words = [
            sys.executable, "-m", "cope_lc", "serve", "--model", options.model,
            "--served-name", "base", "--port", str(port),
            "--store", str(folder / "adapters"), "--data", str(folder / "data"),
        ]  # fmt: skip
        log = folder / f"server{start}.log"
        with server_process(words, log) as process:
            port = await asyncio.to_thread(port_of, log, lambda: process.poll() is None)
            if not clients:
                clients = [
                    asyncio.create_task(ask(port, number, number < options.trainings, told))
                    for number in range(options.clients)
                ]
            if start < options.kills:
                await asyncio.sleep(options.seconds * (0.5 + chance.random()))
                process.kill()
                await asyncio.to_thread(process.wait)
                told.counts["kills"] += 1
                continue
            await asyncio.sleep(options.seconds)
            for client in clients:
                client.cancel()
            await asyncio.wait(clients)
            return await end_of_trainings(port, told)
    raise AssertionError


async def ask(port: int, number: int, trains: bool, told: Told) -> None:
    """Chat, add to the history and, where it is asked for, train once; never give up."""
    user, turn = f"user{number}", 0
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        while True:
            turn += 1
            text = f"Text {turn} of {user}, who writes about bridges and the old harbour."
            feedback = {"prompt": f"Question {turn} of {user}?", "answer": text, "score": 1}
            chat = {"messages": [{"role": "user", "content": text}], "max_tokens": 8}
            try:
                row = feedback if turn % 2 else {"text": text}
                added = await post(client, told, "/v1/history", {"user": user, "rows": [row]})
                if added:
                    told.texts[user].add(text)
                if trains and turn >= 12 and user not in told.jobs.values():
                    job = await post(client, told, "/v1/personalize", {"user": user})
                    if job:
                        told.jobs[job["id"]] = user
                await post(
                    client, told, "/v1/chat/completions", {"model": "base", "user": user, **chat}
                )
            except httpx.TransportError:
                told.counts["broken_connections"] += 1
                await asyncio.sleep(0.5)


async def post(client: httpx.AsyncClient, told: Told, path: str, body: Any) -> Any:
    """Return what was answered, None where it was refused."""
    answer = await client.post(path, json=body)
    told.counts[f"status_{answer.status_code}"] += 1
    return answer.json() if answer.is_success else None


async def end_of_trainings(port: int, told: Told) -> dict[str, Any]:
    """Return the records of the trainings once they have ended, or for too long have not."""
    deadline = time.monotonic() + PATIENCE
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        while True:
            answers = [await client.get(f"/v1/personalize/{job}") for job in told.jobs]
            jobs = {
                job: answer.raise_for_status().json()
                for job, answer in zip(told.jobs, answers, strict=True)
            }
            live = [job for job in jobs.values() if job["status"] in ("queued", "running")]
            if not live or time.monotonic() > deadline:
                return jobs
            await asyncio.sleep(1)


def look(folder: Path, told: Told) -> tuple[list[str], Counter[str]]:
    """Return the acknowledged texts that are missing, and how many versions users have."""
    from adapter_store import AdapterStore
    from langchain_cope.history.chroma import ChromaHistory

    history = ChromaHistory(folder / "data" / "history")
    missing = []
    for user, texts in told.texts.items():
        missing += sorted(texts - {item.completion for item in history.history(user).items})
    store = AdapterStore(str(folder / "adapters"))
    versions = Counter({user: len(store.versions(user)) for user in told.jobs.values()})
    return missing, +versions


if __name__ == "__main__":
    main()
