"""The engine alone under the load of `serve`: the same requests, without HTTP, and nobody to read.

Served by a `worker.Worker`. `prepare` makes the users whom server and engine answer.
"""

import asyncio
import json
import time
from contextlib import aclosing
from pathlib import Path

import smollm2
from langchain_core.messages import HumanMessage

from adapter_store import AdapterStore
from langchain_cope import ChatCoPe, EngineOptions
from langchain_cope.engine import Request, load_base

MODEL = "smollm2"
TEXTS = "texts.json"
AROUND = "around.json"


def user_id(number: int) -> str:
    """Return the id of a user."""
    return f"user{number}"


def prepare(folder: Path, num_users: int, peer: Path | None) -> None:
    """Publish a random adapter a user; write questions, what is around them, a peer's base."""
    smollm2.prepare(folder, num_users)
    base = load_base(MODEL, device="cpu")
    store = AdapterStore(str(folder / "adapters"))
    for user in range(num_users):
        adapter = smollm2.adapter_of(folder, user)
        alpha, tau = smollm2.CONTRAST.alpha, smollm2.CONTRAST.tau
        store.publish(user_id(user), adapter, base=base.fingerprint(), alpha=alpha, tau=tau)
    questions = json.loads((folder / smollm2.PROMPTS).read_text(encoding="utf-8"))
    prompts = [base.tokenizer.decode(ids) for ids in questions]
    texts = [text_of(prompt) for prompt in prompts]
    (folder / TEXTS).write_text(json.dumps(texts), encoding="utf-8")
    (folder / AROUND).write_text(json.dumps(prompts[0].split(texts[0])), encoding="utf-8")
    if peer is not None:
        base.model.save_pretrained(peer)
        base.tokenizer.save_pretrained(peer)


def text_of(prompt: str) -> str:
    """Return what the user asks in a prompt."""
    return prompt.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]


class Alone:
    """One engine that answers so many requests at a time, the next as soon as one is done."""

    def __init__(self, folder: Path, num_users: int, max_rows: int) -> None:
        options = EngineOptions(max_rows=max_rows)
        store = str(folder / "adapters")
        self._chat = ChatCoPe(model=MODEL, store=store, device="cpu", engine_options=options)
        self._chat.load()
        self._texts = json.loads((folder / TEXTS).read_text(encoding="utf-8"))
        self._engine = self._chat.prepare([HumanMessage("Hello")]).engine
        self._num_users = num_users

    def rate(self, clients: int, seconds: float, warm_up: float, num_tokens: int) -> float:
        """Return the tokens/s of `clients` requests at a time, after `warm_up` seconds."""
        return asyncio.run(self._rate(clients, seconds, warm_up, num_tokens))

    async def _rate(self, clients: int, seconds: float, warm_up: float, num_tokens: int) -> float:
        requests = [
            [self._request(client, turn, num_tokens) for turn in range(len(self._texts))]
            for client in range(min(clients, self._num_users))
        ]
        engine = self._engine
        readers = [
            asyncio.create_task(self._read(requests[client % self._num_users], client))
            for client in range(clients)
        ]
        await asyncio.sleep(warm_up)
        before, started = engine.statistics().tokens, time.perf_counter()
        await asyncio.sleep(seconds)
        rate = (engine.statistics().tokens - before) / (time.perf_counter() - started)
        for reader in readers:
            reader.cancel()
        await asyncio.wait(readers)
        return rate

    def _request(self, client: int, turn: int, num_tokens: int) -> Request:
        text = self._texts[(client + 7 * turn) % len(self._texts)]
        return self._chat.prepare(
            [HumanMessage(text)], user_id=user_id(client), max_tokens=num_tokens
        ).request

    async def _read(self, requests: list[Request], first: int) -> None:
        turn = first
        while True:
            async with aclosing(self._engine.astream(requests[turn % len(requests)])) as pieces:
                async for _ in pieces:
                    pass
            turn += 1
