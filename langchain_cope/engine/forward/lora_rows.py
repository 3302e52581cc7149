"""Many users' low-rank matrices in one batched product.

`LoraRows` holds the adapters of a batch's rows, stacked, and adds `x · A_rᵀ · B_rᵀ` for every row
with an adapter, with row r's own A and B (scaling and scale folded into B). Layers that read the
same input make up a `Site` and share both products: the Bs of a row stand side by side, zeros
between them. Rows with an adapter come first, so that rows of the base cost nothing extra. Where
few adapters serve many rows, each one's matrices are read once for all rows, not once a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from langchain_cope.engine.adapter import Adapter

# Of a row: from here on a CPU multiplies the low-rank matrices faster in bfloat16, the dtype of the
# states, than in float32 (`low_rank_dtype`).
MANY_TOKENS = 32

# Adapters that are multiplied one by one, each with all of its rows.
FEW_ADAPTERS = 4


@dataclass(frozen=True)
class Site:
    """Linear layers that read the same input and write side by side; often just one."""

    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    """Outputs of each layer."""


class LoraRows:
    """The adapters of a batch: row i < len(adapters) carries adapters[i], later rows none."""

    def __init__(self, sites: Mapping[str, Site], like: Tensor) -> None:
        """Start without rows.

        Args:
            sites: the site of each path that an adapter may change.
            like: a tensor of the dtype and on the device to compute with.
        """
        self._sites = sites
        self._like = like
        self._rows: list[Adapter] = []  # that the stacks hold: of each row, or those that differ
        self._shares: list[Tensor] = []  # where few differ: the rows of each
        self._num_rows = 0
        self._capacity = 0
        self._stacks: dict[Site, _Stack] = {}

    @property
    def paths(self) -> set[str]:
        """Modules that some row's adapter changes."""
        return {path for stack in self._stacks.values() for path in stack.paths}

    def set(self, adapters: Sequence[Adapter]) -> None:
        """Take these adapters as the first rows; only what changed is copied."""
        self._num_rows = len(adapters)
        distinct = self._distinct(adapters)
        self._shares = []
        if len(distinct) <= min(FEW_ADAPTERS, len(adapters) // 2) or len(adapters) == 1:
            self._shares = [
                torch.tensor(
                    [row for row, each in enumerate(adapters) if each.owner == adapter.owner],
                    device=self._like.device,
                )
                for adapter in distinct
            ]
            adapters = distinct
        if not self._has_room(adapters):
            self._build(adapters)
        else:
            for row, adapter in enumerate(adapters):
                if row >= len(self._rows) or self._rows[row].owner != adapter.owner:
                    for stack in self._stacks.values():
                        stack.put(row, adapter)
        self._rows = list(adapters)

    def clear(self) -> None:
        """Forget every adapter, and the room for them."""
        self._rows, self._stacks, self._capacity = [], {}, 0
        self._shares = []

    def add(self, site: Site, states: Tensor, output: Tensor) -> None:
        """Add what the adapters change at `site` to its `output` `(R, Q, out)`, in place."""
        if self._rows and (stack := self._stacks.get(site)):
            states, output = states[: self._num_rows], output[: self._num_rows]
            if self._shares:
                stack.add_shares(states, output, self._shares)
            else:
                stack.add(states, output)

    def changes(self, site: Site) -> bool:
        """Tell whether some row's adapter changes this site."""
        return bool(self._rows) and site in self._stacks

    def _distinct(self, adapters: Sequence[Adapter]) -> list[Adapter]:
        """Return one of each of `adapters`; those that the stacks hold keep their places."""
        by_owner = {adapter.owner: adapter for adapter in adapters}
        held = [by_owner.pop(each.owner) for each in self._rows if each.owner in by_owner]
        return [*held, *by_owner.values()]

    def _has_room(self, adapters: Sequence[Adapter]) -> bool:
        if len(adapters) > self._capacity:
            return False
        seen = {adapter.owner for adapter in self._rows}
        for adapter in adapters:
            if adapter.owner not in seen:
                for path, (down, _) in adapter.pairs.items():
                    stack = self._stacks.get(self._sites[path])
                    if stack is None or path not in stack.paths or down.shape[1] > stack.rank:
                        return False
        return True

    def _build(self, adapters: Sequence[Adapter]) -> None:
        """Make stacks with room for `adapters`, at least twice as many rows as before if more."""
        capacity = self._capacity
        if len(adapters) > capacity:
            capacity = max(len(adapters), 2 * capacity)
        ranks: dict[Site, int] = {}
        widths: dict[Site, int] = {}
        for adapter in adapters:
            for path, (down, _) in adapter.pairs.items():
                site = self._sites[path]
                ranks[site], widths[site] = max(ranks.get(site, 0), down.shape[1]), down.shape[0]
        used = {path for adapter in adapters for path in adapter.pairs}
        stacks = {}
        for site, rank in ranks.items():
            paths = tuple(path for path in site.paths if path in used)
            stacks[site] = _Stack(site, paths, rank, capacity, self._like, widths[site])
        for stack in stacks.values():
            for row, adapter in enumerate(adapters):
                stack.put(row, adapter)
        self._stacks, self._capacity = stacks, capacity


class _Stack:
    """The matrices of one site for every row.

    `down` is `(rows, in, layers · rank)` and `up` is `(rows, layers · rank, out)`.
    """

    def __init__(
        self, site: Site, paths: tuple[str, ...], rank: int, rows: int, like: Tensor, width: int
    ) -> None:
        """Make room for adapters that change `paths` of `site`, which reads `width` inputs."""
        self.paths, self.rank = paths, rank
        ends = {path: sum(site.sizes[: index + 1]) for index, path in enumerate(site.paths)}
        self.columns = [
            slice(ends[path] - site.sizes[site.paths.index(path)], ends[path]) for path in paths
        ]
        self.down = like.new_zeros(rows, width, len(paths) * rank)
        self.up = like.new_zeros(rows, len(paths) * rank, sum(site.sizes))
        # Both halves of each row by themselves: a step is over before many views are made.
        self.pairs = list(zip(self.down.unbind(), self.up.unbind(), strict=True))

    def put(self, row: int, adapter: Adapter) -> None:
        """Write the matrices of `adapter` into `row`, zeros where it has none."""
        self.down[row].zero_()
        self.up[row].zero_()
        for index, (path, columns) in enumerate(zip(self.paths, self.columns, strict=True)):
            if pair := adapter.pairs.get(path):
                start, end = index * self.rank, index * self.rank + pair[0].shape[1]
                self.down[row, :, start:end] = pair[0]
                self.up[row, start:end, columns] = pair[1]
        if adapter.scale != 1:
            self.up[row] *= adapter.scale

    def add(self, states: Tensor, output: Tensor) -> None:
        """Add the products of all rows of `states` `(R, Q, in)` to `output` `(R, Q, out)`."""
        num_rows, num_tokens, _ = states.shape
        dtype = states.dtype if num_tokens >= MANY_TOKENS else self.down.dtype
        down, up = self.down[:num_rows].to(dtype), self.up[:num_rows].to(dtype)
        low = torch.bmm(states.to(down.dtype), down)
        if output.dtype == up.dtype:
            output.baddbmm_(low, up)
        else:
            output += torch.bmm(low, up)

    def add_shares(self, states: Tensor, output: Tensor, shares: Sequence[Tensor]) -> None:
        """Do as `add`, where the adapter in row i of the stack is that of the rows `shares[i]`."""
        for (down, up), rows in zip(self.pairs, shares, strict=False):
            own = states if len(rows) == len(states) else states[rows]
            flat = own.reshape(-1, own.shape[-1])
            if len(flat) >= MANY_TOKENS:
                down, up = down.to(states.dtype), up.to(states.dtype)
            low = torch.mm(flat.to(down.dtype), down)
            if own is not states:
                added = torch.mm(low, up).to(output.dtype).view(*own.shape[:2], -1)
                output.index_add_(0, rows, added)
            elif output.dtype == up.dtype:
                output.view(-1, output.shape[-1]).addmm_(low, up)
            else:
                output += torch.mm(low, up).view_as(output)
