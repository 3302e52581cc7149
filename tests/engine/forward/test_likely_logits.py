"""Logits of the likeliest tokens are computed in float32, the others as they were."""

import torch

from langchain_cope.engine.forward import likely_logits
from langchain_cope.engine.forward.likely_logits import refined


def head(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, 64, generator=generator).bfloat16()
    weight = torch.randn(2000, 64, generator=generator).bfloat16()
    bias = torch.randn(2000, generator=generator).bfloat16()
    return states, weight, bias


def test_likely_logits_have_float32s_precision_and_the_others_stay() -> None:
    states, weight, bias = head()
    rough = torch.nn.functional.linear(states, weight, bias)
    logits = refined(rough, states, weight, bias)
    exact = states.double() @ weight.double().t() + bias.double()
    best = exact.argmax(-1, keepdim=True)
    assert logits.dtype == torch.float32
    assert (logits.gather(1, best) - exact.gather(1, best)).abs().max() < 1e-4
    assert (rough.gather(1, best) - exact.gather(1, best)).abs().max() > 1e-2
    least = exact.argmin(-1, keepdim=True)
    assert torch.equal(logits.gather(1, least), rough.gather(1, least).float())


def test_two_tokens_that_bfloat16_cannot_tell_apart_are_told_apart() -> None:
    states = torch.ones(1, 8).bfloat16()
    weight = torch.zeros(3, 8).bfloat16()
    weight[1], weight[2] = 2.0, 2.0
    weight[2, 0] = 2.015625  # 16.016 in all: bfloat16 has 16 and 16.125
    rough = torch.nn.functional.linear(states, weight)
    assert rough[0, 1] == rough[0, 2]
    assert refined(rough, states, weight, None).argmax() == 2


def test_many_rows_are_refined_a_few_at_a_time() -> None:
    states, weight, bias = head(rows=likely_logits.FEW + 3)
    rough = torch.nn.functional.linear(states, weight, bias)
    logits = refined(rough, states, weight, bias)
    exact = states.double() @ weight.double().t() + bias.double()
    best = exact.argmax(-1, keepdim=True)
    assert (logits.gather(1, best) - exact.gather(1, best)).abs().max() < 1e-4
    last = slice(likely_logits.FEW, None)
    alone = refined(rough[last], states[last], weight, bias)
    assert torch.equal(logits[last], alone)


def test_logits_of_other_dtypes_are_left_as_they_are() -> None:
    states, weight, bias = head()
    logits = torch.nn.functional.linear(states.float(), weight.float(), bias.float())
    assert refined(logits, states.float(), weight.float(), bias.float()) is logits
