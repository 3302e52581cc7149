"""What one forward is given, and what a forward is: the seam between the batch and the model.

Whatever runs the model (the reference in `plain.py`, the shorter way in `llama.py`) takes `Inputs`
and returns logits. A forward is chosen, and checked, by `choose.choose_forward`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from langchain_cope.engine.forward.kv_cache import KeyValues
from langchain_cope.engine.forward.lora_rows import LoraRows, Site


@dataclass(frozen=True)
class Inputs:
    """Q new tokens for each of the first R rows of `kv`, from each row's own position on."""

    ids: Tensor
    """`(R, Q)`. A row with fewer new tokens is padded on the right; that is overwritten later."""
    positions: Tensor
    """`(R, Q)`."""
    kv: KeyValues
    num_positions: int
    """Positions that any row will have, padding included: keys and values are read up to here."""
    lora: LoraRows
    logit_rows: list[int]
    """N rows; with `logit_columns` the positions whose logits are asked for."""
    logit_columns: list[int]
    """N columns of `ids`."""
    exits: Sequence[int | None] = ()
    """Layers after which each of the N logits is read out, None for all; empty: all for each."""
    same_length: bool = False
    """True where all rows have as many positions: with one query a row nothing needs a mask."""


class Forward(Protocol):
    """A model's forward over rows of different lengths."""

    @property
    def sites(self) -> Mapping[str, Site]:
        """The site of each path at which an adapter may change the model."""

    @property
    def num_layers(self) -> int:
        """Layers, after each of which a row can be read out; 0 where none can."""
        ...

    def __call__(self, inputs: Inputs, /) -> Tensor:
        """Return logits `(N, V)` of the positions asked for; write the new keys and values."""
        ...
