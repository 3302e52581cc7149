"""Tiny real models and adapters, built here: real architectures, and a tokenizer really trained.

Nothing is downloaded. Weights are random but wide enough apart that greedy answers differ between
prompts, users and α.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

DEVICE = os.environ.get("COPE_TEST_DEVICE", "cpu")
"""Where the bases lie whose results are compared with a reference; the reference is on the CPU."""
SENTENCES = [
    "Generate a headline for the following article.",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "Personal models answer every user in that user's own manner.",
    "Wörter mit Umlauten, 日本語 and emoji 🙂 are text like any other.",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Gemma's way: no system role, turns end with a newline after the end token.
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
# Qwen3's way: a finished assistant turn starts with an empty thought, a generation prompt does not.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen's way with tools: they stand in the system turn, calls and results between marks.
TOOLS = (
    "{% if tools %}<|im_start|>system\nTools:{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n"
    'Call them with <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call><|im_end|>\n'
    "{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m.get('tool_calls', []) %}<tool_call>\n"
    "{{ c['function'] | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A reasoning model's way: the reply begins inside a thought.
THINKS_FIRST = CHATML.replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
)

_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _SMALL,
    "qwen2": _SMALL,
    "qwen3": {**_SMALL, "head_dim": 8},
    "gemma": {**_SMALL, "head_dim": 8},
    "gemma2": {**_SMALL, "head_dim": 8, "sliding_window": 12, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_SMALL, "head_dim": 8, "sliding_window": 12, "query_pre_attn_scalar": 8},
    "phi3": {**_SMALL, "sliding_window": 12},
    "mistral": {**_SMALL, "sliding_window": 12},
    "qwen2_moe": {  # its shared expert sees rows and positions as one dimension
        **_SMALL,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3},
    "gpt_neox": {**_SMALL, "num_key_value_heads": None},
}


def make_tokenizer(
    folder: Path,
    *,
    template: str | None = CHATML,
    context: int = 256,
    marks: tuple[str, ...] = (),
    texts: tuple[str, ...] = (),
) -> PreTrainedTokenizerFast:
    """Save a byte-level BPE that can spell any text to `folder` and return it.

    It has 384 tokens, or up to 640 that are made for `texts` too; `marks` are special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=640 if texts else 384,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES, *texts], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=context,
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *marks]})
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


def make_model(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    template: str | None = CHATML,
    context: int = 256,
    marks: tuple[str, ...] = (),
    texts: tuple[str, ...] = (),
    likely: str = "",
    **changes: Any,
) -> Path:
    """Save a tiny base of `family` to `folder` and return it: config, random weights, tokenizer.

    The characters in `likely` are often written: with `"]}` among them, JSON closes by itself.
    `changes` are fields of the config; None leaves one out.
    """
    tokenizer = make_tokenizer(folder, template=template, context=context, marks=marks, texts=texts)
    size = {} if context == 256 else {"max_position_embeddings": context}
    settings = {**FAMILIES[family], **size, **changes}
    fields = {name: value for name, value in settings.items() if value is not None}
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **fields,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        ids = [token for character in likely for token in tokenizer.encode(character)]
        model.get_output_embeddings().weight[ids] *= 4  # far from 0 in either direction
    model.save_pretrained(folder)
    return folder


def make_adapter(
    folder: Path,
    base: Path,
    *,
    seed: int,
    targets: list[str] | str = "all-linear",
    rank: int = 4,
    scale: float = 0.15,
    **changes: Any,
) -> Path:
    """Save a LoRA with random A and B to a peft folder, strong enough to change most answers."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(
        r=rank,
        lora_alpha=changes.pop("lora_alpha", 2 * rank),
        target_modules=targets,
        task_type="CAUSAL_LM",
        **changes,
    )
    personal = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in personal.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, scale)
    personal.save_pretrained(folder)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    """Change fields of a peft folder's adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
