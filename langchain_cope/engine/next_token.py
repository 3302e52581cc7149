"""From logits to the next tokens of all requests, in one go."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from langchain_cope.engine.decoding.contrast import contrast
from langchain_cope.engine.decoding.sampling import choose_tokens
from langchain_cope.engine.request import Chosen, Running


@dataclass(frozen=True)
class Ask:
    """One token to choose."""

    running: Running
    personal: int
    """Index of the personal model's logits."""
    base: int
    """Of the base's; the same where it is the personal model."""
    drafted: Sequence[int] = ()
    """Tokens that are taken to follow the answer so far."""


def choose(logits: Tensor, asks: Sequence[Ask]) -> list[Chosen]:
    """The next token of every ask. ``logits``: ``(N, V)``."""
    personal = _allowed(logits[[ask.personal for ask in asks]], asks)
    scores = _scores(logits, personal, asks)
    samplings = [ask.running.request.sampling for ask in asks]
    seen = [
        [*a.running.tokens, *a.drafted] if s.repetition_penalty != 1 else []
        for a, s in zip(asks, samplings, strict=True)
    ]
    steps = [len(ask.running.ids) + len(ask.drafted) for ask in asks]
    tokens = choose_tokens(scores, samplings, seen, steps)
    changed = scores.argmax(-1) != personal.argmax(-1)
    found = torch.stack(
        [tokens, changed.to(tokens.dtype)]
    ).tolist()  # the step's one wait for the device
    return [
        Chosen(
            token, bool(differs) and ask.running.request.contrastive, _logprobs(logits, ask, token)
        )
        for ask, token, differs in zip(asks, *found, strict=True)
    ]


def _allowed(personal: Tensor, asks: Sequence[Ask]) -> Tensor:
    """``personal`` ``(asks, V)`` with −inf where a request's grammar does not let the answer go."""
    held = [(place, ask) for place, ask in enumerate(asks) if ask.running.constraint is not None]
    if not held:
        return personal
    masks = torch.stack(
        [ask.running.constraint.mask(ask.drafted) for _, ask in held if ask.running.constraint]
    )
    places = [place for place, _ in held]
    personal[places] = personal[places].masked_fill(~masks.to(personal.device), -torch.inf)
    return personal


def _scores(logits: Tensor, personal: Tensor, asks: Sequence[Ask]) -> Tensor:
    """``(asks, V)`` log-probabilities: contrasted where a request is, else the personal model's own."""
    pairs = [place for place, ask in enumerate(asks) if ask.running.request.contrastive]
    if not pairs:
        return torch.log_softmax(personal.float(), dim=-1)
    requests = [asks[place].running.request for place in pairs]
    alpha = torch.tensor([[r.contrast.alpha] for r in requests], device=logits.device)
    tau = torch.tensor([[r.contrast.tau] for r in requests], device=logits.device)
    base = logits[[asks[place].base for place in pairs]]
    if len(pairs) == len(asks):
        return contrast(personal, base, alpha, tau)
    scores = torch.log_softmax(personal.float(), dim=-1)
    scores[pairs] = contrast(personal[pairs], base, alpha, tau)
    return scores


def _logprobs(logits: Tensor, ask: Ask, token: int) -> tuple[float, float] | None:
    if not ask.running.request.logprobs:
        return None
    user, base = torch.log_softmax(logits[[ask.personal, ask.base]].float(), dim=-1)[
        :, token
    ].tolist()
    return user, base
