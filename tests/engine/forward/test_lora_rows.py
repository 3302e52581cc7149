"""Adapters of any rank, scaling and target modules in one batch equal peft's own.

Everything else is refused by name.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.reference import Reference
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import change_config, make_adapter
from transformers import AutoModelForCausalLM

from langchain_cope.engine import Contrast, Engine, Request, Sampling, load_base
from langchain_cope.engine.forward.inputs import Inputs
from langchain_cope.engine.forward.llama import LlamaForward
from langchain_cope.engine.forward.lora_rows import LoraRows
from langchain_cope.engine.forward.matmul_order import MatmulOrder
from langchain_cope.engine.forward.plain import PlainForward
from langchain_cope.errors import ModelError

Tiny = Callable[..., Path]

KINDS: dict[str, dict[str, Any]] = {
    "q and v, rank 2, strong": {"targets": ["q_proj", "v_proj"], "rank": 2, "lora_alpha": 16},
    "all linear layers, rank 7": {"targets": "all-linear", "rank": 7, "lora_alpha": 5},
    "rsLoRA": {
        "targets": ["k_proj", "o_proj", "up_proj"],
        "rank": 6,
        "lora_alpha": 9,
        "use_rslora": True,
    },
    "rank and alpha patterns": {
        "targets": ["q_proj", "v_proj", "down_proj"],
        "rank": 3,
        "lora_alpha": 4,
        "rank_pattern": {"v_proj": 8, r"layers\.1\.self_attn\.q_proj": 1},
        "alpha_pattern": {"v_proj": 20, r"layers.0.mlp.down_proj": 1},
    },
    "the last layer only": {"targets": ["gate_proj"], "rank": 4, "layers_to_transform": [1]},
    "a pattern for the modules": {"targets": r".*\.0\..*(q|o)_proj", "rank": 4},
    "rsLoRA with patterns": {
        "targets": ["q_proj"],
        "rank": 4,
        "use_rslora": True,
        "rank_pattern": {r"^model\.layers\.0.*": 2},
        "alpha_pattern": {r".*layers.1.*": 3},
    },
}


def prompt_of(length: int) -> list[int]:
    return torch.randint(
        3, 380, (length,), generator=torch.Generator().manual_seed(length)
    ).tolist()


def test_mixed_adapters_in_one_batch_equal_pefts_own_each(
    tiny: Tiny, adapter: Tiny, engine: Engine
) -> None:
    base = tiny("llama")
    folders = [
        adapter(base, seed=seed, **kind) for seed, kind in enumerate(KINDS.values(), start=20)
    ]
    sampling = Sampling(max_tokens=8)
    requests = [
        Request(
            prompt_of(4 + 3 * index),
            engine.load_adapter(folder),
            Contrast(0.1),
            sampling,
            logprobs=True,
        )
        for index, folder in enumerate(folders)
    ]
    for kind, folder, request, answer in zip(
        KINDS, folders, requests, engine.generate(requests), strict=True
    ):
        reference = Reference(base, folder)
        user, alone = reference.log_probs([*request.prompt, *answer.token_ids])
        rows = range(len(request.prompt) - 1, len(request.prompt) - 1 + len(answer.token_ids))
        reported = torch.tensor([[t.log_p_user, t.log_p_base] for t in answer.logprobs]).double()
        expected = torch.tensor(
            [[user[r, t], alone[r, t]] for r, t in zip(rows, answer.token_ids, strict=True)]
        )
        torch.testing.assert_close(
            reported, expected, atol=2e-4, rtol=0, msg=lambda text, kind=kind: f"{kind}: {text}"
        )
        assert (expected[:, 0] - expected[:, 1]).abs().max() > 0.01, (
            f"{kind}: the adapter must matter"
        )


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_fused_projections_and_conv1d_equal_peft(
    family: str, tiny: Tiny, adapter: Tiny, engine_for: Any
) -> None:
    base = tiny(family)
    folder = adapter(
        base, seed=31, rank=5, **({"fan_in_fan_out": True} if family == "gpt2" else {})
    )
    prompt, completion = prompt_of(9), prompt_of(6)
    scores = engine_for(base).score([(prompt, completion)], engine_for(base).load_adapter(folder))[
        0
    ]
    user, _ = Reference(base, folder).log_probs(prompt + completion)
    expected = (
        user[len(prompt) - 1 : -1].gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)
    )
    torch.testing.assert_close(scores.double(), expected, atol=1e-4, rtol=0)


def test_one_users_adapter_leaves_the_others_answers_alone(
    tiny: Tiny, adapter: Tiny, engine: Engine
) -> None:
    ann, bob = (engine.load_adapter(adapter(tiny("llama"), seed=seed)) for seed in (1, 2))
    sampling = Sampling(max_tokens=12)

    def request(user: Any) -> Request:
        return Request(prompt_of(10), user, Contrast(0.5), sampling)

    alone = [engine.generate([request(user)])[0].token_ids for user in (ann, bob, None)]
    assert len(set(alone)) == 3
    together = [
        answer.token_ids for answer in engine.generate([request(user) for user in (ann, bob, None)])
    ]
    assert together == alone
    assert engine.generate([request(None)])[0].token_ids == alone[2], (
        "nothing of a user stays behind"
    )


def test_few_adapters_of_many_rows_lie_in_memory_once_each(
    tiny: Tiny, adapter: Tiny, engine: Engine
) -> None:
    ann, bob = (engine.load_adapter(adapter(tiny("llama"), seed=seed)) for seed in (1, 2))
    users = [ann, bob, bob, None, ann, bob, ann]
    requests = [
        Request(prompt_of(5 + index), user, Contrast(0.5), Sampling(max_tokens=9), logprobs=True)
        for index, user in enumerate(users)
    ]
    lora = LoraRows(engine._batch.forward.sites, torch.empty(0))
    lora.set([user for user in users if user is not None])
    assert {len(stack.down) for stack in lora._stacks.values()} == {2}
    together = engine.generate(requests)
    for request, answer in zip(requests, together, strict=True):
        (alone,) = engine.generate([request])
        assert answer.token_ids == alone.token_ids
        for one, other in zip(answer.logprobs, alone.logprobs, strict=True):
            assert one.log_p_user == pytest.approx(other.log_p_user, abs=1e-4)


def test_one_adapter_of_all_rows_takes_states_that_lie_otherwise(
    tiny: Tiny, adapter: Tiny, engine: Engine
) -> None:
    ann = engine.load_adapter(adapter(tiny("llama"), seed=1))
    lora = LoraRows(engine._batch.forward.sites, torch.empty(0))
    lora.set([ann] * 4)
    site, stack = next(iter(lora._stacks.items()))
    states = torch.randn(3, 4, stack.down.shape[1]).transpose(0, 1)
    added, expected = (torch.zeros(4, 3, sum(site.sizes)) for _ in range(2))
    lora.add(site, states, added)
    lora.add(site, states.contiguous(), expected)
    assert torch.equal(added, expected)


def test_broken_matrices_beside_a_users_own_leave_that_user_alone(
    tiny: Tiny, adapter: Tiny, engine: Engine
) -> None:
    ann, bob = (engine.load_adapter(adapter(tiny("llama"), seed=seed)) for seed in (1, 2))
    lora = LoraRows(engine._batch.forward.sites, torch.empty(0))
    lora.set([ann, bob, ann, bob])
    site, stack = next(iter(lora._stacks.items()))
    states = torch.randn(4, 3, stack.down.shape[1])
    good = torch.zeros(4, 3, sum(site.sizes))
    lora.add(site, states, good)
    stack.down[1], stack.up[1] = torch.inf, torch.nan
    spoilt = torch.zeros_like(good)
    lora.add(site, states, spoilt)
    assert torch.equal(spoilt[::2], good[::2])
    assert spoilt[1::2].isnan().any()


@pytest.fixture
def folder(tiny: Tiny, adapter: Tiny, tmp_path: Path) -> Path:
    """A copy of a good adapter, to be spoilt."""
    copy = tmp_path / "adapter"
    shutil.copytree(adapter(tiny("llama"), seed=1), copy)
    return copy


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"peft_type": "ADALORA"}, "peft_type 'ADALORA'"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "trained biases"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"lora_bias": True}, "trained biases"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ],
    ids=str,
)
def test_what_is_not_plain_lora_is_refused_by_name(
    option: dict[str, Any], named: str, folder: Path, engine: Engine
) -> None:
    change_config(folder, **option)
    with pytest.raises(ModelError, match=named):
        engine.load_adapter(folder)


@pytest.mark.parametrize("option", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_real_folders_of_peft_with_more_than_lora_are_refused(
    option: dict[str, Any], tiny: Tiny, engine: Engine, tmp_path: Path
) -> None:
    target = tmp_path / "adapter"
    more = make_adapter(target, tiny("llama"), seed=1, targets=["q_proj"], **option)
    with pytest.raises(ModelError, match=next(iter(option))):
        engine.load_adapter(more)


def test_a_real_folder_of_another_kind_of_peft_is_refused(
    tiny: Tiny, engine: Engine, tmp_path: Path
) -> None:
    settings = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny("llama")), settings).save_pretrained(
        tmp_path
    )
    with pytest.raises(ModelError, match="peft_type 'IA3'"):
        engine.load_adapter(tmp_path)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_embedding_lora_is_refused(tiny: Tiny, engine: Engine, tmp_path: Path) -> None:
    targets = ["embed_tokens", "q_proj"]
    embedding = make_adapter(tmp_path / "adapter", tiny("llama"), seed=1, targets=targets)
    with pytest.raises(ModelError, match="LoRA on embeddings"):
        engine.load_adapter(embedding)


def test_an_adapter_of_a_wider_base_is_refused_with_both_shapes(
    tiny: Tiny, adapter: Tiny, engine: Engine
) -> None:
    other = adapter(tiny("llama", hidden_size=48), seed=1, targets=["q_proj"])
    with pytest.raises(
        ModelError, match=r"A \(4, 48\) and B \(48, 4\) for '.*q_proj'.* 32 inputs and 32 outputs"
    ):
        engine.load_adapter(other)


def test_an_adapter_of_another_architecture_is_refused_with_the_modules_name(
    tiny: Tiny, adapter: Tiny, engine: Engine
) -> None:
    other = adapter(tiny("gpt2"), seed=1, targets=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(
        ModelError, match=r"'transformer\.h\.0\.attn\.c_attn', which this base does not have"
    ):
        engine.load_adapter(other)


def test_half_a_pair_is_refused(folder: Path, engine: Engine) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    change_weights(folder, lambda tensors: tensors.pop(key))
    with pytest.raises(ModelError, match=r"only lora_A for 'model\.layers\.0\.self_attn\.q_proj'"):
        engine.load_adapter(folder)


def test_matrices_on_what_is_no_linear_layer_are_refused(folder: Path, engine: Engine) -> None:
    name = "base_model.model.model.norm"
    pair = {f"{name}.lora_A.weight": torch.ones(1, 32), f"{name}.lora_B.weight": torch.ones(32, 1)}
    change_weights(folder, lambda tensors: tensors.update(pair))
    with pytest.raises(ModelError, match="LlamaRMSNorm, not a linear layer"):
        engine.load_adapter(folder)


def test_unknown_tensors_are_refused_by_name(folder: Path, engine: Engine) -> None:
    change_weights(
        folder, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(2)})
    )
    with pytest.raises(
        ModelError, match=r"tensor 'base_model\.model\.lm_head\.weight' is no LoRA matrix"
    ):
        engine.load_adapter(folder)


def test_a_folder_without_matrices_is_refused(folder: Path, engine: Engine) -> None:
    change_weights(folder, lambda tensors: tensors.clear())
    with pytest.raises(ModelError, match="holds no LoRA matrices"):
        engine.load_adapter(folder)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(missing: str, folder: Path, engine: Engine) -> None:
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=rf"no adapter in .* are needed, {missing} missing"):
        engine.load_adapter(folder)


def test_a_folder_that_is_not_there_is_named(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no adapter in .*nowhere"):
        engine.load_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5])
def test_truncated_weights_are_refused(keep: float, folder: Path, engine: Engine) -> None:
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ModelError, match=r"the adapter in .* cannot be read"):
        engine.load_adapter(folder)


@pytest.mark.parametrize(
    ("text", "named"),
    [("{", "cannot be read"), ("\xff", "cannot be read"), ("[]", "one JSON object")],
)
def test_a_config_that_is_no_json_object_is_refused(
    text: str, named: str, folder: Path, engine: Engine
) -> None:
    (folder / "adapter_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=named):
        engine.load_adapter(folder)


@pytest.mark.parametrize(
    "option",
    [
        {"lora_alpha": "much"},
        {"lora_alpha": None},
        {"alpha_pattern": {"(": 3}},
        {"alpha_pattern": [1]},
    ],
    ids=str,
)
def test_a_scaling_that_cannot_be_read_is_refused(
    option: dict[str, Any], folder: Path, engine: Engine
) -> None:
    change_config(folder, **option)
    with pytest.raises(ModelError, match="lora_alpha or alpha_pattern cannot be read"):
        engine.load_adapter(folder)


def test_no_pickle_is_ever_read(folder: Path, engine: Engine) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="safetensors missing"):
        engine.load_adapter(folder)


@pytest.mark.parametrize("num_tokens", [3, 40])
def test_small_changes_are_not_lost_in_sums_in_bfloat16(
    tiny: Tiny, adapter: Tiny, num_tokens: int
) -> None:
    folder = tiny("llama")
    engine = Engine(load_base(folder, device="cpu", dtype="bfloat16"))
    weak = engine.load_adapter(adapter(folder, targets="all-linear")).scaled(0.01)
    forward = engine._batch.forward
    assert isinstance(forward, LlamaForward)
    product = forward._layers[0].gate_up
    lora = LoraRows(forward.sites, torch.empty(0))
    lora.set([weak])
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(1, num_tokens, product.weight.shape[1], generator=generator).bfloat16()
    alone = product(states, forward._order).double()
    changes = [
        weak.scale * (states.double() @ weak.pairs[path][0].double() @ weak.pairs[path][1].double())
        for path in product.site.paths
    ]
    expected = torch.cat(changes, dim=-1)
    # A whole product, rounded, would lose most of it: the change is below its last digit.
    assert expected.abs().mean() < alone.abs().mean() / 2**8
    changed = forward._product(product, states, lora).double() - alone
    assert (changed - expected).norm() < 0.02 * expected.norm()
    engine.close()


@pytest.mark.parametrize("weight_first", [False, True])
@pytest.mark.parametrize(("num_rows", "num_tokens"), [(40, 8), (8, 40)])
@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("gemma", "model.layers.0.mlp.gate_proj"),
        ("gpt_neox", "gpt_neox.layers.0.mlp.dense_h_to_4h"),
    ],
)
def test_other_architectures_keep_small_changes_in_bfloat16_too(
    tiny: Tiny,
    adapter: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    layer: str,
    num_rows: int,
    num_tokens: int,
    weight_first: bool,
) -> None:
    monkeypatch.setattr(MatmulOrder, "_wants_weight_first", lambda *_: weight_first)
    folder = tiny(family)
    engine = Engine(load_base(folder, device="cpu", dtype="bfloat16"))
    weak = engine.load_adapter(adapter(folder, targets="all-linear")).scaled(0.01)
    forward = engine._batch.forward
    assert isinstance(forward, PlainForward)
    down, up = (matrix.double() for matrix in weak.pairs[layer])
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(num_rows, num_tokens, len(down), generator=generator).bfloat16()
    multiply = forward._modules[layer].forward
    alone = multiply(states).double()
    expected = weak.scale * (states.double() @ down @ up)
    assert expected.abs().mean() < alone.abs().mean() / 2**8
    lora = LoraRows(forward.sites, torch.empty(0))
    lora.set([weak] * num_rows)
    ids = torch.zeros(num_rows, num_tokens, dtype=torch.long)
    forward._inputs = Inputs(ids, ids, engine._batch.new_rows().kv, num_tokens, lora, [], [])
    changed = multiply(states).double() - alone
    # One by one they are below the last digit, but on average nothing of them is lost.
    share = (changed * expected).sum() / expected.square().sum()
    assert share == pytest.approx(1, abs=0.05)
    engine.close()
