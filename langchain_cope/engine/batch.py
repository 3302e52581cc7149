"""Everyone who is answered together: prompts being read, answers being written, one step for all of them.

A contrastive request has two rows in one forward, a personal one with the user's adapter and a base one without; α = 0 or no
adapter leaves one. A request first has its rows among the prompts, where they are read piece by piece; with its first token they
move over to the answers.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from langchain_cope.engine.adapter import Adapter, LoraRows, low_rank_dtype
from langchain_cope.engine.decoding.speculation import MAX_DRAFT, PromptLookup, Speculation
from langchain_cope.engine.device import free_bytes
from langchain_cope.engine.forward.kv_cache import KeyValues, layer_shapes
from langchain_cope.engine.forward.plain import choose_forward
from langchain_cope.engine.next_token import Ask, choose
from langchain_cope.engine.options import EngineOptions
from langchain_cope.engine.prefix_cache import PrefixCache
from langchain_cope.engine.request import Chosen, Request, Running
from langchain_cope.engine.rows import Row, Rows

MIN_COLUMNS = 16  # tokens of a prompt read at a time, at least
RECENT_PROMPT = 4096  # newest tokens of a prompt that speculation looks in


class Batch:
    """Rows in flight over one model tree. Not thread-safe: the engine's thread owns it."""

    def __init__(self, model: PreTrainedModel, context: int, options: EngineOptions) -> None:
        """Raises ``ModelError``, by name, for an architecture that cannot be served."""
        self._context = context
        share = options.kv_memory
        self.kv_bytes = int(share * free_bytes(model.device)) if isinstance(share, float) else share
        """For keys and values of all rows."""
        with torch.inference_mode():
            self._shapes = layer_shapes(model)
            self.forward = choose_forward(model, self._shapes)
        self._like = torch.empty(0, dtype=model.dtype, device=model.device)
        self._answers, self._prompts = self._new_rows(), self._new_rows()
        self._speculation = Speculation() if options.speculation else None
        self.prefixes = PrefixCache(options.prefix_cache, self.bytes_per_position)
        self.running: list[Running] = []
        """Requests that have their first token."""
        self.arriving: list[Running] = []
        """Requests whose prompts are being read."""
        self.num_steps = self.num_prompt_forwards = self.num_tokens = 0
        self.num_drafted = self.num_accepted = self.num_reused = 0

    @property
    def num_rows(self) -> int:
        """Rows in flight."""
        return len(self._answers) + len(self._prompts)

    @property
    def bytes_per_position(self) -> int:
        """Keys and values of one position of one row."""
        return self._answers.kv.bytes_per_position

    def num_bytes(self, requests: Sequence[Running]) -> int:
        """Keys and values that ``requests`` may take together: room for the longest, a row each, and for prompts being read."""
        rounded = self._answers.kv.rounded
        answers = max(rounded(r.limit) for r in requests)
        prompts = max(rounded(len(r.tokens) + 1) for r in requests)
        return (
            sum(r.request.num_rows for r in requests)
            * (answers + prompts)
            * self.bytes_per_position
        )

    def admit(self, running: Running) -> None:
        """Take a request in: its rows are there, its prompt is to be read."""
        rows = [Row(running, running.adapter)]
        if running.request.two_rows:
            rows.append(Row(running, None))
        self.arriving.append(running)
        running.rows = tuple(rows)
        self._make_room()
        for row in rows:
            place = self._prompts.add(row)
            if blocks := self.prefixes.find(row):
                self._prompts.kv.fill(place, blocks)
                row.length = sum(block[0][0].shape[1] for block in blocks)
                self.num_reused += row.length

    def read_prompts(self, most_tokens: int) -> int:
        """Read the next piece of every prompt in one forward of about ``most_tokens`` at most; returns their number.

        Requests whose prompts are read whole get their first token and go on as answers; where it ends one, ``finished`` tells.
        """
        rows = self._prompts.all()
        while rows and not rows[-1].missing:
            rows.pop()  # rows that are done wait for their partner; where they lie last, they cost nothing
        if not rows:  # read before, but memory ran out over the first tokens
            self._begin(list(self.arriving))
            return 0
        missing = [row.missing for row in rows if row.missing]
        width = min(max(min(missing), MIN_COLUMNS), max(missing), max(most_tokens // len(rows), 1))
        pieces = [row.running.tokens[row.length : row.length + width] for row in rows]
        done = [place for place, row in enumerate(rows) if 0 < row.missing <= width]
        columns = [rows[place].missing - 1 for place in done]
        logits = self._prompts.forward(
            self.forward, [piece or [0] for piece in pieces], (done or [0], columns or [0])
        )
        for row, piece in zip(rows, pieces, strict=True):
            row.length += len(piece)
        for index, place in enumerate(done):
            rows[place].logits = logits[index].clone()
        self.num_prompt_forwards += 1
        self._begin([r for r in self.arriving if all(row.logits is not None for row in r.rows)])
        return len(rows) * width

    def step(self) -> None:
        """One more token for every answer, or several where a draft comes true."""
        started = time.perf_counter()
        rows = self._answers.all()
        drafts = self._drafts(len(rows))
        ids = [[row.running.tokens[-1], *drafts[row.running]] for row in rows]
        wanted = [(place, column) for place, new in enumerate(ids) for column in range(len(new))]
        logits = self._answers.forward(
            self.forward, ids, tuple(map(list, zip(*wanted, strict=True)))
        )  # type: ignore[arg-type]
        first = {
            id(rows[place]): index for index, (place, column) in enumerate(wanted) if column == 0
        }
        asks = [
            Ask(
                running,
                first[id(running.rows[0])] + column,
                first[id(running.rows[-1])] + column,
                draft[:column],
            )
            for running, draft in drafts.items()
            for column in range(len(draft) + 1)
        ]
        chosen = iter(choose(logits, asks))
        for running, draft in drafts.items():
            self._accept(running, draft, [next(chosen) for _ in range(len(draft) + 1)])
        self.num_steps += 1
        if self._speculation is not None:
            self._speculation.record_timing(
                len(rows) * max(map(len, ids)), time.perf_counter() - started
            )

    def drop(self, gone: Sequence[Running]) -> None:
        """Let these requests leave; what was computed for them is kept as a beginning for later ones."""
        for running in gone:
            if self._speculation is not None and running.lookup is not None:
                self._speculation.update_hit_rate(running.lookup)
            for row in running.rows:
                for rows in (self._answers, self._prompts):
                    if row not in rows:  # in neither, where there was no memory to take it in
                        continue
                    if running.finished and running.request.goes_on:
                        self.prefixes.store(row, rows)
                    rows.remove(row)
            running.rows = ()
        self.running = [r for r in self.running if r not in gone]
        self.arriving = [r for r in self.arriving if r not in gone]
        if not self.arriving:
            self._prompts.release()
            if not self.running:  # else those whose prompts are being read have their room here
                self._answers.release()

    def clear(self) -> None:
        """Forget every request and all that was kept."""
        for running in [*self.running, *self.arriving]:
            running.rows = ()
        self.running, self.arriving = [], []
        self._answers.clear()
        self._prompts.clear()
        self.prefixes.clear()

    def log_probs(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], adapter: Adapter | None
    ) -> list[Tensor]:
        """Per (prompt, completion) the log-probability ``(len(completion),)`` of each completion token, float32, in one forward."""
        rows = self._new_rows()
        rows.kv.reserve(len(sequences), max(len(p) + len(c) for p, c in sequences))
        for prompt, completion in sequences:
            rows.add(Row(Running(Request([*prompt, *completion]), 0), adapter))
        ids = [[*prompt, *completion][:-1] for prompt, completion in sequences]
        places = [
            (place, column)
            for place, (p, c) in enumerate(sequences)
            for column in range(len(p) - 1, len(p) + len(c) - 1)
        ]
        logits = rows.forward(self.forward, ids, tuple(map(list, zip(*places, strict=True))))  # type: ignore[arg-type]
        targets = torch.tensor(
            [token for _, completion in sequences for token in completion], device=logits.device
        )
        chosen = (
            torch.log_softmax(logits.float(), dim=-1)
            .gather(-1, targets.unsqueeze(-1))
            .squeeze(-1)
            .cpu()
        )
        return list(torch.split(chosen, [len(completion) for _, completion in sequences]))

    def _new_rows(self) -> Rows:
        kv = KeyValues(self._shapes, self._like.dtype, self._like.device)
        dtype = low_rank_dtype(self._like.dtype, self._like.device)
        return Rows(kv, LoraRows(self.forward.sites, self._like.to(dtype)), self._context)

    def shrink(self) -> None:
        """Give up the room of those who have left."""
        if self.running or self.arriving:
            self._make_room(exactly=True)

    def _make_room(self, exactly: bool = False) -> None:
        """Room for everyone who is in: prompts where they are read, and whole answers."""
        prompts, answers = self._prompts.kv, self._answers.kv
        everyone = [*self.running, *self.arriving]
        needed = [
            (
                prompts,
                sum(len(r.rows) for r in self.arriving),
                max((len(r.tokens) + 1 for r in self.arriving), default=0),
            ),
            (answers, sum(len(r.rows) for r in everyone), max(r.limit for r in everyone)),
        ]
        exactly = (
            exactly
            or sum(kv.bytes_for(rows, positions) for kv, rows, positions in needed) > self.kv_bytes
        )
        for kv, rows, positions in sorted(needed, key=lambda need: need[0].bytes_for(*need[1:])):
            kv.reserve(rows, positions, exactly=exactly)

    def _begin(self, ready: list[Running]) -> None:
        """First tokens for requests whose prompts are read; their rows move over to the answers."""
        if not ready:
            return
        logits = torch.stack(
            [row.logits for running in ready for row in running.rows if row.logits is not None]
        )
        first, asks = 0, []
        for running in ready:
            asks.append(Ask(running, first, first + len(running.rows) - 1))
            first += len(running.rows)
        for running, chosen in zip(ready, choose(logits, asks), strict=True):
            for row in running.rows:
                row.logits = None
                self._answers.add(row, self._prompts)
                self.prefixes.store(row, self._answers)
                self._prompts.remove(row)
            self.arriving.remove(running)
            self.running.append(running)
            self._look_up(running)
            running.finished = not running.take(chosen)
            self.num_tokens += 1
        if not len(self._prompts):
            self._prompts.release()

    def _look_up(self, running: Running) -> None:
        if self._speculation is not None:
            recent = running.adapter.recent if running.adapter is not None else ()
            tokens = [*recent, *running.tokens[-RECENT_PROMPT:]]
            running.lookup = PromptLookup(tokens, self._speculation.usual_hit_rate)

    def _drafts(self, num_rows: int) -> dict[Running, list[int]]:
        """What to check for each request: nothing where it would not pay."""
        if self._speculation is None:
            return {running: [] for running in self.running}
        proposals = {}
        for running in self.running:
            most = min(MAX_DRAFT, running.limit - len(running.tokens) - 1)
            draft = running.lookup.propose(most) if running.lookup and most > 0 else []
            proposals[running] = (
                draft if running.constraint is None else running.constraint.possible(draft)
            )
        hit_rates = [running.lookup.hit_rate if running.lookup else 0.0 for running in self.running]
        length = self._speculation.length(
            hit_rates, [len(draft) for draft in proposals.values()], num_rows
        )
        return {running: draft[:length] for running, draft in proposals.items()}

    def _accept(self, running: Running, draft: list[int], chosen: list[Chosen]) -> None:
        """Take the tokens chosen as long as the draft they rest on came true."""
        num_taken = 0
        for place, token in enumerate(chosen):
            num_taken += 1
            running.finished = not running.take(token)
            if running.finished or place == len(draft) or token.token != draft[place]:
                break
        for row in running.rows:
            row.length += num_taken
        self.num_tokens += num_taken
        self.num_drafted += len(draft)
        self.num_accepted += num_taken - 1
