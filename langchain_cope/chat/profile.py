"""What a base can do, read from its files without loading it: LangChain's model profile."""

import json
from pathlib import Path
from typing import Any

from langchain_core.language_models import ModelProfile

from langchain_cope.engine import can_constrain, context_of

_STARTER = Path(__file__).parents[1] / "starter"


def profile_of(model: str, revision: str | None, max_tokens: int) -> ModelProfile | None:
    """The profile of a local base, or of one in the Hugging Face cache; None where its files are not here."""
    config = _read(model, revision, "config.json")
    if config is None:
        return None
    tokenizer = _read(model, revision, "tokenizer_config.json") or {}
    text: dict[str, Any] = config.get("text_config") or config
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
    if context := context_of(text, tokenizer.get("model_max_length")):
        profile["max_input_tokens"] = context - 1  # at least one is left for the answer
    return profile


def _read(model: str, revision: str | None, name: str) -> dict[str, Any] | None:
    folder = _STARTER if model == "starter" else Path(model).expanduser()
    path: Any = folder / name if folder.is_dir() else _cached(model, revision, name)
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _cached(model: str, revision: str | None, name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(model, name, revision=revision)
    except HFValidationError:
        return None
    return path if isinstance(path, str) else None
