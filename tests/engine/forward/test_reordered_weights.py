"""Some rows are multiplied with reordered weights: the same bits, once that pays."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from langchain_cope.engine import Engine, EngineOptions, Request, Sampling, load_base
from langchain_cope.engine.forward import reordered_weights
from langchain_cope.engine.forward.llama import LlamaForward
from langchain_cope.engine.forward.reordered_weights import (
    MOST_ROWS,
    ReorderedWeight,
    can_reorder,
    reordered,
)

Tiny = Callable[..., Path]
WEIGHT = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)).bfloat16()

pytestmark = pytest.mark.skipif(not can_reorder(WEIGHT), reason="this CPU has no bfloat16 products")


@pytest.fixture(autouse=True)
def _always_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take reordered weights, whatever this machine is fast at."""
    monkeypatch.setattr(reordered_weights, "_pays", lambda *_: True)


@pytest.mark.parametrize("num_rows", [1, 7, 64, MOST_ROWS])
def test_the_product_is_the_same_to_the_bit(num_rows: int) -> None:
    states, bias = torch.randn(2, num_rows, 64).bfloat16(), torch.randn(96).bfloat16()
    product = ReorderedWeight(WEIGHT)
    with torch.inference_mode():
        assert torch.equal(product(states[0], None), F.linear(states[0], WEIGHT))
        assert torch.equal(product(states[0], bias), F.linear(states[0], WEIGHT, bias))
        assert product(states, bias).shape == (2, num_rows, 96)


def test_answers_stay_the_same_when_weights_are_reordered(tiny: Tiny) -> None:
    base = load_base(str(tiny("llama")), dtype=torch.bfloat16)
    requests = [Request([number + 5, 7], sampling=Sampling(max_tokens=4)) for number in range(6)]
    engine = Engine(base, EngineOptions(speculation=False, prefix_cache=0))
    forward = engine._batch.forward
    assert isinstance(forward, LlamaForward)

    def answers(number: int) -> list[tuple[int, ...]]:
        return [each.token_ids for each in engine.generate(requests[:number])]

    first = answers(1)
    assert not any(product.reordered for product in forward._layers[0].products)
    together = answers(6)
    assert all(product.reordered for product in forward._layers[0].products)
    assert answers(6) == together
    assert answers(1) == first
    engine.close()


def test_a_weight_stays_as_it_is_where_bits_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded_elsewhere(self: ReorderedWeight, states: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(states, WEIGHT, bias) * 1.01

    assert reordered([WEIGHT]) is not None
    monkeypatch.setattr(ReorderedWeight, "__call__", rounded_elsewhere)
    assert reordered([WEIGHT]) is None


def test_a_weight_stays_as_it_is_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reordered_weights, "free_bytes", lambda _: 3 * WEIGHT.nbytes)
    assert reordered([WEIGHT]) is None
    assert reordered([WEIGHT.float()]) is None
