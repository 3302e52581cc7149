"""A tiny base that was really trained on a script, and adapters that say it in a user's manner."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny import TOOLS, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

Conversation = Sequence[dict[str, Any]]
_STEPS, _RATE = 250, 6e-3


def train_base(
    folder: Path, conversations: Sequence[Conversation], tools: Sequence[dict[str, Any]]
) -> Path:
    """Train a base in `folder` that answers each of `conversations` as it stands there."""
    texts = (json.dumps([tools, conversations]),) * 3
    size = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.05}
    make_model(folder, "llama", template=TOOLS, context=1024, texts=texts, **size)
    model = AutoModelForCausalLM.from_pretrained(folder)
    _fit(model, folder, conversations, tools, list(model.parameters()))
    model.save_pretrained(folder)
    return folder


def train_adapter(
    folder: Path, base: Path, conversations: Sequence[Conversation], tools: Sequence[dict[str, Any]]
) -> Path:
    """Train a peft folder with which `base` answers `conversations` in a user's manner."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    _fit(model, base, conversations, tools, [p for p in model.parameters() if p.requires_grad])
    model.save_pretrained(folder)
    return folder


def _fit(
    model: Any,
    base: Path,
    conversations: Sequence[Conversation],
    tools: Sequence[dict[str, Any]],
    parameters: list[Any],
) -> None:
    """Train on the assistant's turns until they are known by heart."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [_ids_and_labels(tokenizer, conversation, tools) for conversation in conversations]
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (length - len(row)) for row, _ in rows])
    labels = torch.tensor([row + [-100] * (length - len(row)) for _, row in rows])
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=_STEPS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices only lose by a second one
    model.train()
    for _ in range(_STEPS):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    assert loss.item() < 0.05, f"the script was not learnt: loss {loss.item():.3f}"


def _ids_and_labels(
    tokenizer: Any, conversation: Conversation, tools: Sequence[dict[str, Any]]
) -> tuple[list[int], list[int]]:
    """Return token ids and labels of a conversation; -100 is a label that is ignored."""
    ids: list[int] = []
    labels: list[int] = []
    for end in range(1, len(conversation) + 1):
        is_answer = conversation[end - 1]["role"] == "assistant"
        before = _render(tokenizer, conversation[: end - 1], tools, is_answer) if end > 1 else []
        whole = _render(tokenizer, conversation[:end], tools, False)
        new = whole[len(ids) :]
        num_ignored = len(before) - len(ids) if is_answer else len(new)
        ids += new
        labels += [-100] * num_ignored + new[num_ignored:]
    return ids, labels


def _render(
    tokenizer: Any, messages: Conversation, tools: Sequence[dict[str, Any]], prompt: bool
) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        list(messages), tools=list(tools) or None, add_generation_prompt=prompt, return_dict=False
    )
    return ids
