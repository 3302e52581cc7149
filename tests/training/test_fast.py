"""The fast training steps compute what TRL's and peft's own compute."""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import trl.trainer.utils
from peft import LoraConfig, get_peft_model
from training.test_trainers import encoded, pair
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl.kernels import ChunkedLogProbFunction

from langchain_cope.engine import load_base
from langchain_cope.training import dpo, fast, sft, trainer
from langchain_cope.training.dpo import dpo_trainer
from langchain_cope.training.fast import (
    ATTENTION,
    SHORT_TEXT,
    _AdaptedLinear,
    _attention,
    _FrozenHead,
    _noise,
    _SharedBeginnings,
    _without_mask,
    logits_of_completions_alone,
)
from langchain_cope.training.sft import sft_trainer, train_sft
from langchain_cope.training.trainer import random_state_kept

ARCHITECTURES = ["llama", "gpt2", "phi3"]


@pytest.fixture
def slow_down(monkeypatch):
    """A function that brings back TRL's and peft's own steps."""

    def undo():
        monkeypatch.setattr(sft, "speed_up", lambda model: None)
        monkeypatch.setattr(dpo, "speed_up", lambda model: None)
        monkeypatch.setattr(trainer, "logits_of_completions_alone", nullcontext)

    return undo


def steps_of(build, monitor):
    """Train; return the loss of each step, and the adapter's tensors by name."""
    with random_state_kept():
        built = build()
        trainer.train(built, monitor)
    losses = [row["loss"] for row in built.state.log_history if "loss" in row]
    return losses, {name: p for name, p in built.model.named_parameters() if "lora" in name}


