"""Tiny real models and items: one token a byte, a chat template, real architectures.

Their weights are random.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
)

from langchain_cope.history.items import Item
from langchain_cope.training.negatives import Pair
from langchain_cope.training.progress import Monitor, Progress, Stage

PLAIN = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
NEWLINE_AFTER_END = PLAIN.replace("<|end|>", "<|end|>\n")
EMPTY_THINK_BLOCK = (  # as Qwen3 does: the generation prompt has none, the last answer has
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PROMPT_ENDS_OTHERWISE = PLAIN.replace(
    "<|start|>assistant\n{% endif %}", "<|start|>assistant\n<think>\n{% endif %}"
)
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + PLAIN
)

TEMPLATES = {
    "plain": PLAIN,
    "newline after end": NEWLINE_AFTER_END,
    "empty think block": EMPTY_THINK_BLOCK,
    "prompt ends otherwise": PROMPT_ENDS_OTHERWISE,
    "refuses system": REFUSES_SYSTEM,
}
WIDTH = {
    "vocab_size": 260,
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": 259,
    "initializer_range": 0.2,
}


SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def _llama(context: int) -> LlamaForCausalLM:
    config = LlamaConfig(**WIDTH, **SHAPE, num_key_value_heads=1, max_position_embeddings=context)
    return LlamaForCausalLM(config)


def _gpt2(context: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(**WIDTH, n_embd=16, n_layer=2, n_head=2, n_positions=context))


def _phi3(context: int) -> Phi3ForCausalLM:
    limits = {"max_position_embeddings": context, "original_max_position_embeddings": context}
    return Phi3ForCausalLM(Phi3Config(**WIDTH, **SHAPE, **limits, num_key_value_heads=1))


def _mixtral(context: int) -> MixtralForCausalLM:
    experts = {"num_key_value_heads": 1, "num_local_experts": 4}
    config = MixtralConfig(**WIDTH, **SHAPE, **experts, max_position_embeddings=context)
    return MixtralForCausalLM(config)


ARCHITECTURES = {"llama": _llama, "gpt2": _gpt2, "phi3": _phi3, "mixtral": _mixtral}


def _tokenizer(template: str, context: int) -> PreTrainedTokenizerFast:
    """One token a byte, and four special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|end|>", "pad_token": "<|pad|>", "model_max_length": context}
    backend.add_special_tokens(["<|start|>", "<|end|>", "<think>", "<|pad|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)


def write_model(folder: Path, architecture: str, template: str, context: int) -> None:
    """Write a tiny model, the same every time, as a folder that `from_pretrained` reads."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        ARCHITECTURES[architecture](context).save_pretrained(folder)
    _tokenizer(TEMPLATES[template], context).save_pretrained(folder)


def make_item(number: int, answer: str = "so be it") -> Item:
    prompt = [{"role": "user", "content": f"question {number}?"}]
    return Item(prompt=prompt, completion=f"{answer}, {number * 7}.")


def pairs_in(folder: Path) -> list[Pair]:
    """Return the pairs that a training left in `folder` for DPO."""
    facts = json.loads((folder / Stage.NEGATIVES.file).read_text())
    return [Pair(**pair) for pair in facts["pairs"]]


class Heard(Monitor):
    """Keeps every step it hears of, and stops once `stop` is true of them."""

    def __init__(self, stop: Callable[[list[Progress]], bool] = lambda steps: False) -> None:
        super().__init__()
        self.steps: list[Progress] = []
        self._stop = stop

    def should_stop(self) -> bool:
        return self._stop(self.steps)

    def report(self, progress: Progress) -> None:
        self.steps.append(progress)
