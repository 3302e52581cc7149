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


def contrast_likelihood(user: Tensor, base: Tensor, alpha: float, tau: float) -> Tensor:
    """Return log-probabilities that the contrast gives to *every* token, so that texts have an NLL.

    V_head keeps the probability that the personal model gives it, shared out among its tokens by
    `contrast`; tokens outside keep their own. At α = 0 this is the personal model. The NLL of a
    text is convex in α.

    Args:
        user: float32 log-probabilities `(R, V)` of the personal model.
        base: the base model's, the same shape.
        alpha: α ≥ 0.
        tau: 0 < τ ≤ 1.
    """
    inside = user >= user.amax(dim=-1, keepdim=True) + math.log(tau)
    mass = user.masked_fill(~inside, -math.inf).logsumexp(dim=-1, keepdim=True)
    return torch.where(inside, mass + contrast_log_probs(user, base, alpha, tau), user)
