"""An independent answer to compare the engine with.

Plain forwards of transformers and peft, no cache, no batch, then float64.

Nothing of `langchain_cope.engine` is used here.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

TIE = 1e-4  # scores and distances to the τ line, in nats, closer than this are a tie


class Reference:
    """A base of its own in memory, with one user's adapter by peft."""

    def __init__(
        self, base: Path, adapter: Path | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
        if adapter is not None:
            self.model = PeftModel.from_pretrained(self.model, adapter).eval()

    @torch.no_grad()
    def log_probs(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Return (user, base) log-probabilities, float64 `(len(ids), V)`, from two plain forwards.

        Row i is the distribution after ids[: i + 1].
        """
        both = torch.tensor([ids])
        user = self.model(input_ids=both, use_cache=False).logits[0].double().log_softmax(-1)
        if not isinstance(self.model, PeftModel):
            return user, user
        with self.model.disable_adapter():
            base = self.model(input_ids=both, use_cache=False).logits[0].double().log_softmax(-1)
        return user, base

    @staticmethod
    @torch.no_grad()
    def next_token(model: torch.nn.Module, prompt: list[int]) -> int:
        """Return the likeliest next token of a plain forward."""
        ids = torch.tensor([prompt], device=next(model.parameters()).device)
        return int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())


def scores(user: Tensor, base: Tensor, alpha: float, tau: float) -> Tensor:
    """Return scores of the contrast for float64 log-probabilities `(..., V)`; α = 0 has no head."""
    if alpha == 0:
        return user
    head = user.exp() >= tau * user.exp().amax(-1, keepdim=True)
    return torch.where(head, user - alpha * base, -math.inf).log_softmax(-1)


def step_by_step(
    reference: Reference, prompt: list[int], alpha: float, tau: float, num_tokens: int
) -> list[int]:
    """Decode greedily as one would write it first: two forwards a step over everything so far."""
    ids = list(prompt)
    for _ in range(num_tokens):
        user, base = reference.log_probs(ids)
        ids.append(int(scores(user[-1], base[-1], alpha, tau).argmax()))
    return ids[len(prompt) :]


@dataclass
class Tally:
    """The result of comparisons."""

    num_tokens: int = 0
    num_ties: int = 0
    num_changed: int = 0
    """Tokens whose contrastive choice is not the personal model's own."""
    differences: list[str] = field(default_factory=list)

    def compare(
        self,
        reference: Reference,
        prompt: list[int],
        answer: list[int],
        alpha: float,
        tau: float,
        what: str,
    ) -> None:
        """Hold every token of `answer` against the reference's choice after the same tokens."""
        user, base = (
            rows[len(prompt) - 1 : -1] for rows in reference.log_probs([*prompt, *answer])
        )
        expected = scores(user, base, alpha, tau)
        for step, token in enumerate(answer):
            self.num_tokens += 1
            best = int(expected[step].argmax())
            if best != int(user[step].argmax()):
                self.num_changed += 1
            if best == token:
                continue
            gap = float(expected[step, best] - expected[step, token])
            from_line = math.inf
            if alpha:
                line = user[step].amax() + math.log(tau)
                from_line = (user[step] - line).abs().amin().item()
            if gap <= TIE or from_line <= TIE:
                self.num_ties += 1
            else:
                self.differences.append(
                    f"{what}, step {step}: {token} and not {best}, gap {gap:.2e}"
                )
