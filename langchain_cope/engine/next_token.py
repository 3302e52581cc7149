"""From logits to the next tokens of all requests, in one go.

Grammars mask the personal model's logits, the contrast with the base scores what is left, and
sampling chooses from the scores.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from langchain_cope.engine.answer import ActiveRequest, NextToken
from langchain_cope.engine.decoding.adaptive import divergence
from langchain_cope.engine.decoding.contrast import contrast_log_probs
from langchain_cope.engine.decoding.sampling import choose_tokens

TOGETHER = 16  # choices, about


@dataclass(frozen=True)
class TokenChoice:
    """Which rows of the logits one request's next token comes from."""

    active: ActiveRequest
    personal: int
    """Index of the personal model's logits."""
    base: int
    """Index of the base's logits; the same one where the base is the personal model."""
    drafted: Sequence[int] = ()
    """Tokens that are taken to follow the answer so far."""


class _Step(NamedTuple):
    """How the scores of a contrastive choice came about."""

    acts: bool
    """Whether α acts."""
    divergence: float = 0.0
    """Of the two rows, in nats, where α depends on it."""
    likeliest: int = -1
    """The personal model's own token, where α depends on it."""


_NO_CONTRAST = _Step(acts=False)


def choose(logits: Tensor, choices: Sequence[TokenChoice]) -> list[NextToken]:
    """Return the next token of every choice; `logits` is `(N, V)`.

    Choices of one request follow each other.
    """
    chosen = []
    for together in _parts(choices):
        chosen += _choose(logits, together)
    return chosen


def _parts(choices: Sequence[TokenChoice]) -> Iterator[list[TokenChoice]]:
    """Yield the choices, a few requests at a time: their scores are still in a CPU's cache."""
    part: list[TokenChoice] = []
    for _, own in groupby(choices, key=lambda choice: id(choice.active)):
        part += own
        if len(part) >= TOGETHER:
            yield part
            part = []
    if part:
        yield part


def _choose(logits: Tensor, choices: Sequence[TokenChoice]) -> list[NextToken]:
    personal = _allowed(_rows(logits, [choice.personal for choice in choices]), choices)
    scores, steps_of = _scores(logits, personal, choices)
    samplings = [choice.active.request.sampling for choice in choices]
    seen = [
        [*choice.active.base_tokens, *choice.drafted] if sampling.repetition_penalty != 1 else []
        for choice, sampling in zip(choices, samplings, strict=True)
    ]
    steps = [len(choice.active.answer_ids) + len(choice.drafted) for choice in choices]
    tokens = choose_tokens(scores, samplings, seen, steps)
    differs = _differs(scores, personal, tokens, choices)
    forced = [index for index, choice in enumerate(choices) if choice.active.forced is not None]
    if forced:
        given = [choices[index].active.forced for index in forced]
        tokens[forced] = torch.tensor(given, device=tokens.device)
    # One entry that is no number makes all scores of its row NaN.
    unusable = scores.gather(1, tokens.unsqueeze(1)).squeeze(1).isnan()
    flags = torch.stack([differs, unusable]).to(tokens.dtype)
    chosen = torch.cat([tokens.unsqueeze(0), flags]).tolist()
    logprobs = _logprobs(logits, scores, tokens, choices)
    steps_by_choice = [steps_of.get(index, _NO_CONTRAST) for index in range(len(choices))]
    return [
        NextToken(
            token,
            bool(differs) and choice.active.request.contrastive,
            steps_by_choice[index].acts,
            steps_by_choice[index].divergence,
            logprobs.get(index),
            _whose(logits, choice) if unusable else "",
        )
        for index, (choice, token, differs, unusable) in enumerate(
            zip(choices, *chosen, strict=True)
        )
    ]


def _rows(logits: Tensor, indices: Sequence[int]) -> Tensor:
    """Return those rows of `logits`; neighbours are no copy."""
    first = indices[0]
    if list(indices) == list(range(first, first + len(indices))):
        return logits[first : first + len(indices)]
    return logits[indices]


def _differs(
    scores: Tensor, personal: Tensor, tokens: Tensor, choices: Sequence[TokenChoice]
) -> Tensor:
    """Return `(choices,)`: whether the contrast's likeliest token is not the personal model's."""
    requests = [choice.active.request for choice in choices]
    if not any(request.contrastive for request in requests):
        return torch.zeros_like(tokens, dtype=torch.bool)
    plain = all(
        r.sampling.temperature == 0 and r.sampling.repetition_penalty == 1 for r in requests
    )
    likeliest = tokens if plain else scores.argmax(-1)
    return likeliest != personal.argmax(-1)


def _allowed(personal: Tensor, choices: Sequence[TokenChoice]) -> Tensor:
    """Return `personal` `(choices, V)` with −inf where a request's grammar forbids a token."""
    indices, masks = [], []
    for index, choice in enumerate(choices):
        if choice.active.constraint is not None:
            indices.append(index)
            masks.append(choice.active.constraint.mask(choice.drafted))
    if indices:
        forbidden = ~torch.stack(masks).to(personal.device)
        personal = personal.clone()  # it may be part of the logits, which others read
        personal[indices] = personal[indices].masked_fill(forbidden, -torch.inf)
    return personal


