"""What DPO contrasts with must be the base, adapter off.

A fresh adapter cannot tell, its loss is log 2 with any reference; one that SFT has moved can.
"""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM
from trl import DPOConfig

from langchain_cope.training.dpo import _PairTrainer, _row, dpo_trainer, train_dpo
from langchain_cope.training.encode import encode, fit
from langchain_cope.training.negatives import Pair
from langchain_cope.training.progress import Watch, never
from langchain_cope.training.sft import train_sft
from langchain_cope.training.trainer import arguments, random_state_kept, tokenizer_copy


@pytest.fixture
def trained(base, examples, recipe, watch, tmp_path):
    """Pairs, a recipe at β = 1, and the folder of an adapter that SFT has moved away from the base."""
    train_sft(base, fit(base, examples, 2048, 768)[0], recipe, tmp_path / "sft", watch)
    pairs = []
    for number, item in enumerate(examples):
        prompt, chosen = encode(base, item.prompt, item.completion)
        _, rejected = encode(base, item.prompt, f"no, {number * 11}" + "!" * number)
        pairs.append(Pair(number, prompt, chosen, rejected, "", -0.1))
    return pairs, replace(recipe, dpo=replace(recipe.dpo, beta=1.0)), tmp_path / "sft"


def log_prob(model, prompt, completion):
    """Of the whole completion: one plain forward in float64, one sequence at a time."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    scores = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return scores.gather(1, torch.tensor(completion)[:, None]).sum().item()


def plain_log_probs(base, pairs, folder=None):
    """(chosen, rejected) log-probabilities under a separately loaded model, with the adapter of ``folder`` or without."""
    model = AutoModelForCausalLM.from_pretrained(base.name, dtype=torch.float64)
    model = model if folder is None else PeftModel.from_pretrained(model, folder)
    return torch.tensor(
        [
            [log_prob(model.eval(), p.prompt_ids, ids) for ids in (p.chosen_ids, p.rejected_ids)]
            for p in pairs
        ]
    )


def check_reference(trainer, base, pairs):
    with random_state_kept():
        batch = trainer.data_collator([_row(pair) for pair in pairs])
        chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
    assert torch.allclose(
        torch.stack([chosen, rejected], dim=1), plain_log_probs(base, pairs), atol=1e-4, rtol=0
    )


def expected_loss(base, pairs, folder):
    ratios = plain_log_probs(base, pairs, folder) - plain_log_probs(base, pairs)
    return -logsigmoid(ratios[:, 0] - ratios[:, 1]).mean().item()


def test_reference_is_the_base_with_the_adapter_off(base, trained, tmp_path):
    pairs, recipe, sft = trained
    with random_state_kept():
        trainer = dpo_trainer(base, pairs, recipe, sft, str(tmp_path))
    check_reference(trainer, base, pairs)
    assert list(trainer.model.peft_config) == ["default"]


def test_the_same_check_fails_on_trls_stock_construction(base, trained, tmp_path):
    pairs, recipe, sft = trained
    with random_state_kept():
        stock = _PairTrainer(
            model=PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(base.name), sft, is_trainable=True
            ),
            args=DPOConfig(**arguments(base, recipe.dpo, len(pairs), 0, str(tmp_path)), beta=1.0),
            train_dataset=Dataset.from_list([_row(pair) for pair in pairs]),
            processing_class=tokenizer_copy(base),
        )
    with pytest.raises(AssertionError):
        check_reference(stock, base, pairs)


def test_first_loss_is_the_independently_computed_one(base, trained, tmp_path):
    pairs, recipe, sft = trained
    heard = []
    train_dpo(base, pairs, recipe, sft, tmp_path / "dpo", Watch("dpo", heard.append, never))
    expected = expected_loss(base, pairs, sft)
    assert heard[0].loss == pytest.approx(expected, abs=1e-4)
    assert (
        abs(expected - 0.6931) > 0.05
    )  # the loss of an adapter that does nothing: the check above could not tell


def test_dpo_prefers_what_the_user_wrote_more_than_sft_did(base, trained, tmp_path, watch):
    pairs, recipe, sft = trained
    train_dpo(
        base,
        pairs,
        replace(recipe, dpo=replace(recipe.dpo, epochs=4)),
        sft,
        tmp_path / "dpo",
        watch,
    )
    assert expected_loss(base, pairs, tmp_path / "dpo") < expected_loss(base, pairs, sft)
