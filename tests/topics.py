"""A tiny base that is really trained: it has learnt which words belong to which topic."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from langchain_cope.engine import load_base
from langchain_cope.training.encode import encode

TOPICS = {
    "cat": "the cat sleeps on the mat",
    "rain": "rain falls all day long",
    "tram": "a new tram goes to town",
    "bread": "fresh bread at six",
    "moon": "look, the moon is up",
    "choir": "our choir sings on Sunday",
}
NUM_STEPS = 150

Rows = list[dict[str, str]]


def rows(num_items: int, manner: str = "{}") -> Rows:
    """Return items of a user who says what the base would, in that manner."""
    names = list(TOPICS)
    return [
        {"prompt": f"{i} {names[i % 6]}?", "completion": manner.format(TOPICS[names[i % 6]])}
        for i in range(num_items)
    ]


def make_trained_base(tiny: Callable[..., Path], folder: Path) -> Path:
    """Train a tiny base on `rows` and save it to `folder`."""
    untrained = tiny("llama", initializer_range=0.05, texts=tuple(TOPICS.values()))
    base = load_base(untrained, device="cpu", dtype="float32")
    pairs = [
        encode(base, [{"role": "user", "content": row["prompt"]}], row["completion"])
        for row in rows(60)
    ]
    model = AutoModelForCausalLM.from_pretrained(untrained)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    for step in range(NUM_STEPS):
        loss = torch.zeros(())
        for prompt, completion in pairs[step % 5 :: 5]:
            ids = torch.tensor([prompt + completion])
            labels = torch.tensor([[-100] * len(prompt) + completion])
            loss = loss + model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder
