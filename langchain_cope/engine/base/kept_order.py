"""The faster order of products, measured once a machine and kept in the user's cache folder.

The two orders round differently, and in bfloat16 that is enough for other answers. So every process
on a machine takes the same: a training that is resumed ends as the one that was not.
"""

import torch
from torch import nn

from langchain_cope.engine.base.cpu_dtype import cpu_features
from langchain_cope.engine.base.user_cache import kept_fact
from langchain_cope.engine.forward.matmul_order import ROWS, MatmulOrder, usual_weights

_NONE = "none"  # numbers of rows: the usual order is always the faster


def matmul_order(model: nn.Module) -> MatmulOrder:
    """Return the order for the weights of `model`: the kept one, or one measured now."""
    weights = usual_weights(model)
    if not weights:
        return MatmulOrder(frozenset())
    facts = (cpu_features(), torch.__version__, torch.get_num_threads())
    kind = f"{facts} {weights[0].dtype} {tuple(weights[0].shape)}"

    def find() -> str:
        order = MatmulOrder.measured(weights)
        return " ".join(map(str, sorted(order.weight_first))) or _NONE

    text = kept_fact("order", kind, _is_order, find)
    return MatmulOrder(frozenset() if text == _NONE else frozenset(map(int, text.split())))


def _is_order(text: str) -> bool:
    rows = {str(number) for number in ROWS}
    words = text.split()
    return text == _NONE or (bool(words) and rows.issuperset(words))
