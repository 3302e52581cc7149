"""What DPO contrasts with must be the base, adapter off.

A fresh adapter cannot tell, its loss is log 2 with any reference; one that SFT has moved can.
"""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import logsigmoid
from training.tiny import Heard
from transformers import AutoModelForCausalLM
from trl import DPOConfig

from langchain_cope.training.dpo import _dataset, _PairTrainer, dpo_trainer, train_dpo
from langchain_cope.training.encode import encode, fit
from langchain_cope.training.negatives import Pair
from langchain_cope.training.progress import Stage
from langchain_cope.training.sft import train_sft
from langchain_cope.training.trainer import arguments, random_state_kept, tokenizer_copy


@pytest.fixture
def trained(base, items, recipe, monitor, tmp_path):
    """Pairs, a recipe at β = 1, and the folder of an adapter that SFT has moved off the base."""
    train_sft(base, fit(base, items, 2048, 768)[0], recipe, tmp_path / "sft", monitor)
    pairs = []
    for number, item in enumerate(items):
        prompt, chosen = encode(base, item.messages, item.completion)
        _, rejected = encode(base, item.messages, f"no, {number * 11}" + "!" * number)
        pairs.append(Pair(number, prompt, chosen, rejected, "", -0.1))
    return pairs, replace(recipe, dpo=replace(recipe.dpo, beta=1.0)), tmp_path / "sft"


def log_prob(model, prompt, completion):
    """Of the whole completion: one plain forward in float64, one sequence at a time."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    scores = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return scores.gather(1, torch.tensor(completion)[:, None]).sum().item()


def plain_log_probs(base, pairs, folder=None):
    """(chosen, rejected) log-probabilities under a separately loaded model.

    With the adapter in `folder`, or without.
    """
    model = AutoModelForCausalLM.from_pretrained(base.name, dtype=torch.float64)
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder)
    model.eval()
    rows = []
    for pair in pairs:
        answers = (pair.chosen_ids, pair.rejected_ids)
        rows.append([log_prob(model, pair.prompt_ids, ids) for ids in answers])
    return torch.tensor(rows)


def check_reference(trainer, base, pairs):
    with random_state_kept():
        batch = trainer._prepare_inputs(trainer.data_collator(list(_dataset(pairs))))
        chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
    reference = torch.stack([chosen, rejected], dim=1).cpu()
    assert torch.allclose(reference, plain_log_probs(base, pairs), atol=1e-4, rtol=0)


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
    plain = AutoModelForCausalLM.from_pretrained(base.name)
    with random_state_kept():
        stock = _PairTrainer(
            model=PeftModel.from_pretrained(plain, sft, is_trainable=True),
            args=DPOConfig(**arguments(base, recipe.dpo, len(pairs), 0, str(tmp_path)), beta=1.0),
            train_dataset=_dataset(pairs),
            processing_class=tokenizer_copy(base),
        )
    with pytest.raises(AssertionError):
        check_reference(stock, base, pairs)


def test_first_loss_is_the_independently_computed_one(base, trained, tmp_path):
    pairs, recipe, sft = trained
    monitor = Heard()
    with monitor.stage(Stage.DPO):
        train_dpo(base, pairs, recipe, sft, tmp_path / "dpo", monitor)
    expected = expected_loss(base, pairs, sft)
    assert monitor.steps[0].loss == pytest.approx(expected, abs=1e-4)
    # Not log 2, the loss of an adapter that does nothing: the check above could not tell.
    assert abs(expected - 0.6931) > 0.05


def test_dpo_prefers_what_the_user_wrote_more_than_sft_did(base, trained, tmp_path, monitor):
    pairs, recipe, sft = trained
    longer = replace(recipe, dpo=replace(recipe.dpo, epochs=4))
    train_dpo(base, pairs, longer, sft, tmp_path / "dpo", monitor)
    assert expected_loss(base, pairs, tmp_path / "dpo") < expected_loss(base, pairs, sft)