def _scores(
    logits: Tensor, personal: Tensor, choices: Sequence[TokenChoice]
) -> tuple[Tensor, dict[int, _Step]]:
    """Return log-probabilities `(choices, V)`: contrasted where a request is, else personal.

    Beside them, how they came about, by the index of each contrastive choice.
    """
    contrasted = [
        index for index, choice in enumerate(choices) if choice.active.request.contrastive
    ]
    user = torch.log_softmax(personal.float(), dim=-1)
    if not contrasted:
        return user, {}
    asking = [choices[index] for index in contrasted]
    base = torch.log_softmax(_rows(logits, [each.base for each in asking]).float(), dim=-1)
    own = user if len(contrasted) == len(choices) else user[contrasted]
    steps = _steps(own, base, asking)
    contrasts = [
        (each.active.request.contrast.alpha, each.active.request.contrast.tau)
        if step.acts
        else (0.0, 0.0)
        for each, step in zip(asking, steps, strict=True)
    ]
    strengths = torch.tensor(contrasts, dtype=own.dtype, device=own.device)
    scores = contrast_log_probs(own, base, strengths[:, :1], strengths[:, 1:])
    _go_on_where_the_adapter_does(scores, asking, steps)
    if own is not user:
        user[contrasted] = scores
        scores = user
    return scores, dict(zip(contrasted, steps, strict=True))


def _steps(user: Tensor, base: Tensor, choices: Sequence[TokenChoice]) -> list[_Step]:
    """Return per choice how its scores come about, from log-probabilities `(choices, V)`.

    Choices of one request follow each other, each resting on one drafted token more.
    """
    steps = [_Step(acts=True)] * len(choices)
    rows = [row for row, choice in enumerate(choices) if choice.active.adaptive is not None]
    if not rows:
        return steps
    users, bases = (each if len(rows) == len(choices) else each[rows] for each in (user, base))
    divergences, likeliest = divergence(users, bases).tolist(), users.argmax(-1).tolist()
    since_push: dict[ActiveRequest, list[float]] = {}
    for row, found, token in zip(rows, divergences, likeliest, strict=True):
        active = choices[row].active
        so_far = since_push.setdefault(active, [])
        so_far.append(found)
        assert active.adaptive is not None
        steps[row] = _Step(active.adaptive.acts(so_far, choices[row].drafted, token), found, token)
    return steps


def _go_on_where_the_adapter_does(
    scores: Tensor, choices: Sequence[TokenChoice], steps: Sequence[_Step]
) -> None:
    """Take the end of the turn out of `scores` where the adaptive contrast alone would choose it.

    The personal model's likeliest token does not end the turn there, and it is always in the head:
    a token is left.
    """
    rows = [
        row
        for row, choice in enumerate(choices)
        if choice.active.adaptive is not None
        and steps[row].acts
        and steps[row].likeliest not in choice.active.eos_ids
    ]
    if not rows:
        return
    best = (scores if len(rows) == len(scores) else scores[rows]).argmax(-1).tolist()
    for row, token in zip(rows, best, strict=True):
        if token in choices[row].active.eos_ids:
            scores[row, list(choices[row].active.eos_ids)] = -torch.inf
            scores[row] = torch.log_softmax(scores[row], dim=-1)


def _whose(logits: Tensor, choice: TokenChoice) -> Literal["personal", "base"]:
    """Return whose logits hold NaN or infinity."""
    are_numbers = bool((logits[choice.personal] < torch.inf).all())  # −inf is no likelihood at all
    return "base" if are_numbers else "personal"


def _logprobs(
    logits: Tensor, scores: Tensor, tokens: Tensor, choices: Sequence[TokenChoice]
) -> dict[int, tuple[float, float]]:
    """Return (log p_user, log p_base) of `tokens`, in nats, by the choices that ask for it."""
    asking = [index for index, choice in enumerate(choices) if choice.active.request.logprobs]
    known = {
        index
        for index in asking
        # Of the base alone, by no grammar held back: the scores are its log-probabilities.
        if choices[index].personal == choices[index].base
        and choices[index].active.constraint is None
    }
    by_choice: dict[int, tuple[float, float]] = {}
    if known:
        found = scores.gather(1, tokens.unsqueeze(1)).squeeze(1).tolist()
        by_choice = {index: (found[index], found[index]) for index in known}
    asking = [index for index in asking if index not in known]
    if not asking:
        return by_choice
    of_rows = sorted({row for i in asking for row in (choices[i].personal, choices[i].base)})
    log_probs = torch.log_softmax(logits[of_rows].float(), dim=-1)
    place = {row: index for index, row in enumerate(of_rows)}
    users, bases = (
        log_probs[[place[row] for row in rows], tokens[asking]].tolist()
        for rows in (
            [choices[index].personal for index in asking],
            [choices[index].base for index in asking],
        )
    )
    return by_choice | dict(zip(asking, zip(users, bases, strict=True), strict=True))
