"""The requests that are decoded together: rows, their cache, and one step for all of them.

A contrastive request has two rows in one forward, a personal one with the user's adapter and a base one without; α = 0 or no
adapter leaves one. Rows with an adapter come first (`lora.py`), each part in the order of the requests.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from langchain_cope.engine import cache as kv
from langchain_cope.engine.attention import pack_decode_attention
from langchain_cope.engine.contrast import check_alpha_tau, contrast
from langchain_cope.engine.linear import hasten_pairs
from langchain_cope.engine.lora import Adapter, LoraRows
from langchain_cope.engine.sampling import Sampling, choose_tokens


@dataclass(frozen=True)
class Request:
    """One prompt to answer. Raises ``ValueError`` for α or τ out of range."""

    prompt: Sequence[int]
    """Token ids, the generation prompt included."""
    adapter: Adapter | None = None
    """None: the base alone."""
    alpha: float = 0.1
    tau: float = 0.1
    sampling: Sampling = field(default_factory=Sampling)
    deadline: float | None = None
    """By ``time.monotonic()``; a request that is not done by then ends with ``TimeoutError``."""
    logprobs: bool = False
    """Report log π_user and log π_base of every token; this takes two rows even at α = 0."""

    def __post_init__(self) -> None:
        check_alpha_tau(self.alpha, self.tau)

    @property
    def contrastive(self) -> bool:
        """Whether the base's distribution enters the choice of tokens."""
        return self.adapter is not None and self.alpha > 0

    @property
    def two_rows(self) -> bool:
        """Whether the base is computed beside the adapter."""
        return self.adapter is not None and (self.alpha > 0 or self.logprobs)

    @property
    def num_rows(self) -> int:
        """Rows in the batch."""
        return 2 if self.two_rows else 1


@dataclass(frozen=True)
class TokenLogprobs:
    """How one token came about, in nats. ``reward`` is log p_user − α · log p_base, the paper's implicit reward."""

    token_id: int
    text: str
    log_p_user: float
    log_p_base: float
    reward: float


@dataclass(eq=False)
class Running:
    """A request in the batch and its answer so far."""

    request: Request
    ids: list[int] = field(default_factory=list)
    num_changed: int = 0
    logprobs: list[tuple[float, float]] = field(default_factory=list)
    """Per token (log p_user, log p_base), where the request asks for it."""

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.request.prompt) + len(self.ids)


