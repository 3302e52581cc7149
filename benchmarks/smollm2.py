"""Our engine on `smollm2`, the default base, as the benchmarks of one user's answer run it.

Nothing is made up but the users: real weights in the blocks of a GGUF file, real questions, the
engine's default options. Each class is served by a `worker.Worker`.
"""

import itertools
import json
import random
import time
from pathlib import Path

import torch
from peft import get_peft_model
from worker import SEED

from langchain_cope.engine import (
    Base,
    Contrast,
    Engine,
    EngineOptions,
    Piece,
    Request,
    Sampling,
    load_base,
)
from langchain_cope.training.adapter import lora_config, save_adapter
from langchain_cope.training.recipe import SFT

CONTRAST = Contrast(0.3, 0.1)
PROMPT_TOKENS = 51
PROMPTS = "prompts.json"
SCALE = 0.06  # of an adapter's random entries: another model, but one that writes words
CHANGED = 0.1  # nats by which the user's model and the base must differ over a token, on average

_THINGS = ["bridge", "violin", "glacier", "market", "harbour", "lantern", "orchard", "compass"]
_PLACES = [
    "a small island",
    "an old city",
    "the far north",
    "a desert",
    "the mountains",
    "a river town",
]
_TASKS = (
    "Explain how a {thing} came to matter in {place}, who looked after it and why people cared.",
    "Write a story about a {thing} in {place} that nobody wanted until the day it was needed.",
    "Describe what it takes to build a {thing} in {place}, from the first idea to the last day.",
)


def prepare(folder: Path, num_users: int) -> None:
    """Write token ids of questions, all of one length, and a random adapter a user."""
    base = load_base("smollm2", device="cpu")
    (folder / PROMPTS).write_text(json.dumps(questions(base)), encoding="utf-8")
    torch.manual_seed(SEED)
    personal = get_peft_model(base.skeleton(), lora_config(base.skeleton(), SFT()))
    for user in range(num_users):
        with torch.no_grad():
            for name, parameter in personal.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, SCALE)
        save_adapter(personal, base.name, adapter_of(folder, user))


def questions(base: Base) -> list[list[int]]:
    """Return the token ids of questions, all of `PROMPT_TOKENS` tokens, in random order."""
    texts = [
        task.format(thing=thing, place=place)
        for task, thing, place in itertools.product(_TASKS, _THINGS, _PLACES)
    ]
    random.Random(SEED).shuffle(texts)
    ids = [base.prompt_ids([{"role": "user", "content": text}]) for text in texts]
    return [each for each in ids if len(each) == PROMPT_TOKENS]


def adapter_of(folder: Path, user: int) -> Path:
    """Return the peft folder of a user in a folder of `prepare`'s."""
    return folder / f"user{user}"


class Ours:
    """One engine with its default options, but for speculation, and `prepare`'s users."""

    def __init__(
        self,
        folder: Path,
        num_users: int = 1,
        speculation: bool = False,
        task_adapter: Path | None = None,
    ) -> None:
        base = load_base("smollm2", device="cpu", task_adapter=task_adapter)
        # No answer ends early: nothing that the model writes is an end.
        base.model.generation_config.eos_token_id = -1
        base.tokenizer.eos_token = None
        base.__dict__["turn_end"] = type(base.turn_end)()
        self._engine = Engine.of(base, EngineOptions(speculation=speculation))
        self._adapters = [
            self._engine.load_adapter(adapter_of(folder, user)) for user in range(num_users)
        ]
        # Other questions each time: speculation would find the answers to the same ones.
        self._prompts = itertools.cycle(json.loads((folder / PROMPTS).read_text(encoding="utf-8")))

    def about(self) -> dict[str, object]:
        """Return the threads, the dtype, and up to how many rows packed products compute."""
        forward = self._engine._batch.forward
        products = [product for some in forward._alike for product in some]
        return {
            "threads": torch.get_num_threads(),
            "dtype": str(self._engine.base.dtype),
            "packed_rows": forward.packed_rows,
            "packed_products": sum(product.packed is not None for product in products),
            "products": len(products),
        }

    def rate(self, num_users: int, num_tokens: int, contrastive: bool = True) -> float:
        """Return tokens/s of all users together, from the first token of all to the last one."""
        rows = num_users * (1 + contrastive)
        streams = self._engine.stream_all(self._requests(num_users, num_tokens, contrastive))
        for stream in streams:
            assert isinstance(next(stream), Piece)
        start, before = time.perf_counter(), self._engine.statistics()
        assert before.rows == rows, f"{before.rows} rows, expected {rows}"
        answers = [stream.completion() for stream in streams]
        seconds = time.perf_counter() - start
        assert all(len(answer.token_ids) == num_tokens for answer in answers)
        return (self._engine.statistics().tokens - before.tokens) / seconds

    def contrast(self, num_tokens: int) -> dict[str, float]:
        """Return how far the first user's model is from the base, and what the contrast changed.

        Raises AssertionError where the two are the same model, so that a row would do.
        """
        (request,) = self._requests(1, num_tokens, contrastive=True, logprobs=True)
        (answer,) = self._engine.generate([request])
        distances = [abs(token.log_p_user - token.log_p_base) for token in answer.logprobs]
        nats = sum(distances) / len(distances)
        assert nats > CHANGED, f"user and base differ by {nats} nats a token"
        return {"nats_from_base": nats, "share_changed": answer.contrast_changed}

    def _requests(
        self, num_users: int, num_tokens: int, contrastive: bool, logprobs: bool = False
    ) -> list[Request]:
        return [
            Request(
                next(self._prompts),
                self._adapters[user] if contrastive else None,
                CONTRAST,
                Sampling(max_tokens=num_tokens),
                logprobs=logprobs,
            )
            for user in range(num_users)
        ]