def assert_same_steps(ours, theirs):
    assert len(ours[0]) > 1
    assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
    for name, weight in theirs[1].items():
        torch.testing.assert_close(ours[1][name], weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mixtral"])
def test_sft_takes_the_steps_of_trl_and_peft(
    make_base, items, recipe, monitor, tmp_path, slow_down, architecture
):
    base = make_base(architecture)
    recipe = replace(recipe, sft=replace(recipe.sft, dropout=0.0, targets="linear"))
    examples = encoded(base, items)

    def build():
        built = sft_trainer(base, examples, recipe, str(tmp_path))
        for module in built.model.modules():
            if isinstance(module, torch.nn.Dropout):  # GPT-2's own draws by the shape of a batch
                module.p = 0.0
        return built

    ours = steps_of(build, monitor)
    slow_down()
    assert_same_steps(ours, steps_of(build, monitor))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mixtral"])
def test_dpo_takes_the_steps_of_trl_and_peft(
    make_base, items, recipe, monitor, tmp_path, slow_down, architecture
):
    base = make_base(architecture)
    recipe = replace(recipe, dpo=replace(recipe.dpo, batch_size=2, beta=0.5))
    train_sft(base, encoded(base, items), recipe, tmp_path / "sft", monitor)
    pairs = [pair(base, number) for number in range(6)]

    def build():
        return dpo_trainer(base, pairs, recipe, tmp_path / "sft", str(tmp_path))

    ours = steps_of(build, monitor)
    slow_down()
    assert_same_steps(ours, steps_of(build, monitor))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dpo_reads_what_two_answers_share_once(
    make_base, items, recipe, monitor, tmp_path, architecture
):
    base = make_base(architecture)
    train_sft(base, encoded(base, items), recipe, tmp_path / "sft", monitor)
    pairs = [pair(base, 0)]
    read = []

    def build():
        trainer = dpo_trainer(base, pairs, recipe, tmp_path / "sft", str(tmp_path))
        embedding = trainer.model.get_input_embeddings()
        embedding.register_forward_pre_hook(lambda _, args: read.append(args[0].numel()))
        return trainer

    steps_of(build, monitor)
    apart = len(pairs[0].chosen_ids) + len(pairs[0].rejected_ids)
    assert set(read) == {len(pairs[0].prompt_ids) + apart}


def test_a_reference_that_mining_knows_is_not_computed_again(
    base, engine, items, recipe, monitor, tmp_path
):
    train_sft(base, encoded(base, items), recipe, tmp_path / "sft", monitor)
    plain = [pair(base, number) for number in range(6)]
    known = []
    for each in plain:
        sides = [(each.prompt_ids, ids) for ids in (each.chosen_ids, each.rejected_ids)]
        chosen, rejected = (float(scores.sum()) for scores in engine.score(sides))
        known.append(replace(each, chosen_base_log_prob=chosen, rejected_base_log_prob=rejected))
    recipe = replace(recipe, dpo=replace(recipe.dpo, batch_size=2, beta=0.5))
    steps, num_forwards = [], []
    for pairs in (known, plain):
        num_forwards.append(0)

        def build(pairs=pairs):
            trainer = dpo_trainer(base, pairs, recipe, tmp_path / "sft", str(tmp_path))

            def count(*_):
                num_forwards[-1] += 1

            trainer.model.get_input_embeddings().register_forward_pre_hook(count)
            return trainer

        steps.append(steps_of(build, monitor))
    assert_same_steps(*steps)
    assert num_forwards == [3, 6]


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 2, 3, 4], [1, 2, 5]],
        [[1, 2], [1, 2, 3]],
        [[1, 2, 3], [1, 2]],
        [[1], [1]],
        [[1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 5, 7, 8], [1, 2, 5, 6]],
        [[1, 1, 2, 1], [1, 1, 1, 2], [2, 1, 1, 1]],
    ],
)
def test_states_of_rows_that_begin_alike_are_those_of_each_alone(
    make_base, items, recipe, tmp_path, rows
):
    base = make_base()
    with random_state_kept():
        model = sft_trainer(base, encoded(base, items), recipe, str(tmp_path)).model
    backbone = model.get_base_model().base_model.eval()
    assert isinstance(backbone.forward, _SharedBeginnings)
    read = []
    backbone.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: read.append(args[0].numel())
    )
    width = max(map(len, rows)) + 1
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    ids, mask = ids.to(backbone.device), mask.to(backbone.device)
    together = backbone(ids, attention_mask=mask).last_hidden_state
    assert read == [len({tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)})]
    for row, states in zip(rows, together, strict=True):
        alone = backbone(torch.tensor([row], device=ids.device)).last_hidden_state[0]
        torch.testing.assert_close(states[: len(row)], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("has_bias", [True, False])
def test_log_probabilities_under_a_frozen_head_are_exact(has_bias):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(300, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    weight, bias = (torch.randn(7, *size, generator=generator).double() for size in ((5,), ()))
    targets = torch.randint(7, (300,), generator=generator)
    bias = bias if has_bias else None
    expected = (1.5 * torch.nn.functional.linear(hidden, weight, bias)).log_softmax(-1)
    answer = _FrozenHead.apply(hidden, weight, bias, targets, 1.5)
    of_targets = expected[range(300), targets]
    torch.testing.assert_close(answer[0], of_targets.float(), check_dtype=False)
    entropy = torch.distributions.Categorical(logits=expected).entropy()
    torch.testing.assert_close(answer[1], entropy.float(), check_dtype=False)
    torch.testing.assert_close(answer[2], (expected.exp() ** 2).sum(-1).log().float())
    assert answer[4].tolist() == (expected.argmax(-1) == targets).tolist()
    upstream = torch.randn(300, generator=generator)
    (slope,) = torch.autograd.grad(answer[0], hidden, upstream, retain_graph=True)
    (true_slope,) = torch.autograd.grad(of_targets, hidden, upstream.double())
    torch.testing.assert_close(slope, true_slope, atol=1e-5, rtol=1e-5)


def test_the_slope_of_a_nearly_certain_token_survives_bfloat16():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(50, 64, generator=generator).bfloat16()
    targets = torch.arange(50)
    hidden = (weight / 6).clone().requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    of_targets = torch.log_softmax(exact @ weight.double().t(), -1)[targets, targets]
    assert of_targets.exp().median() > 0.99
    (true_slope,) = torch.autograd.grad(of_targets.sum(), exact)
    (slope,) = torch.autograd.grad(
        _FrozenHead.apply(hidden, weight, None, targets, 1.0)[0].sum(), hidden
    )
    errors = (slope - true_slope).norm(dim=-1) / true_slope.norm(dim=-1)
    assert errors.median() < 0.03


def test_logits_are_made_where_labels_are_and_nowhere_else(
    base, items, recipe, monitor, tmp_path, monkeypatch
):
    kernel, scored = fast._FrozenHead, []

    class Counted:
        @staticmethod
        def apply(hidden, *args):
            scored.append(len(hidden))
            return kernel.apply(hidden, *args)

    monkeypatch.setattr(fast, "_FrozenHead", Counted)
    examples = encoded(base, items)
    train_sft(base, examples, recipe, tmp_path / "sft", monitor)
    num_epochs = recipe.sft.epochs
    assert sum(scored) == num_epochs * sum(len(example.completion_ids) for example in examples)
    assert not trl.trainer.utils._use_triton(torch.device("cpu"))  # put back
    assert trl.trainer.utils._ChunkedLogProbFunction is ChunkedLogProbFunction


def test_other_trainings_get_the_log_probabilities_of_trl(base, monkeypatch):
    ours = []
    monkeypatch.setattr(fast, "_FrozenHead", SimpleNamespace(apply=lambda *args: ours.append(args)))
    own = base.model.get_output_embeddings().weight
    monkeypatch.setattr(own, "requires_grad", False)
    arguments = None, torch.tensor([1, 2]), 1.0, 4, None, 1.0, ()
    with logits_of_completions_alone(own):
        kernel = trl.trainer.utils._ChunkedLogProbFunction
        log_probs, *_ = kernel.apply(torch.ones(2, 5), torch.ones(7, 5), *arguments)
        assert not ours
        kernel.apply(torch.ones(2, own.shape[1]), own, *arguments)
    assert log_probs.tolist() == pytest.approx([-math.log(7)] * 2)
    assert len(ours) == 1


@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients_of_the_adapted_layer_are_exact(is_masked, has_bias):
    generator = torch.Generator().manual_seed(1)

    def tensor(*shape, learnt=True):
        values = torch.randn(*shape, dtype=torch.float64, generator=generator)
        return values.requires_grad_(learnt)

    x, weight, bias = tensor(2, 3, 5), tensor(4, 5, learnt=False), tensor(4, learnt=False)
    a, b = tensor(2, 5), tensor(4, 2)
    noise = (torch.arange(30, dtype=torch.float64) % 3).view(2, 3, 5) if is_masked else None

    def layer(x, a, b):
        return _AdaptedLinear.apply(x, weight, bias if has_bias else None, a, b, 1.5, noise)

    wet = x if noise is None else x * noise
    expected = x @ weight.t() + 1.5 * (wet @ a.t() @ b.t()) + (bias if has_bias else 0)
    torch.testing.assert_close(layer(x, a, b), expected)
    # Gradients of A and B are rounded to float32 on the way, as peft keeps them.
    assert torch.autograd.gradcheck(layer, (x, a, b), atol=1e-4)


def test_dropout_leaves_out_its_share_and_keeps_the_mean():
    noise = _noise(1_000_000, 0.05, torch.device("cpu"), torch.float32)
    assert (noise == 0).float().mean() == pytest.approx(0.05, abs=1e-3)
    assert noise.mean() == pytest.approx(1.0, abs=1e-3)
    assert noise.unique().tolist() == pytest.approx([0, 1 / 0.95])


def test_dropout_acts_in_sft_and_differs_from_step_to_step(base, items, recipe, tmp_path):
    recipe = replace(recipe, sft=replace(recipe.sft, dropout=0.5))
    with random_state_kept():
        model = sft_trainer(base, encoded(base, items), recipe, str(tmp_path)).model
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)  # it starts at zero, where nothing shows
        ids = torch.tensor([[1, 2, 3]], device=model.device)
        first, second = (model.train()(input_ids=ids).logits for _ in range(2))
        third, fourth = (model.eval()(input_ids=ids).logits for _ in range(2))
    assert not torch.allclose(first, second)
    assert torch.equal(third, fourth)


def test_a_forward_that_checkpointing_repeats_drops_the_same(
    base, items, recipe, monitor, tmp_path, monkeypatch
):
    recipe = replace(recipe, sft=replace(recipe.sft, dropout=0.5))
    examples, steps = encoded(base, items), []
    for least in (base.num_parameters + 1, base.num_parameters):
        monkeypatch.setattr(trainer, "CHECKPOINTING_PARAMETERS", least)
        build = partial(sft_trainer, base, examples, recipe, str(tmp_path))
        steps.append(steps_of(build, monitor))
    assert_same_steps(*steps)


def test_trainings_that_overlap_leave_the_switch_as_it_was(base):
    head = base.model.get_output_embeddings().weight
    first, second = (logits_of_completions_alone(head) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert not trl.trainer.utils._use_triton(torch.device("cpu"))


def test_only_a_mask_of_padding_at_the_end_is_left_out():
    at_end = torch.tensor([[1, 1, 1], [1, 1, 0]])
    at_start = torch.tensor([[1, 1, 1], [0, 1, 1]])
    for mask, kept in ((at_end, False), (at_start, True), (at_end[:, None, None], True)):
        _, kwargs = _without_mask(torch.nn.Identity(), (), {"attention_mask": mask})
        assert (kwargs["attention_mask"] is mask) == kept
    assert _without_mask(torch.nn.Identity(), (), {})[1] == {}


def test_a_window_in_the_text_part_of_a_configuration_is_seen():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text = {"vocab_size": 16, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8}
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**sizes, **text, "num_hidden_layers": 2},
        vision_config={**sizes, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
    )
    with random_state_kept():
        model = AutoModelForCausalLM.from_config(config)
        lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    fast.speed_up(model)
    assert not isinstance(model.get_base_model().base_model.forward, _SharedBeginnings)


def test_attention_takes_normed_queries_in_float32_under_autocast():
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 1
    states = torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        answer, _ = _attention(module, states, states, states.bfloat16(), None)
    expected, _ = sdpa_attention_forward(module, states, states, states, None)
    torch.testing.assert_close(answer, expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("length", [7, SHORT_TEXT, SHORT_TEXT + 1])
def test_short_texts_get_attention_in_float32(length):
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 1
    generator = torch.Generator().manual_seed(2)
    states = [torch.randn(1, 2, length, 16, generator=generator).bfloat16() for _ in range(3)]
    ours, _ = _attention(module, *states, None)
    in_dtype, _ = sdpa_attention_forward(module, *states, None)
    in_float32, _ = sdpa_attention_forward(module, *(state.float() for state in states), None)
    expected = in_float32.bfloat16() if length <= SHORT_TEXT else in_dtype
    assert torch.equal(ours, expected)
    assert ours.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_gets_that_attention_and_the_base_keeps_its_own(
    make_base, items, recipe, monitor, tmp_path, dtype
):
    base = load_base(make_base().name, device="cpu", dtype=dtype)
    losses, _ = steps_of(
        lambda: sft_trainer(base, encoded(base, items), recipe, str(tmp_path)), monitor
    )
    with random_state_kept():
        built = sft_trainer(base, encoded(base, items), recipe, str(tmp_path))
    assert built.model.config._attn_implementation == ATTENTION
    assert base.model.config._attn_implementation == "sdpa"
    assert losses[-1] < losses[0]
