"""The requests that are answered together: one prefill or one decoding step for all of them.

A contrastive request has two rows in one forward, a personal one with the user's adapter and a base
one without; α = 0 or no adapter leaves one. A request is first in `prefilling`, where its prompt is
read piece by piece; with its first token its rows move over to `decoding`.
"""

import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from langchain_cope.engine.adapter import Adapter, low_rank_dtype
from langchain_cope.engine.answer import ActiveRequest, NextToken
from langchain_cope.engine.base.kept_order import matmul_order
from langchain_cope.engine.decoding.speculation import MAX_DRAFT, PromptLookup, Speculation
from langchain_cope.engine.device import free_bytes, is_out_of_memory
from langchain_cope.engine.forward.choose import choose_forward
from langchain_cope.engine.forward.kv_cache import KeyValues, layer_shapes
from langchain_cope.engine.forward.lora_rows import LoraRows
from langchain_cope.engine.forward.packed_weights import BlockSource
from langchain_cope.engine.next_token import TokenChoice, choose
from langchain_cope.engine.options import EngineOptions
from langchain_cope.engine.prefix_cache import BLOCK, PrefixCache, num_shared
from langchain_cope.engine.rows import Row, Rows

MIN_COLUMNS = 16  # tokens of a prompt that are read at a time, at least
LOOKUP_PROMPT = 4096  # newest tokens of a prompt that speculation looks in


