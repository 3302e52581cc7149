"""One forward over rows of different lengths.

Every architecture equals its own uncached forward or is refused by name.
"""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny as tiny_models
import torch
from engine.reference import Reference, Tally

from langchain_cope.engine import (
    Completion,
    Contrast,
    Engine,
    EngineOptions,
    Request,
    Sampling,
    load_base,
)
from langchain_cope.engine.device import release_thread_pool
from langchain_cope.engine.forward.fused_weights import fused
from langchain_cope.engine.forward.llama import LlamaForward
from langchain_cope.engine.forward.matmul_order import (
    ROWS,
    MatmulOrder,
    usual_weights,
    weight_first,
)
from langchain_cope.engine.forward.plain import PlainForward
from langchain_cope.errors import ModelError

Tiny = Callable[..., Path]
_SMALL = tiny_models._SMALL
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3}
MORE: dict[str, dict[str, Any]] = {
    "phi3": _SMALL,
    "olmo2": _SMALL,
    "cohere": _SMALL,
    "granite": {
        **_SMALL,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
    },
    "smollm3": _SMALL,
    "gemma3_text": {**_SMALL, "head_dim": 8, "sliding_window": 12},
    "gpt_oss": {**_SMALL, "head_dim": 8, "num_local_experts": 4, "sliding_window": 12},
    "mixtral": {**_SMALL, "num_local_experts": 4, "sliding_window": None},
    "llama4_text": {
        **_SMALL,
        "head_dim": 8,
        "num_local_experts": 4,
        "attention_chunk_size": 12,
        "intermediate_size_mlp": 48,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
    "falcon": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.3,
    },
    "mpt": {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "max_seq_len": 256,
        "initializer_range": 0.3,
    },
    "gptj": {**_GPT, "rotary_dim": 4},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 32,
        "init_std": 0.3,
    },
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": (
        {"hidden_size": 32, "num_hidden_layers": 2},
        "MambaForCausalLM .* not plain attention",
    ),
    "jamba": (_SMALL, "JambaForCausalLM .* not plain attention"),
    "gpt_neo": (
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
        },
        "GPTNeoForCausalLM .*local attention of its own",
    ),
}


def prompt_of(length: int) -> list[int]:
    return torch.randint(
        3, 380, (length,), generator=torch.Generator().manual_seed(length)
    ).tolist()


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, Any]], Path]:
    def make(family: str, fields: dict[str, Any]) -> Path:
        monkeypatch.setitem(tiny_models.FAMILIES, family, fields)
        return tiny_models.make_model(tmp_path / family, family)

    return make


@pytest.mark.filterwarnings("ignore")  # third parties' about their own tiny configurations
@pytest.mark.parametrize("family", MORE)
def test_answers_among_others_equal_plain_forwards_without_a_cache(
    family: str, make: Callable[..., Path], adapter: Tiny, tmp_path: Path
) -> None:
    base = make(family, MORE[family])
    targets: Any = "all-linear"
    if family in ("gpt_oss", "llama4_text", "mixtral"):
        targets = ["q_proj", "v_proj"]
    folder = tiny_models.make_adapter(tmp_path / "adapter", base, seed=1, targets=targets)
    engine = Engine(load_base(base, device=tiny_models.DEVICE, dtype="float32"))
    ann, reference, tally = engine.load_adapter(folder), Reference(base, folder), Tally()
    requests = [
        Request(prompt_of(n), ann, Contrast(0.3), Sampling(max_tokens=15)) for n in (4, 33, 17)
    ]
    for request, answer in zip(requests, engine.generate(requests), strict=True):
        tally.compare(reference, list(request.prompt), list(answer.token_ids), 0.3, 0.1, family)
    engine.close()
    assert tally.differences == []
    assert tally.num_tokens > 10


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", REFUSED)
def test_what_is_not_plain_attention_is_refused_by_name(
    family: str, make: Callable[..., Path]
) -> None:
    fields, message = REFUSED[family]
    base = load_base(make(family, fields), device="cpu", dtype="float32")
    with pytest.raises(ModelError, match=message):
        Engine(base)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_common_architecture_takes_the_short_way_and_others_their_own(
    family: str, tiny: Tiny, engine_for: Callable[..., Engine]
) -> None:
    assert isinstance(engine_for(tiny(family))._batch.forward, LlamaForward)
    for other in ("gemma", "mistral", "gpt2"):
        assert isinstance(engine_for(tiny(other))._batch.forward, PlainForward)


