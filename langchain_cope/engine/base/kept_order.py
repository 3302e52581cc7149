"""The faster order of products, measured once a machine and kept in the user's cache folder.

The two orders round differently, and in bfloat16 that is enough for other answers. So every process
on a machine takes the same: a training that is resumed ends as the one that was not.
"""

import hashlib
from pathlib import Path

import torch
from torch import nn

from langchain_cope.engine.base.cpu_dtype import cpu_features
from langchain_cope.engine.base.user_cache import read_entry, write_entry
from langchain_cope.engine.forward.matmul_order import ROWS, MatmulOrder, usual_weights

_NONE = "none"  # numbers of rows: the usual order is always the faster


def matmul_order(model: nn.Module) -> MatmulOrder:
    """Return the order for the weights of `model`: the kept one, or one measured now."""
    weights = usual_weights(model)
    if not weights:
        return MatmulOrder(frozenset())
    facts = (cpu_features(), torch.__version__, torch.get_num_threads())
    kind = f"{facts} {weights[0].dtype} {tuple(weights[0].shape)}"
    entry = Path("order") / hashlib.sha256(kind.encode()).hexdigest()
    kept = _read(entry)
    if kept is not None:
        return kept
    order = MatmulOrder.measured(weights)
    write_entry(entry, " ".join(map(str, sorted(order.weight_first))) or _NONE)
    return order


def _read(entry: Path) -> MatmulOrder | None:
    text = read_entry(entry)
    if text == _NONE:
        return MatmulOrder(frozenset())
    rows = {str(number): number for number in ROWS}
    words = (text or "").split()
    if not words or not all(word in rows for word in words):
        return None
    return MatmulOrder(frozenset(rows[word] for word in words))