class Batch:
    """Rows in flight over one model tree. Not thread-safe: the engine's thread owns it."""

    def __init__(
        self,
        model: PreTrainedModel,
        context: int,
        options: EngineOptions,
        block_source: BlockSource | None = None,
    ) -> None:
        """Raises ModelError, with the model's class, for an architecture that cannot be served."""
        self._context = context
        self.kv_bytes = _kv_bytes(options.kv_memory, model.device)
        """Bytes for keys and values of all rows."""
        with torch.inference_mode():
            self._shapes = layer_shapes(model)
            order = matmul_order(model)
            self.forward = choose_forward(model, self._shapes, order, block_source)
        self._like = torch.empty(0, dtype=model.dtype, device=model.device)
        self._decode_rows, self._prefill_rows = self.new_rows(), self.new_rows()
        self._speculation = Speculation() if options.speculation else None
        self.prefixes = PrefixCache(options.prefix_cache, self.bytes_per_position)
        self._shares = options.prefix_cache > 0
        self.decoding: list[ActiveRequest] = []
        """Requests that have their first token."""
        self.prefilling: list[ActiveRequest] = []
        """Requests whose prompts are being read."""
        self.num_steps = self.num_prefills = self.num_tokens = 0
        self.num_drafted = self.num_accepted = self.num_reused = self.num_prompt_tokens = 0

    @property
    def requests(self) -> list[ActiveRequest]:
        """All requests in the batch."""
        return [*self.decoding, *self.prefilling]

    @property
    def num_rows(self) -> int:
        """Rows in flight."""
        return len(self._decode_rows) + len(self._prefill_rows)

    @property
    def held_bytes(self) -> int:
        """Bytes that keys and values take now, with the beginnings that are kept."""
        caches = self._decode_rows.kv, self._prefill_rows.kv
        return sum(kv.num_bytes for kv in caches) + self.prefixes.num_bytes

    @property
    def bytes_per_position(self) -> int:
        """Bytes of keys and values of one position of one row."""
        return self._decode_rows.kv.bytes_per_position

    def new_rows(self) -> Rows:
        """Return rows of their own, with a cache of their own, to run through the same model."""
        kv = KeyValues(self._shapes, self._like.dtype, self._like.device)
        dtype = low_rank_dtype(self._like.dtype, self._like.device)
        return Rows(kv, LoraRows(self.forward.sites, self._like.to(dtype)), self._context)

    def num_bytes(self, requests: Sequence[ActiveRequest]) -> int:
        """Return the bytes of keys and values that `requests` may take together.

        Each of their rows takes room for the longest answer, and for the longest prompt.
        """
        rounded = self._decode_rows.kv.rounded
        answer = max(rounded(active.limit) for active in requests)
        prompt = max(rounded(active.length + 1) for active in requests)
        num_rows = sum(active.request.num_rows for active in requests)
        return num_rows * (answer + prompt) * self.bytes_per_position

    def is_being_read(self, active: ActiveRequest) -> bool:
        """Tell whether to wait: the prompt's beginning, or all of it, is being read for another.

        Once it is read, `admit` copies it. That it is worth the wait holds for each of its rows.
        """
        if not self._shares or not self.prefilling:
            return False
        for row in _new_rows(active):
            blocks = [] if row.offline else self.prefixes.find(row)
            at_hand = max(BLOCK * len(blocks), self._longest_copy(row)[0])
            others = self._prefill_rows.like(row)
            to_come = max(
                (num_shared(row.tokens, each.tokens, row.most_from(each)) for each in others),
                default=0,
            )
            if to_come - at_hand < BLOCK:
                return False
        return True

    def admit(self, active: ActiveRequest) -> None:
        """Take a request in: its rows are there, its prompt is to be read.

        What another row or the prefix cache holds of it is copied. Where that is all but the last
        token, the next decoding step reads that one and gives the first of the answer.
        """
        active.rows = _new_rows(active)
        copies = [self._longest_copy(row) for row in active.rows]
        is_read = all(
            length == len(row.tokens) - 1 > 0
            for row, (length, _, _) in zip(active.rows, copies, strict=True)
        )
        (self.decoding if is_read else self.prefilling).append(active)
        rows = self._decode_rows if is_read else self._prefill_rows
        self._reserve()
        for row, (length, other, source) in zip(active.rows, copies, strict=True):
            blocks = [] if row.offline else self.prefixes.find(row)
            row.length = max(length, BLOCK * len(blocks))
            if row.length == length:
                rows.add(row, source, other)
            else:
                rows.kv.fill(rows.add(row), blocks)
            self.num_reused += row.length
            self.num_prompt_tokens += len(row.tokens)
        if is_read:
            self._look_up(active)

    def prefill(self, max_tokens: int) -> int:
        """Read the next piece of every prompt in one forward of about `max_tokens` at most.

        Requests whose prompts are read whole get their first token and go on in `decoding`.

        Returns:
            The number of tokens that were read, padding included.
        """
        rows = self._prefill_rows.all()
        # Rows that are done wait for their partner; at the end they cost nothing.
        while rows and not rows[-1].missing:
            rows.pop()
        if not rows:  # read before, but memory ran out over the first tokens
            self._start_answers(list(self.prefilling))
            return 0
        missing = [row.missing for row in rows if row.missing]
        width = min(max(min(missing), MIN_COLUMNS), max(missing), max(max_tokens // len(rows), 1))
        pieces = [row.tokens[row.length : row.length + width] for row in rows]
        ends = [index for index, row in enumerate(rows) if 0 < row.missing <= width]
        logits_at = [(index, rows[index].missing - 1) for index in ends]
        logits = self._prefill_rows.forward(
            self.forward, [piece or [0] for piece in pieces], logits_at or [(0, 0)]
        )
        for row, piece in zip(rows, pieces, strict=True):
            row.length += len(piece)
        for logits_index, index in enumerate(ends):
            rows[index].logits = logits[logits_index].clone()
        self.num_prefills += 1
        self._start_answers(
            [each for each in self.prefilling if all(row.logits is not None for row in each.rows)]
        )
        return len(rows) * width

    def decode(self) -> None:
        """Give every answer its next token, or several where a draft comes true."""
        started = time.perf_counter()
        rows = self._decode_rows.all()
        drafts = self._drafts(len(rows))
        new_tokens = {
            row: [row.tokens[-1], *draft] for active, draft in drafts.items() for row in active.rows
        }
        ids = [new_tokens[row] for row in rows]
        logits_at = [(index, column) for index, new in enumerate(ids) for column in range(len(new))]
        logits = self._decode_rows.forward(self.forward, ids, logits_at)

        first: dict[Row, int] = {}  # index of the row's first logits
        num_logits = 0
        for row, new in zip(rows, ids, strict=True):
            first[row] = num_logits
            num_logits += len(new)
        choices = [
            TokenChoice(
                active,
                first[active.rows[0]] + column,
                first[active.rows[-1]] + column,
                draft[:column],
            )
            for active, draft in drafts.items()
            for column in range(len(draft) + 1)
        ]
        chosen = iter(choose(logits, choices))
        for active, draft in drafts.items():
            self._accept(active, draft, [next(chosen) for _ in range(len(draft) + 1)])
        self.num_steps += 1
        if self._speculation is not None:
            self._speculation.record_timing(
                len(rows) * max(map(len, ids)), time.perf_counter() - started
            )

    def drop(self, requests: Sequence[ActiveRequest]) -> None:
        """Let `requests` leave.

        What was computed for a finished one is kept as a beginning for later ones.
        """
        for active in requests:
            if self._speculation is not None and active.lookup is not None:
                self._speculation.update_hit_rate(active.lookup)
            keep = active.finished and active.is_number and not active.request.offline
            for row in active.rows:
                for rows in (self._decode_rows, self._prefill_rows):
                    if row in rows:  # in neither, where there was no memory to admit it
                        if keep:
                            self.prefixes.store(row, rows)
                        rows.remove(row)
            active.rows = ()
        self.decoding = [active for active in self.decoding if active not in requests]
        self.prefilling = [active for active in self.prefilling if active not in requests]
        if not self.prefilling:
            self._prefill_rows.release()
            if not self.decoding:  # else those whose prompts are being read have their room here
                self._decode_rows.release()

    def shrink(self) -> None:
        """Give up the room of those who have left."""
        if self.decoding or self.prefilling:
            self._reserve(exactly=True)

    def clear(self) -> None:
        """Forget every request and all that was kept."""
        for active in self.requests:
            active.rows = ()
        self.decoding, self.prefilling = [], []
        self._decode_rows.clear()
        self._prefill_rows.clear()
        self.prefixes.clear()

    def make_room(self, coming: Sequence[ActiveRequest], max_prompt_rows: int) -> None:
        """Make room for everyone and for those that are `coming`, where the memory has it.

        Of their prompts those that differ are read, in `max_prompt_rows` rows at most at a time.
        """
        if coming:
            prompts = {
                (id(active.request.adapter), active.request.num_rows, tuple(active.request.prompt))
                for active in coming
            }
            num_rows = sum(rows for _, rows, _ in prompts)
            try:
                self._reserve(coming, min(num_rows, max_prompt_rows), optional=True)
            except Exception as error:
                if not is_out_of_memory(error):  # else they come in one by one, as far as it goes
                    raise

    def _reserve(
        self,
        coming: Sequence[ActiveRequest] = (),
        coming_prompts: int = 0,
        *,
        exactly: bool = False,
        optional: bool = False,
    ) -> None:
        """Make room for everyone: prompts where they are read, and whole answers."""
        reading, answering = [*self.prefilling, *coming], [*self.requests, *coming]
        prompt_rows = sum(len(active.rows) for active in self.prefilling) + coming_prompts
        longest_prompt = max((active.length + 1 for active in reading), default=0)
        answer_rows = sum(active.request.num_rows for active in answering)
        longest_answer = max(active.limit for active in answering)
        sizes = [
            (self._prefill_rows.kv, prompt_rows, longest_prompt),
            (self._decode_rows.kv, answer_rows, longest_answer),
        ]
        if sum(kv.bytes_for(rows, positions) for kv, rows, positions in sizes) > self.kv_bytes:
            if optional:
                return
            exactly = True
        for kv, rows, positions in sorted(sizes, key=lambda size: size[0].bytes_for(*size[1:])):
            kv.reserve(rows, positions, exactly=exactly)

    def _longest_copy(self, row: Row) -> tuple[int, Row | None, Rows | None]:
        """Return how much of a new row's prompt may be copied, and from which row of which rows.

        At least one token is left to compute. A few tokens are not worth it: to read them costs as
        much as the padding.
        """
        nothing: tuple[int, Row | None, Rows | None] = (0, None, None)
        best = nothing
        if self._shares:
            for rows in (self._decode_rows, self._prefill_rows):
                for other in rows.like(row):
                    most = min(other.length, row.most_from(other))
                    if most > best[0]:
                        length = num_shared(row.tokens, other.tokens, most)
                        best = max(best, (length, other, rows), key=lambda copy: copy[0])
        return best if best[0] >= MIN_COLUMNS else nothing

    def _start_answers(self, ready: list[ActiveRequest]) -> None:
        """Choose first tokens where prompts are read; the rows move over to the answers'."""
        if not ready:
            return
        logits = [row.logits for active in ready for row in active.rows if row.logits is not None]
        first, choices = 0, []
        for active in ready:
            choices.append(TokenChoice(active, first, first + len(active.rows) - 1))
            first += len(active.rows)
        for active, chosen in zip(ready, choose(torch.stack(logits), choices), strict=True):
            for row in active.rows:
                row.logits = None
                self._decode_rows.add(row, self._prefill_rows)
                if not chosen.no_number:
                    self.prefixes.store(row, self._decode_rows)
                self._prefill_rows.remove(row)
            self.prefilling.remove(active)
            self.decoding.append(active)
            self._look_up(active)
            active.push(chosen)
            self.num_tokens += 1
        if not len(self._prefill_rows):
            self._prefill_rows.release()

    def _look_up(self, active: ActiveRequest) -> None:
        if self._speculation is not None and not active.request.offline:
            recent = active.adapter.recent if active.adapter is not None else ()
            tokens = [*recent, *active.tokens[-LOOKUP_PROMPT:]]
            active.lookup = PromptLookup(tokens, self._speculation.usual_hit_rate)

    def _drafts(self, num_rows: int) -> dict[ActiveRequest, list[int]]:
        """Return the tokens to check for each request: none where it would not pay."""
        if self._speculation is None:
            return {active: [] for active in self.decoding}
        proposals: dict[ActiveRequest, list[int]] = {}
        hit_rates = []
        for active in self.decoding:
            room = min(MAX_DRAFT, active.limit - active.length - 1)
            may_guess = active.lookup is not None and active.forced is None and room > 0
            draft = active.lookup.propose(room) if active.lookup and may_guess else []
            if active.constraint is not None:
                draft = active.constraint.possible(draft)
            proposals[active] = draft
            hit_rates.append(active.lookup.hit_rate if active.lookup else 0.0)
        lengths = [len(draft) for draft in proposals.values()]
        length = self._speculation.length(hit_rates, lengths, num_rows)
        return {active: draft[:length] for active, draft in proposals.items()}

    def _accept(self, active: ActiveRequest, draft: list[int], chosen: list[NextToken]) -> None:
        """Take the tokens `chosen` as long as the draft that they rest on came true."""
        num_taken = 0
        for index, token in enumerate(chosen):
            num_taken += 1
            active.push(token)
            if active.finished or active.forced is not None:
                break
            if index == len(draft) or token.token != draft[index]:
                break
        for row in active.rows:
            row.length += num_taken
        self.num_tokens += num_taken
        self.num_drafted += len(draft)
        self.num_accepted += num_taken - 1


def _new_rows(active: ActiveRequest) -> tuple[Row, ...]:
    """Return the rows of a request: the personal one, then the base's where it has two."""
    request = active.request
    public = list(request.public_prefix)

    def row(tokens: list[int], adapter: Adapter | None, early_exit: int | None = None) -> Row:
        num_public = num_shared(tokens, public, len(public))
        owner = request.cache_owner
        return Row(tokens, adapter, request.offline, early_exit, owner, num_public)

    personal = row(active.tokens, active.adapter)
    if not request.two_rows:
        return (personal,)
    return personal, row(active.base_tokens, None, request.early_exit)


def _kv_bytes(memory: int | float, device: torch.device) -> int:
    """Return the bytes of `EngineOptions.kv_memory`, which may be a share of what is free."""
    return int(memory * free_bytes(device)) if isinstance(memory, float) else memory
