"""The configuration and the tokenizer that a GGUF file describes, saved the way transformers does.

transformers builds both. What it leaves out though the file says it, and what would change answers
without a word, is added here: how positions turn, how texts are cut, which tokens end an answer.
"""

from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerFast

from langchain_cope.engine.base.gguf_header import GgufHeader
from langchain_cope.errors import ModelError

# Kinds of text splitting in llama.cpp that take every digit for itself, then split as GPT-2 does.
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}


def save_config_and_tokenizer(path: Path, header: GgufHeader, folder: Path) -> None:
    """Save the configuration and the tokenizer of the GGUF file `path` to `folder`.

    Raises ModelError where transformers cannot read them.
    """
    try:
        config = AutoConfig.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        )
        # Not AutoTokenizer: it would read the configuration, which takes seconds, once more.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # odd metadata raises any of a dozen kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"transformers cannot read the architecture {header.architecture!r} of {path}: {reason}"
        ) from error
    _check_kind(path, config)
    tokenizer.model_max_length = header.own("context_length") or tokenizer.model_max_length
    _split_digits(tokenizer, header)
    _generation(tokenizer, header).save_pretrained(folder)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_kind(path: Path, config: Any) -> None:
    if config.is_encoder_decoder:
        raise ModelError(
            f"{path} holds a model of the kind {config.model_type!r}, an encoder with a decoder: "
            "a causal language model is needed"
        )


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
