"""How many tokens a base can see, from its configuration. Knows no torch."""

from collections.abc import Mapping
from typing import Any

_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len")
_NO_LIMIT = 10**9  # tokenizers without a limit name a larger number


def context_of(config: Mapping[str, Any], tokenizer_limit: Any) -> int | None:
    """Return the number of tokens that a base can see: the smallest limit that is a real one.

    Args:
        config: the model's (text) configuration.
        tokenizer_limit: the tokenizer's `model_max_length`.

    Returns:
        None where neither names a real limit.
    """
    limits = [config.get(name) for name in _FIELDS]
    limits.append(tokenizer_limit)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope"):
        # Beyond this length such a model rotates every row of a batch by other angles: one user's
        # prompt would change all answers.
        name = "original_max_position_embeddings"
        limits.append(rope.get(name) or config.get(name))
    real = [int(n) for n in limits if isinstance(n, (int, float)) and 0 < n < _NO_LIMIT]
    return min(real, default=None)
