import copy
import random
from dataclasses import replace

import numpy
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from training.tiny import TEMPLATES, Heard, make_item
from transformers import AutoModelForCausalLM

from langchain_cope.errors import Cancelled, ModelError
from langchain_cope.training.dpo import dpo_trainer, train_dpo
from langchain_cope.training.encode import encode, fit
from langchain_cope.training.negatives import Pair
from langchain_cope.training.progress import Stage
from langchain_cope.training.recipe import DPO
from langchain_cope.training.sft import sft_trainer, train_sft
from langchain_cope.training.trainer import arguments, random_state_kept


def encoded(base, items):
    return fit(base, items, 2048, 768)[0]


def pair(base, number, rejected="what the user never said"):
    """The pair of `make_item(number)` with an answer that its user did not write."""
    item = make_item(number)
    prompt, chosen = encode(base, item.messages, item.completion)
    _, negative = encode(base, item.messages, rejected)
    return Pair(number, prompt, chosen, negative, rejected, -0.1)


def bits(model):
    """The exact content of every tensor of a model."""
    return {name: tensor.detach().clone().cpu() for name, tensor in model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


def unpadded(ids, keep):
    return [row[mask.bool()].tolist() for row, mask in zip(ids, keep, strict=True)]


@pytest.mark.parametrize("template", TEMPLATES)
def test_batches_of_sft_are_what_encode_returns(make_base, items, recipe, tmp_path, template):
    base = make_base(template=template)
    with random_state_kept():
        trainer = sft_trainer(base, encoded(base, items), recipe, str(tmp_path))
        batches = list(trainer.get_train_dataloader())
    rows, learned = [], []
    for batch in batches:
        rows += unpadded(batch["input_ids"], batch["attention_mask"])
        learned += unpadded(batch["labels"], batch["labels"] != -100)
    expected = [encode(base, item.messages, item.completion) for item in items]
    assert sorted(rows) == sorted(prompt + completion for prompt, completion in expected)
    assert sorted(learned) == sorted(completion for _, completion in expected)


@pytest.mark.parametrize("template", TEMPLATES)
def test_batches_of_dpo_are_what_encode_returns(
    make_base, items, recipe, monitor, tmp_path, template
):
    base = make_base(template=template)
    train_sft(base, encoded(base, items), recipe, tmp_path / "sft", monitor)
    pairs = [pair(base, number) for number in range(6)]
    with random_state_kept():
        trainer = dpo_trainer(base, pairs, recipe, tmp_path / "sft", str(tmp_path))
        (batch,) = list(trainer.get_train_dataloader())
    rows = unpadded(batch["input_ids"], batch["attention_mask"])
    answers = unpadded(batch["input_ids"], batch["completion_mask"])
    assert sorted(rows[:6]) == sorted(p.prompt_ids + p.chosen_ids for p in pairs)
    assert sorted(rows[6:]) == sorted(p.prompt_ids + p.rejected_ids for p in pairs)
    assert sorted(answers[:6]) == sorted(p.chosen_ids for p in pairs)
    assert sorted(answers[6:]) == sorted(p.rejected_ids for p in pairs)


@pytest.mark.parametrize(
    ("architecture", "targets", "layers"),
    [
        ("llama", "attention", {"q_proj", "v_proj"}),
        (
            "llama",
            "linear",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
        ("gpt2", "attention", {"c_attn"}),
        ("gpt2", "linear", {"c_attn", "c_proj", "c_fc"}),
        ("phi3", "attention", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        ("phi3", ("o_proj",), {"o_proj"}),
    ],
)
def test_every_adapter_tensor_moves_and_the_base_does_not(
    make_base, items, recipe, monitor, tmp_path, architecture, targets, layers
):
    base = make_base(architecture)
    before = bits(base.model)
    recipe = replace(recipe, sft=replace(recipe.sft, targets=targets))
    with random_state_kept():
        fresh = bits(sft_trainer(base, encoded(base, items), recipe, str(tmp_path)).model)
    train_sft(base, encoded(base, items), recipe, tmp_path / "sft", monitor)
    pairs = [pair(base, number) for number in range(6)]
    train_dpo(base, pairs, recipe, tmp_path / "sft", tmp_path / "dpo", monitor)
    sft = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    dpo = load_file(tmp_path / "dpo" / "adapter_model.safetensors")
    assert sft.keys() == dpo.keys()
    assert {name.split(".")[-3] for name in sft} == layers
    for name in sft:
        assert not torch.equal(sft[name], fresh[name.replace(".weight", ".default.weight")]), name
        assert not torch.equal(sft[name], dpo[name]), name
    assert same(bits(base.model), before)
    assert not any("lora" in name for name, _ in base.model.named_modules())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_folder_is_a_plain_peft_folder_that_loads_without_a_network(
    make_base, items, recipe, monitor, tmp_path, architecture
):
    base = make_base(architecture)
    examples = encoded(base, items)
    train_sft(base, examples, recipe, tmp_path / "sft", monitor)
    assert sorted(file.name for file in (tmp_path / "sft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    model = AutoModelForCausalLM.from_pretrained(base.name)
    plain = PeftModel.from_pretrained(model, tmp_path / "sft").eval()
    assert plain.peft_config["default"].base_model_name_or_path == base.name
    with random_state_kept():
        trainer = dpo_trainer(base, [pair(base, 0)], recipe, tmp_path / "sft", str(tmp_path))
    trained = trainer.model.eval()
    ids = torch.tensor([examples[0].prompt_ids])
    with torch.no_grad():
        logits = trained(input_ids=ids.to(trained.device)).logits.cpu()
        assert torch.allclose(plain(input_ids=ids).logits, logits, atol=1e-5)


def test_the_same_seed_gives_the_same_bytes_after_another_user_too(
    base, items, recipe, monitor, tmp_path
):
    examples = encoded(base, items)
    train_sft(base, examples, recipe, tmp_path / "first", monitor)
    others = [make_item(number, "never") for number in range(9)]
    train_sft(base, encoded(base, others), recipe, tmp_path / "other user", monitor)
    torch.rand(3)
    train_sft(base, examples, recipe, tmp_path / "again", monitor)
    train_sft(base, examples, replace(recipe, seed=1), tmp_path / "other seed", monitor)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    weights = [
        (tmp_path / run / "adapter_model.safetensors").read_bytes()
        for run in ("first", "other seed", "other user")
    ]
    assert len(set(weights)) == 3


def test_training_leaves_random_state_and_tokenizer_as_they_were(
    base, items, recipe, monitor, tmp_path
):
    padding, fingerprint = base.tokenizer.padding_side, base.fingerprint()
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    expected = random.random(), numpy.random.rand(), torch.rand(1).item()
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    train_sft(base, encoded(base, items), recipe, tmp_path / "sft", monitor)
    train_dpo(base, [pair(base, 0)], recipe, tmp_path / "sft", tmp_path / "dpo", monitor)
    assert (random.random(), numpy.random.rand(), torch.rand(1).item()) == expected
    base._fingerprint = None
    assert (base.tokenizer.padding_side, base.fingerprint()) == (padding, fingerprint)


def test_progress_is_reported_and_nothing_is_printed(base, items, recipe, tmp_path, capfd):
    monitor = Heard()
    with monitor.stage(Stage.SFT):
        train_sft(base, encoded(base, items), recipe, tmp_path / "sft", monitor)
    steps = monitor.steps
    assert [(p.stage, p.step, p.total) for p in steps] == [("sft", n, 6) for n in range(1, 7)]
    assert all(progress.loss > 0 for progress in steps)
    assert steps[-1].loss < steps[0].loss
    assert steps[0].seconds_left > steps[-1].seconds_left == 0
    assert capfd.readouterr() == ("", "")


def test_a_stop_is_heard_at_the_next_step_and_leaves_no_folder(base, items, recipe, tmp_path):
    monitor = Heard(stop=lambda steps: len(steps) >= 2)
    stopped = pytest.raises(Cancelled, match="stopped on request in the stage 'sft'")
    with stopped, monitor.stage(Stage.SFT):
        train_sft(base, encoded(base, items), recipe, tmp_path / "sft", monitor)
    assert len(monitor.steps) <= 3 < 6
    assert not (tmp_path / "sft").exists()


def test_modules_that_the_base_lacks_are_refused_by_name(base, items, recipe, monitor, tmp_path):
    recipe = replace(recipe, sft=replace(recipe.sft, targets=("q_proj", "qkv")))
    expected = r"SFT.targets names \['qkv'\], but this base's linear layers are \['down_proj'"
    with pytest.raises(ValueError, match=expected):
        train_sft(base, encoded(base, items), recipe, tmp_path / "sft", monitor)


def test_bfloat16_base_is_trained_in_bfloat16_and_not_cast(
    make_base, items, recipe, monitor, tmp_path
):
    base = make_base()
    # A copy: a skeleton shares the base's tensors, and other tests use the base.
    model = copy.deepcopy(base.skeleton()).to(torch.bfloat16)
    low = replace(base, model=model, _fingerprint=None)
    before = bits(low.model)
    train_sft(low, encoded(low, items), recipe, tmp_path / "sft", monitor)
    train_dpo(low, [pair(low, 0)], recipe, tmp_path / "sft", tmp_path / "dpo", monitor)
    assert same(bits(low.model), before)
    assert low.dtype == torch.bfloat16
    adapter = load_file(tmp_path / "dpo" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}


def test_base_on_a_second_gpu_is_refused_with_what_to_do(base, recipe):
    class OnSecondGPU:
        device = torch.device("cuda:1")

    with pytest.raises(ModelError, match="CUDA_VISIBLE_DEVICES=1"):
        arguments(OnSecondGPU(), recipe.sft, 6, 0, "unused")


@pytest.mark.parametrize(("num_rows", "warmup"), [(8, 0), (72, 0), (73, 0.1), (80, 0.1)])
def test_warmup_never_eats_the_whole_of_a_short_training(base, num_rows, warmup):
    assert arguments(base, DPO(), num_rows, 0, "unused")["warmup_steps"] == warmup
