"""What a base can do, read from its files without loading it: LangChain's model profile."""

import json
from pathlib import Path
from typing import Any

from langchain_core.language_models import ModelProfile

from langchain_cope.engine import STARTER, can_constrain, context_of, gguf_context, gguf_path
from langchain_cope.errors import CopeError


def profile_of(model: str, revision: str | None, max_tokens: int) -> ModelProfile | None:
    """Return the profile of a local or cached base; None where its files are not here.

    Args:
        model: as `BaseSettings.model`.
        revision: of a Hugging Face id.
        max_tokens: tokens of an answer, at most.
    """
    config = _config(model, revision)
    if config is None:
        return None
    tokenizer = _read(model, revision, "tokenizer_config.json") or {}
    profile = ModelProfile(
        name=model,
        open_weights=True,
        max_output_tokens=max_tokens,
        text_inputs=True,
        text_outputs=True,
        image_inputs=False,
        audio_inputs=False,
        video_inputs=False,
        pdf_inputs=False,
        tool_calling=True,
        tool_choice=can_constrain(),
        tool_call_streaming=True,
        structured_output=can_constrain(),
    )
    text_config: dict[str, Any] = config.get("text_config") or config
    context = context_of(text_config, tokenizer.get("model_max_length"))
    if context:
        profile["max_input_tokens"] = context - 1  # at least one is left for the answer
    return profile


def _config(model: str, revision: str | None) -> dict[str, Any] | None:
    """Return the configuration of the base, of a GGUF file its context alone."""
    try:
        file = gguf_path(model, revision, fetch=False)
        if file is not None:
            return {"max_position_embeddings": gguf_context(file)}
    except CopeError:  # it says so when it is loaded
        return None
    return _read(model, revision, "config.json")


def _read(model: str, revision: str | None, name: str) -> dict[str, Any] | None:
    """Return the JSON object in a file of the base; None if it cannot be read."""
    folder = STARTER if model == "starter" else Path(model).expanduser()
    path = folder / name if folder.is_dir() else _cached(model, revision, name)
    if path is None:
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _cached(model: str, revision: str | None, name: str) -> Path | None:
    """Return the path of a file in the Hugging Face cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(model, name, revision=revision)
    except HFValidationError:
        return None
    return Path(path) if isinstance(path, str) else None
