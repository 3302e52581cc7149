"""Rows of a batch, packed: those with an adapter first, then those of the base.

The index of a row among them is its index in the cache. A row that joins or leaves moves at most
three others, whatever the number of rows.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from langchain_cope.engine.adapter import Adapter
from langchain_cope.engine.forward.inputs import Forward, Inputs
from langchain_cope.engine.forward.kv_cache import KeyValues
from langchain_cope.engine.forward.lora_rows import LoraRows


class Row:
    """One sequence of tokens under one model: a user's, or the base."""

    def __init__(
        self,
        tokens: list[int],
        adapter: Adapter | None,
        offline: bool = False,
        early_exit: int | None = None,
        asker: Hashable = None,
        num_public: int = 0,
    ) -> None:
        """Take the request's own list of `tokens` for this row, which grows with its answer."""
        self.tokens = tokens
        self.adapter = adapter
        self.offline = offline
        self.early_exit = early_exit
        """Layers after which it is read out; None: all. Its keys and values are of all layers."""
        self.asker = asker
        """For whom it is computed: what is no secret of theirs is shared with them alone."""
        self.num_public = num_public
        """Leading tokens that are no secret."""
        self.length = 0
        """Positions in the cache."""
        self.logits: Tensor | None = None
        """`(V,)` of the prompt's last position, once it is known."""

    @property
    def missing(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.tokens) - self.length

    @property
    def owner(self) -> Hashable:
        """Whose keys and values these are: only rows of the same owner may share them."""
        return None if self.adapter is None else self.adapter.owner

    def most_from(self, other: "Row") -> int:
        """Return how many leading tokens it may take from a row of the same owner."""
        all_but_one = len(self.tokens) - 1  # whose logits are needed
        return all_but_one if self.asker == other.asker else min(all_but_one, self.num_public)


class Rows:
    """Rows that share a cache and go through the model together."""

    def __init__(self, kv: KeyValues, lora: LoraRows, context: int) -> None:
        self.kv = kv
        self._lora = lora
        self._context = context
        self._personal: list[Row] = []
        self._base: list[Row] = []

    def __len__(self) -> int:
        return len(self._personal) + len(self._base)

    def __contains__(self, row: Row) -> bool:
        return row in (self._base if row.adapter is None else self._personal)

    def all(self) -> list[Row]:
        """Return the rows in the order in which they lie in the cache."""
        return self._personal + self._base

    def like(self, row: Row) -> list[Row]:
        """Return the rows whose beginnings `row` may take: its owner's, offline as it is."""
        rows = self._base if row.adapter is None else self._personal
        return [each for each in rows if (each.owner, each.offline) == (row.owner, row.offline)]

    def add(self, row: Row, source: "Rows | None" = None, other: Row | None = None) -> int:
        """Take `row` in and return its index.

        Where `source` is given, its keys and values are copied from there: its own, or those of
        `other`, which begins with the same `row.length` tokens.
        """
        index = len(self)
        if row.adapter is None:
            self._base.append(row)
        else:
            if self._base:  # the first base row makes room
                self._copy(self._base[0], len(self._personal), index)
                self._base.append(self._base.pop(0))
            index = len(self._personal)
            self._personal.append(row)
        if source is None:
            self.kv.zero_row(index)
        else:
            self.kv.copy_row(source.kv, source.all().index(other or row), index, row.length)
        return index

    def remove(self, row: Row) -> None:
        """Take `row` out; the last row of its kind closes the gap."""
        if row.adapter is None:
            self._close_gap(self._base, self._base.index(row), len(self._personal))
            return
        self._close_gap(self._personal, self._personal.index(row), 0)
        if self._base:  # the last base row lies one index too far right
            last = self._base.pop()
            self._copy(last, len(self) + 1, len(self._personal))
            self._base.insert(0, last)

    def forward(
        self, forward: Forward, ids: list[list[int]], logits_at: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Run new tokens of the first rows.

        Args:
            forward: the model.
            ids: per row the new tokens. Shorter ones are padded on the right with token 0.
            logits_at: N (row, column) pairs, indices into `ids`.

        Returns:
            Logits `(N, V)`.
        """
        device = self.kv.keys[0].device
        rows = self.all()[: len(ids)]
        width, end = max(map(len, ids)), min(self.kv.num_positions, self._context)
        lengths = [row.length for row in rows]
        shortest, longest = min(lengths), max(lengths)
        starts = torch.tensor(lengths, device=device).unsqueeze(1)
        positions = starts + torch.arange(width, device=device)
        self._lora.set([row.adapter for row in rows if row.adapter is not None])
        return forward(
            Inputs(
                ids=torch.tensor([new + [0] * (width - len(new)) for new in ids], device=device),
                # Padding beyond the end is written to the last position, which no row ever needs.
                positions=positions.clamp_max(end - 1),
                kv=self.kv,
                num_positions=min(longest + width, end),
                lora=self._lora,
                logit_rows=[row for row, _ in logits_at],
                logit_columns=[column for _, column in logits_at],
                same_length=shortest == longest,
                exits=[rows[row].early_exit for row, _ in logits_at],
            )
        )

    def clear(self) -> None:
        """Forget every row, and free all memory."""
        self._personal, self._base = [], []
        self._lora.clear()
        self.kv.free()

    def release(self) -> None:
        """Let go of the adapters and of most of the memory; no row is left."""
        self._lora.clear()
        self.kv.clear()

    def _copy(self, row: Row, index: int, to: int) -> None:
        self.kv.copy_row(self.kv, index, to, row.length)

    def _close_gap(self, rows: list[Row], gap: int, offset: int) -> None:
        """Take the row at `gap` out of `rows`, which begin at index `offset` of the cache."""
        last = rows.pop()
        if gap < len(rows):
            self._copy(last, offset + len(rows), offset + gap)
            rows[gap] = last