class Batch:
    """Rows in flight over one model tree. Not thread-safe: the engine's thread owns it. Raises ``ModelError`` as `kv.new_cache`."""

    def __init__(self, model: PreTrainedModel) -> None:
        kv.new_cache(model)  # refuses what cannot be served before anyone asks
        self._model = model
        pack_decode_attention(model)
        hasten_pairs(model)
        self._lora = LoraRows(model)
        self._accepts = inspect.signature(model.forward).parameters.keys()
        self.running: list[Running] = []
        self._cache: DynamicCache | None = None
        self._padding: list[int] = []
        """Positions of padding left of each row."""
        self._layout = _Layout([], model.device)

    @property
    def num_rows(self) -> int:
        """Rows in flight."""
        return len(self._padding)

    def join(self, requests: Sequence[Running]) -> None:
        """Process the prompts of ``requests`` in one forward, give each its first token and merge them into the batch."""
        layout = _Layout(requests, self._model.device)
        longest = max(r.length for r in requests)
        rows = [requests[i] for i in layout.row_request]
        padding = [longest - row.length for row in rows]
        ids = torch.tensor([[0] * pad + list(row.request.prompt) for pad, row in zip(padding, rows, strict=True)])
        cache = kv.new_cache(self._model)
        self._lora.set(layout.adapters)
        logits = self._forward(ids, padding, cache, total=longest)
        self._choose(logits, requests, layout)
        self._merge(requests, layout, cache, padding)

    def step(self) -> None:
        """One more token for every request in flight."""
        assert self._cache is not None
        layout = self._layout
        last = torch.tensor([self.running[i].ids[-1] for i in layout.row_request]).unsqueeze(1)
        self._lora.set(layout.adapters)
        logits = self._forward(last, self._padding, self._cache, total=kv.length(self._cache) + 1)
        self._choose(logits, self.running, layout)

    def drop(self, gone: Sequence[Running]) -> None:
        """Let these requests leave; the others' rows close up."""
        left = [r for r in self.running if r not in gone]
        if not left or self._cache is None:
            self.clear()
            return
        layout = _Layout(left, self._model.device)
        order = _reorder(self._layout, self.running, layout, left)
        self._padding = [self._padding[i] for i in order]
        shared = min(self._padding)
        kv.keep(self._cache, torch.tensor(order, device=self._model.device), drop_left=shared)
        self._padding = [pad - shared for pad in self._padding]
        self.running, self._layout = left, layout

    def clear(self) -> None:
        """Forget every request and the cache."""
        self.running, self._cache, self._padding = [], None, []
        self._layout = _Layout([], self._model.device)
        self._lora.set([])

    def log_probs(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], adapter: Adapter | None
    ) -> list[Tensor]:
        """Per (prompt, completion) the log-probability ``(len(completion),)`` of each completion token, float32, in one forward."""
        longest = max(len(p) + len(c) for p, c in sequences)
        kept = max(len(c) for _, c in sequences) + 1
        padding = [longest - len(p) - len(c) for p, c in sequences]
        ids = torch.tensor([[0] * pad + [*p, *c] for pad, (p, c) in zip(padding, sequences, strict=True)])
        self._lora.set([] if adapter is None else [adapter] * len(sequences))
        logits = self._forward(ids, padding, None, total=longest, kept=kept)
        targets = ids[:, 1 - kept :].to(logits.device)
        chosen = torch.log_softmax(logits[:, :-1].float(), dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return [row[row.shape[0] - len(c) :].cpu() for row, (_, c) in zip(chosen, sequences, strict=True)]

    def _forward(
        self, ids: Tensor, padding: Sequence[int], cache: DynamicCache | None, *, total: int, kept: int = 1
    ) -> Tensor:
        """Logits ``(rows, V)`` of the last position, or ``(rows, kept, V)``; ``total`` counts the positions seen afterwards."""
        device = self._model.device
        pads = torch.tensor(padding, device=device).unsqueeze(1)
        positions = torch.arange(total - ids.shape[1], total, device=device).unsqueeze(0) - pads
        inputs: dict[str, Any] = {"input_ids": ids.to(device), "use_cache": cache is not None}
        if cache is not None:
            inputs["past_key_values"] = cache
        if any(padding):
            inputs["attention_mask"] = (torch.arange(total, device=device).unsqueeze(0) >= pads).long()
        if "position_ids" in self._accepts:
            # Left to the model, padded rows would start at their padding's length (GPT-2's logits are off by 0.6 then).
            inputs["position_ids"] = positions.clamp_min(0)
        if "logits_to_keep" in self._accepts:
            inputs["logits_to_keep"] = kept
        self._lora.shape = (ids.shape[0], ids.shape[1])
        logits: Tensor = self._model(**inputs).logits
        return logits[:, -1] if kept == 1 else logits[:, -kept:]

    def _choose(self, logits: Tensor, requests: Sequence[Running], layout: "_Layout") -> None:
        """Append the next token to every request. ``logits``: ``(rows, V)``."""
        personal = layout.personal(logits)
        scores = layout.scores(personal, logits)
        samplings = [r.request.sampling for r in requests]
        tokens = choose_tokens(scores, samplings, [[*r.request.prompt, *r.ids] if s.repetition_penalty != 1 else []
                                                   for r, s in zip(requests, samplings, strict=True)],
                               [len(r.ids) for r in requests])  # fmt: skip
        changed = scores.argmax(-1) != personal.argmax(-1) if layout.pairs else torch.zeros_like(tokens)
        found = torch.stack([tokens, changed.to(tokens.dtype)]).tolist()  # the step's one wait for the device
        for request, token, differs in zip(requests, *found, strict=True):
            request.ids.append(token)
            request.num_changed += differs and request.request.contrastive
        self._report(logits, requests, layout)

    def _report(self, logits: Tensor, requests: Sequence[Running], layout: "_Layout") -> None:
        for index, running in enumerate(requests):
            if running.request.logprobs:
                user_row, base_row = layout.rows_of(index)
                both = torch.log_softmax(logits[[user_row, base_row]].float(), dim=-1)[:, running.ids[-1]].tolist()
                running.logprobs.append((both[0], both[1]))

    def _merge(self, requests: Sequence[Running], layout: "_Layout", cache: DynamicCache, padding: list[int]) -> None:
        if self._cache is None:
            self.running, self._layout, self._cache, self._padding = list(requests), layout, cache, padding
            return
        ours, theirs = kv.length(self._cache), kv.length(cache)
        total = max(ours, theirs)
        self._padding = [p + total - ours for p in self._padding] + [p + total - theirs for p in padding]
        kv.merge(self._cache, cache)
        everyone = [*self.running, *requests]
        merged = _Layout(everyone, self._model.device)
        order = _reorder(self._layout, self.running, merged, everyone, (layout, requests))
        kv.keep(self._cache, torch.tensor(order, device=self._model.device))
        self._padding = [self._padding[i] for i in order]
        self.running, self._layout = everyone, merged


class _Layout:
    """Which row is whose: computed when the batch changes, used at every step."""

    def __init__(self, requests: Sequence[Running], device: torch.device) -> None:
        wants = [r.request for r in requests]
        with_adapter = [i for i, r in enumerate(wants) if r.adapter is not None]
        without = [i for i, r in enumerate(wants) if r.adapter is None or r.two_rows]
        self.row_request = with_adapter + without
        self.adapters = [adapter for i in with_adapter if (adapter := wants[i].adapter) is not None]
        self._user_row = {request: row for row, request in enumerate(with_adapter)}
        self._base_row = {request: len(with_adapter) + row for row, request in enumerate(without)}
        self._personal_rows = torch.tensor(
            [self._user_row.get(i, self._base_row.get(i, 0)) for i in range(len(wants))],
            dtype=torch.long,
            device=device,
        )
        self.pairs = [i for i, r in enumerate(wants) if r.contrastive]
        self._pair_rows = torch.tensor([self._base_row[i] for i in self.pairs], dtype=torch.long, device=device)
        self._alpha = torch.tensor([[wants[i].alpha] for i in self.pairs], device=device)
        self._tau = torch.tensor([[wants[i].tau] for i in self.pairs], device=device)

    def rows_of(self, request: int) -> tuple[int, int]:
        """(personal row, base row) of a request; twice the same row where the base is the personal model."""
        base = self._base_row[request]
        return self._user_row.get(request, base), base

    def personal(self, logits: Tensor) -> Tensor:
        """``(requests, V)``: the row with the adapter, or the only one."""
        everyone_has_one = len(self.adapters) == len(self._personal_rows)
        return logits[: len(self.adapters)] if everyone_has_one else logits[self._personal_rows]

    def scores(self, personal: Tensor, logits: Tensor) -> Tensor:
        """``(requests, V)`` log-probabilities: contrasted where a request is, else the personal row's own."""
        if len(self.pairs) == personal.shape[0]:
            return contrast(personal, logits[len(self.pairs) :], self._alpha, self._tau)
        scores = torch.log_softmax(personal.float(), dim=-1)
        if self.pairs:
            scores[self.pairs] = contrast(personal[self.pairs], logits[self._pair_rows], self._alpha, self._tau)
        return scores

    def keys(self, requests: Sequence[Running]) -> list[tuple[int, bool]]:
        """A name for each row that outlives the layout: (request, with its adapter or not)."""
        return [(id(requests[i]), row < len(self.adapters)) for row, i in enumerate(self.row_request)]


def _reorder(
    old: _Layout,
    old_requests: Sequence[Running],
    new: _Layout,
    new_requests: Sequence[Running],
    appended: tuple[_Layout, Sequence[Running]] | None = None,
) -> list[int]:
    """Where each row of the new layout stands among the rows of the old one, followed by those appended."""
    have = old.keys(old_requests) + (appended[0].keys(appended[1]) if appended else [])
    place = {key: row for row, key in enumerate(have)}
    return [place[key] for key in new.keys(new_requests)]