def test_a_model_that_only_looks_like_llama_is_found_out(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    """Granite's layers have Llama's parts, and multipliers between them."""
    model = load_base(make("granite", MORE["granite"]), device="cpu", dtype="float32").skeleton()
    assert LlamaForward.of(model, MatmulOrder(frozenset())) is not None
    engine = Engine(load_base(tmp_path / "granite", device="cpu", dtype="float32"))
    assert isinstance(engine._batch.forward, PlainForward)
    engine.close()


def test_projections_lie_side_by_side_in_one_storage_and_keep_their_values(
    tiny: Tiny, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny("qwen2"), tmp_path / "base")
    base = load_base(tmp_path / "base", device="cpu", dtype="float32")
    fresh = AutoModelForCausalLM.from_pretrained(tiny("qwen2"))
    parameters = zip(base.model.named_parameters(), fresh.named_parameters(), strict=True)
    for (name, mine), (_, original) in parameters:
        assert torch.equal(mine, original), name

    attention = base.skeleton().model.layers[0].self_attn
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    common = fused(weights)
    assert common is not None
    assert torch.equal(common, torch.cat(weights))
    pristine = base.model.model.layers[0].self_attn.q_proj.weight
    assert common.untyped_storage().data_ptr() == pristine.untyped_storage().data_ptr()

    storages = [parameter.untyped_storage() for parameter in base.model.parameters()]
    stored = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert sum(stored.values()) == sum(p.numel() * p.element_size() for p in fresh.parameters())
    assert fused([weights[0], weights[2]]) is None
    assert fused([attention.q_proj.bias, None]) is None


@pytest.mark.parametrize("bias", [None, torch.randn(7)])
def test_both_orders_of_a_product_are_the_same(bias: torch.Tensor | None) -> None:
    states, weight = torch.randn(3, 5, 11), torch.randn(7, 11)
    expected = torch.nn.functional.linear(states, weight, bias)
    torch.testing.assert_close(weight_first(states, weight, bias), expected)
    large = torch.randn(600, 512)
    for rows in (1, 2, 3, 100):
        some = torch.randn(rows, 512)
        for order in (MatmulOrder(frozenset({2, 4})), MatmulOrder(frozenset())):
            product = order(some, large, None)
            torch.testing.assert_close(product, some @ large.t(), atol=1e-3, rtol=1e-4)


def test_the_order_is_measured_without_harm(tiny: Tiny) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(3)))
    weights = usual_weights(model.requires_grad_(False))
    assert len(weights) == 3
    assert MatmulOrder.measured(weights).weight_first <= set(ROWS)
    assert usual_weights(torch.nn.Linear(4, 4)) == []


def test_letting_go_of_threads_changes_no_result() -> None:
    left, right = torch.randn(600, 600), torch.randn(600, 600)
    expected = left @ right
    products = []

    def work() -> None:
        release_thread_pool()
        products.append(left @ right)
        release_thread_pool()
        release_thread_pool()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for product in (*products, left @ right):
        torch.testing.assert_close(product, expected)


def test_the_llama_forward_equals_the_models_own(tiny: Tiny, adapter: Tiny) -> None:
    base = load_base(tiny("qwen3"), device=tiny_models.DEVICE, dtype="float32")
    llama, plain = (Engine(base, EngineOptions(speculation=False)) for _ in range(2))
    plain._batch.forward = PlainForward(base.skeleton(), MatmulOrder(frozenset()))
    plain._batch._decode_rows = plain._batch.new_rows()
    plain._batch._prefill_rows = plain._batch.new_rows()
    folder = adapter(tiny("qwen3"), seed=1)
    sampling = Sampling(max_tokens=20)

    def answers(engine: Engine) -> list[Completion]:
        ann = engine.load_adapter(folder)
        return engine.generate(
            [Request(prompt_of(n), ann, Contrast(0.3), sampling, logprobs=True) for n in (3, 20)]
        )

    for one, other in zip(answers(llama), answers(plain), strict=True):
        assert one.token_ids == other.token_ids
        for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
            assert mine.log_p_user == pytest.approx(theirs.log_p_user, abs=1e-4)
            assert mine.log_p_base == pytest.approx(theirs.log_p_base, abs=1e-4)
    llama.close()
    plain.close()
