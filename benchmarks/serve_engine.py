"""The engine alone under the load of `serve`: the same requests, without HTTP, and nobody to read.

Served by a `worker.Worker`. `prepare` makes the users whom server and engine answer.
"""

import asyncio
import json
import time
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import smollm2
from langchain_core.messages import HumanMessage

from adapter_store import AdapterStore
from langchain_cope import ChatCoPe, EngineOptions
from langchain_cope.engine import Request, load_base
from langchain_cope.engine.prefix_cache import num_shared

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


def first_tokens(client: int, clients: int, num_tokens: int) -> int:
    """Return the length of a client's first answer.

    Each client has another one, so that they do not all come back at the same time ever after.
    """
    return max(1, num_tokens * (client + 1) // clients)


class Alone:
    """One engine that answers so many requests at a time, the next as soon as one is done."""

    def __init__(self, folder: Path, num_users: int, max_rows: int, num_tokens: int) -> None:
        """Load the base and make every user's requests ready, as a server makes them."""
        options = EngineOptions(max_rows=max_rows)
        store = str(folder / "adapters")
        self._chat = ChatCoPe(model=MODEL, store=store, device="cpu", engine_options=options)
        self._chat.load()
        calls = [self._chat.prepare([HumanMessage(text)]) for text in ("a", "b")]
        self._engine = calls[0].engine
        one, other = (call.request.prompt for call in calls)
        self._public = tuple(one[: num_shared(one, other, len(one))])
        texts = json.loads((folder / TEXTS).read_text(encoding="utf-8"))
        self._requests = [
            [self._request(user_id(user), text, num_tokens) for text in texts]
            for user in range(num_users)
        ]

    def rate(self, clients: int, seconds: float, warm_up: float) -> float:
        """Return the tokens/s of `clients` requests at a time, after `warm_up` seconds."""
        return asyncio.run(self._rate(clients, seconds, warm_up))

    async def _rate(self, clients: int, seconds: float, warm_up: float) -> float:
        engine = self._engine
        readers = [asyncio.create_task(self._read(client, clients)) for client in range(clients)]
        await asyncio.sleep(warm_up)
        before, started = engine.statistics().tokens, time.perf_counter()
        await asyncio.sleep(seconds)
        rate = (engine.statistics().tokens - before) / (time.perf_counter() - started)
        for reader in readers:
            reader.cancel()
        await asyncio.wait(readers)
        return rate

    def _request(self, user: str, text: str, num_tokens: int) -> Request:
        request = self._chat.prepare(
            [HumanMessage(text)], user_id=user, max_tokens=num_tokens
        ).request
        return replace(request, cache_owner=user, public_prefix=self._public)

    async def _read(self, client: int, clients: int) -> None:
        requests = self._requests[client % len(self._requests)]
        turn = client
        while True:
            request = requests[(client + 7 * turn) % len(requests)]
            if turn == client:
                num_tokens = first_tokens(client, clients, request.sampling.max_tokens)
                sampling = replace(request.sampling, max_tokens=num_tokens)
                request = replace(request, sampling=sampling)
            async with aclosing(self._engine.astream(request)) as pieces:
                async for _ in pieces:
                    pass
            turn += 1
