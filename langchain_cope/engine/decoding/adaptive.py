"""When the contrast of one answer acts, where it adapts to what the two rows say.

Where adapter and base agree there is nothing to contrast: the prompt is unlike what the user wrote.
How far apart they are is the Jensen-Shannon divergence of their distributions, and the contrast
acts while its mean over the answer is large enough. It steps back in spans that must be exact.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from langchain_cope.engine.decoding.exact import is_exact, names_in

_TINY = 1e-37  # of a probability: its logarithm is finite, and times 0 it is 0


def divergence(user: Tensor, base: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of two distributions, in nats: from 0 to log 2.

    Args:
        user: `(R, V)` or `(V,)` log-probabilities, all finite.
        base: the same shape.

    Returns:
        `(R,)` or a scalar, over the whole vocabulary.
    """
    if user.device.type == "cpu" and user.ndim == 2:  # one row at a time stays in its cache
        return torch.stack([divergence(*rows) for rows in zip(user, base, strict=True)])
    p, q = user.exp(), base.exp()
    both = p + q
    entropies = (p.mul_(user) + q.mul_(base)).sum(-1)
    return math.log(2) + (entropies - (both.clamp_min(_TINY).log() * both).sum(-1)) / 2


class AdaptiveContrast:
    """Decides for one answer, token by token, whether the contrast acts."""

    def __init__(
        self, min_divergence: float, prompt: str, token_text: Callable[[int], str]
    ) -> None:
        """Start before the first token.

        Args:
            min_divergence: mean divergence of the answer's steps from which the contrast acts.
            prompt: its text, from which names and copies are told.
            token_text: returns the text that a token adds.
        """
        self._min_divergence = min_divergence
        self._prompt = prompt
        self._names = names_in(prompt)
        self._token_text = token_text
        self._answer = ""
        self._total = 0.0
        self._num_steps = 0

    @property
    def mean_divergence(self) -> float:
        """Mean over the answer's steps, in nats; 0 before the first."""
        return self._total / self._num_steps if self._num_steps else 0.0

    def acts(self, divergences: Sequence[float], drafted: Sequence[int], likeliest: int) -> bool:
        """Tell whether the contrast acts on the choice of the next token.

        Args:
            divergences: of the steps since the last `push`, that of this choice included.
            drafted: tokens that are taken to follow the answer so far, one for each earlier step.
            likeliest: the personal model's own next token.
        """
        mean = (self._total + sum(divergences)) / (self._num_steps + len(divergences))
        if not mean >= self._min_divergence:
            return False
        answer = self._answer + "".join(map(self._token_text, drafted))
        return not is_exact(answer, self._token_text(likeliest), self._prompt, self._names)

    def push(self, token: int, divergence: float) -> None:
        """Go on with `token`, the answer's next one."""
        self._answer += self._token_text(token)
        self._total += divergence
        self._num_steps += 1
