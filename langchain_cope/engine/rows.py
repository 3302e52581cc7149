"""Rows of a batch, packed: those with an adapter first, then those of the base, each at its place in the cache.

A row that joins or leaves moves at most three others, whatever the number of rows.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from langchain_cope.engine.adapter import Adapter, LoraRows
from langchain_cope.engine.forward.kv_cache import KeyValues
from langchain_cope.engine.forward.plain import Forward, Inputs

if TYPE_CHECKING:
    from langchain_cope.engine.request import Running


class Row:
    """One sequence of tokens under one model: a user's, or the base."""

    def __init__(self, running: "Running", adapter: Adapter | None) -> None:
        self.running = running
        self.adapter = adapter
        self.length = 0
        """Positions in the cache."""
        self.logits: Tensor | None = None
        """``(V,)`` of the prompt's last position, once it is known."""

    @property
    def missing(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.running.tokens) - self.length


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
        """In the order in which they lie in the cache."""
        return self._personal + self._base

    def add(self, row: Row, source: "Rows | None" = None) -> int:
        """Give ``row`` a place and return it, with its keys and values where it comes from another ``source``."""
        place = len(self)
        if row.adapter is None:
            self._base.append(row)
        else:
            if self._base:  # the first base row makes room
                self._move(len(self._personal), place)
                self._base.append(self._base.pop(0))
            place = len(self._personal)
            self._personal.append(row)
        if source is None:
            self.kv.zero_row(place)
        else:
            self.kv.copy_row(source.kv, source.all().index(row), place, row.length)
        return place

    def remove(self, row: Row) -> None:
        """Take ``row`` out; the last of its kind closes the gap."""
        if row.adapter is None:
            self._close(self._base, self._base.index(row), len(self._personal))
            return
        self._close(self._personal, self._personal.index(row), 0)
        if self._base:
            self._move(len(self), len(self._personal))  # the last base row, one place too far right
            self._base.insert(0, self._base.pop())

    def forward(
        self, forward: Forward, ids: list[list[int]], wanted: tuple[list[int], list[int]]
    ) -> Tensor:
        """Run the new tokens ``ids`` of the first ``len(ids)`` rows; rows with fewer are padded on the right with token 0.

        Returns logits ``(N, V)`` of the N (rows, columns) ``wanted``.
        """
        device = self.kv.keys[0].device
        rows = self.all()[: len(ids)]
        width, end = max(map(len, ids)), min(self.kv.num_positions, self._context)
        lengths = [row.length for row in rows]
        # Padding beyond the end is written to the last position, which no row ever needs.
        positions = torch.tensor(lengths, device=device).unsqueeze(1) + torch.arange(
            width, device=device
        )
        self._lora.set([row.adapter for row in rows if row.adapter is not None])
        return forward(
            Inputs(
                torch.tensor([new + [0] * (width - len(new)) for new in ids], device=device),
                positions.clamp_max(end - 1),
                self.kv,
                min(max(lengths) + width, end),
                self._lora,
                wanted,
                same_length=min(lengths) == max(lengths),
            )
        )

    def clear(self) -> None:
        """Forget every row."""
        self._personal, self._base = [], []
        self.release()

    def release(self) -> None:
        """Nobody is left: let go of adapters and of most of the memory."""
        self._lora.clear()
        self.kv.clear()

    def _move(self, place: int, to: int) -> None:
        row = (self._personal + self._base)[place] if place < len(self) else self._base[-1]
        self.kv.copy_row(self.kv, place, to, row.length)

    def _close(self, rows: list[Row], hole: int, offset: int) -> None:
        last = rows.pop()
        if hole < len(rows):
            self.kv.copy_row(self.kv, offset + len(rows), offset + hole, last.length)
            rows[hole] = last
