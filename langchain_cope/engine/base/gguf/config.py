"""The configuration and the tokenizer that a GGUF file describes, saved the way transformers does.

transformers builds both. What it leaves out though the file says it, and what would change answers
without a word, is added here: how positions turn, how texts are cut, which tokens end an answer.
"""

from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerFast

from langchain_cope.engine.base.gguf.header import GgufHeader
from langchain_cope.engine.base.gguf.rope import set_rope
from langchain_cope.errors import ModelError
from langchain_cope.text import first_line

# Kinds of text splitting in llama.cpp that take every digit for itself, then split as GPT-2 does.
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
# Fields of the configuration that the file states, where transformers' reading leaves them out.
_STATED = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "context_length": "n_positions",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
# Gemmas of 27B, known by their layers, scale queries by another size than that of a head.
_SCALED_BY_WIDTH = {("gemma2", 46), ("gemma3", 62)}


def save_config_and_tokenizer(path: Path, header: GgufHeader, folder: Path) -> None:
    """Save the configuration and the tokenizer of the GGUF file `path` to `folder`.

    Raises ModelError where transformers cannot read them.
    """
    try:
        config = _config(header, folder)
        tokenizer = _tokenizer(path, folder)
    except Exception as error:  # odd metadata raises any of a dozen kinds
        raise ModelError(
            f"transformers cannot read the architecture {header.architecture!r} of {path}: "
            f"{first_line(error)}"
        ) from error
    _check_kind(path, config)
    _complete(config, header)
    set_rope(path, header, config)
    tokenizer.model_max_length = header.own("context_length") or tokenizer.model_max_length
    _split_digits(tokenizer, header)
    _generation(tokenizer, header).save_pretrained(folder)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _config(header: GgufHeader, folder: Path) -> Any:
    """Return the configuration as transformers reads it."""
    # transformers makes Python objects of all tokens first: seconds, and 100 MB.
    short = folder / "short.gguf"
    header.write_short(short)
    try:
        config = AutoConfig.from_pretrained(folder, gguf_file=short.name, trust_remote_code=False)
    finally:
        short.unlink()
    for tensor in header.tensors:
        if tensor.name == "token_embd.weight":
            config.vocab_size = tensor.shape[0]
    return config


def _tokenizer(path: Path, folder: Path) -> Any:
    """Return the tokenizer as transformers reads it, from the file alone."""
    # Where the file lies, a tokenizer_config.json or a chat_template.jinja beside it would be read.
    alone = folder / "whole.gguf"
    alone.symlink_to(path.resolve())
    try:
        # Not AutoTokenizer: it would read the configuration with all tokens for nothing.
        return PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=alone.name)
    finally:
        alone.unlink()


def _check_kind(path: Path, config: Any) -> None:
    if config.is_encoder_decoder:
        raise ModelError(
            f"{path} holds a model of the kind {config.model_type!r}, an encoder with a decoder: "
            "a causal language model is needed"
        )


def _complete(config: Any, header: GgufHeader) -> None:
    """Set what the file states and transformers leaves at its default."""
    for ours, theirs in _STATED.items():
        value = header.own(ours)
        if value is not None and hasattr(config, theirs):
            setattr(config, theirs, value)
    if hasattr(config, "query_pre_attn_scalar"):
        size = config.head_dim
        if (header.architecture, config.num_hidden_layers) in _SCALED_BY_WIDTH:
            size = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = size


def _split_digits(tokenizer: Any, header: GgufHeader) -> None:
    if header.fields.get("tokenizer.ggml.pre") in _DIGITS_APART:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )


def _generation(tokenizer: Any, header: GgufHeader) -> GenerationConfig:
    """Return the tokens that begin and end answers: the end of a text and that of a turn."""
    of = header.fields.get
    ends = [of(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    listed = list(dict.fromkeys(token for token in ends if token is not None))
    return GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=listed or None,
        pad_token_id=tokenizer.pad_token_id,
    )
