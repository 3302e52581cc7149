"""The contrastive rule as a function on tensors: two rows of logits in, one row of scores out.

No model and no tokenizer in sight. Everything is computed in float32, whatever the logits' dtype.
"""

import math

import torch
from torch import Tensor


def contrast(
    user_logits: Tensor, base_logits: Tensor, alpha: float | Tensor, tau: float | Tensor
) -> Tensor:
    """Return the scores of the next token under contrasted preferences, as log-probabilities.

    `score(v) = log π_user(v) − α · log π_base(v)` for every v in
    `V_head = {v : π_user(v) ≥ τ · max_w π_user(w)}`, −inf elsewhere, then renormalised over V_head.

    Source of the rule: Bu, Jung, Kang, Kim, "Personalized LLM Decoding via Contrasting Personal
    Preference", EMNLP 2025.

    Args:
        user_logits: `(R, V)` or `(V,)`, the personal model's logits. An entry of −inf (from a
            grammar's mask, say) stays −inf.
        base_logits: the same shape, the base model's logits, all finite.
        alpha: α ≥ 0, a number or a tensor `(R, 1)`.
        tau: 0 < τ ≤ 1, likewise. The likeliest token is always in V_head, so the set is never
            empty.

    Returns:
        float32, the shape of `user_logits`.
    """
    user = torch.log_softmax(user_logits.float(), dim=-1)
    base = torch.log_softmax(base_logits.float(), dim=-1)
    return contrast_log_probs(user, base, alpha, tau)


def contrast_log_probs(
    user: Tensor, base: Tensor, alpha: float | Tensor, tau: float | Tensor
) -> Tensor:
    """Do as `contrast`, of float32 log-probabilities. In a tensor τ may be 0: every token stays."""
    log_tau = torch.log(tau) if isinstance(tau, Tensor) else math.log(tau)
    outside = user < user.amax(dim=-1, keepdim=True) + log_tau
    return torch.log_softmax((user - alpha * base).masked_fill_(outside, -math.inf), dim=-1)
