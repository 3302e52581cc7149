"""How many tokens a base can see, from its configuration."""

from collections.abc import Mapping
from typing import Any

_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len")
_REAL = 10**9  # tokenizers without a limit name a larger number


def context_of(config: Mapping[str, Any], tokenizer_limit: Any) -> int | None:
    """The smaller of what the model's (text) configuration and the tokenizer say, where they say something real."""
    limits = [*(config.get(name) for name in _FIELDS), tokenizer_limit]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope"):
        # Beyond this length such a model turns every row of a batch by other angles: one user's prompt would change all answers.
        limits.append(
            rope.get("original_max_position_embeddings")
            or config.get("original_max_position_embeddings")
        )
    return min(
        (int(n) for n in limits if isinstance(n, (int, float)) and 0 < n < _REAL), default=None
    )
