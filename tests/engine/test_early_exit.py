"""A weaker model in the base's place: half of its layers, against plain forwards in float64."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine.reference import TIE, Reference, scores

from langchain_cope.engine import Contrast, Engine, Request, Sampling
from langchain_cope.errors import InputError, ModelError

Tiny = Callable[..., Path]
PROMPTS = [
    torch.randint(3, 380, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (5, 19)
]


@torch.no_grad()
def after_one_layer(base: Path, ids: list[int]) -> torch.Tensor:
    """Log-probabilities `(len(ids), V)` read out after the first of two layers."""
    model = Reference(base).model
    hidden = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1]
    logits: torch.Tensor = model.lm_head(model.model.norm(hidden))[0]
    return logits.double().log_softmax(-1)


def test_contrasted_with_an_early_exit_answers_follow_the_rule(
    tiny: Tiny, adapter: Tiny, engine: Engine
) -> None:
    folder = adapter(tiny("llama"), seed=1)
    ann, reference = engine.load_adapter(folder), Reference(tiny("llama"), folder)
    contrast, sampling = Contrast(0.5), Sampling(max_tokens=16)
    requests = [
        Request(prompt, ann, contrast, sampling, early_exit=layers, logprobs=True)
        for prompt in PROMPTS
        for layers in (1, None, 2)
    ]
    answers = engine.generate(requests)
    for prompt, (early, whole, every) in zip(PROMPTS, (answers[:3], answers[3:]), strict=True):
        assert whole.token_ids == every.token_ids
        assert early.token_ids != whole.token_ids
        ids = [*prompt, *early.token_ids]
        base = after_one_layer(tiny("llama"), ids)[len(prompt) - 1 : -1]
        user = reference.log_probs(ids)[0][len(prompt) - 1 : -1]
        expected = scores(user, base, 0.5, 0.1)
        for step, token in enumerate(early.logprobs):
            assert expected[step].max() - expected[step, token.token_id] <= TIE
            assert token.log_p_base == pytest.approx(float(base[step, token.token_id]), abs=1e-4)


@pytest.mark.parametrize("layers", [0, 3, True, 1.0])
def test_an_exit_after_no_layer_of_the_base_is_refused(engine: Engine, layers: int) -> None:
    with pytest.raises(InputError, match="early_exit must be a number of layers from 1 to 2"):
        engine.generate([Request(PROMPTS[0], early_exit=layers)])


def test_a_model_that_is_served_as_it_is_has_no_early_exit(
    tiny: Tiny, engine_for: Callable[[Path], Engine]
) -> None:
    engine = engine_for(tiny("gpt2"))
    with pytest.raises(ModelError, match="cannot be read out early"):
        engine.generate([Request(PROMPTS[0], early_exit=1)])
