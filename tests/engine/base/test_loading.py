"""One base in memory: loaded once, refused with a reason, shared without being changed."""

import copy
import io
import json
import logging
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import NO_SYSTEM
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from langchain_cope.engine import Base, Contrast, Engine, Request, Sampling, load_base
from langchain_cope.engine.base.chat_template import PLAIN_TEMPLATE
from langchain_cope.errors import CopeError, InputError, ModelError, ModelNotFound

Tiny = Callable[..., Path]
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_starter_loads_offline_in_float32_on_a_cpu() -> None:
    base = load_base("starter", device="cpu")
    assert (base.name, base.dtype, base.device.type) == ("starter", torch.float32, "cpu")
    assert base.num_parameters > 10**6
    assert base.tokenizer.chat_template
    config = base.model.config
    assert base.context == min(config.max_position_embeddings, base.tokenizer.model_max_length)
    assert base.tokenizer.eos_token_id in base.eos_ids
    assert load_base(device="cpu") is base, "it is the default"


def test_the_same_arguments_give_the_same_object(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny("llama")
    base = load_base(folder, device="cpu")
    assert load_base(str(folder), device=torch.device("cpu")) is base
    monkeypatch.chdir(folder.parent)
    assert load_base(f"./{folder.name}", device="cpu") is base, "however a path is spelt"
    half = load_base(folder, device="cpu", dtype="bfloat16")
    assert half is not base
    assert load_base(folder, device="cpu", dtype=torch.bfloat16) is half
    assert (base.dtype, half.dtype) == (torch.float32, torch.bfloat16)


def test_many_threads_that_ask_at_once_get_one_base(tiny: Tiny) -> None:
    folder = tiny("llama", seed=77)
    bases: list[Base] = []

    def load() -> None:
        bases.append(load_base(folder, device="cpu"))

    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(bases) == 6
    assert len({id(base) for base in bases}) == 1


@pytest.mark.parametrize(
    "name",
    ["nobody/no-such-model", "no-such-model", "/no/such/folder", "./nowhere", "~/nowhere-either"],
)
def test_an_unknown_model_is_named_with_what_to_give(name: str) -> None:
    message = "give 'smollm2', 'starter', a Hugging Face id, a GGUF file or a folder"
    with pytest.raises(ModelNotFound, match=message) as caught:
        load_base(name, device="cpu")
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


HOSTILE = {"empty": "", "NUL": "a\0b", "long": "x" * 5000, "emoji": "🙂/🙂", "space": "../../x y"}


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_name_is_an_error_of_ours(name: str) -> None:
    with pytest.raises(CopeError):
        load_base(name, device="cpu")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelNotFound, match="no model at the path"):
        load_base(tmp_path, device="cpu")


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"model_type": "no such type"}'])
def test_a_damaged_config_is_an_error_of_ours(damage: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    (folder / "config.json").write_text(damage)
    with pytest.raises(CopeError, match="cannot be loaded"):
        load_base(folder, device="cpu")


CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
Path("ran").touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
OWN_CONFIG = {
    "model_type": "own",
    "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
}
OWN_TOKENIZER = {
    "tokenizer_class": "OwnTokenizer",
    "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
}
REMOTE_CODE: dict[str, dict[str, dict[str, object]]] = {
    "config and model": {"config.json": OWN_CONFIG},
    "model": {"config.json": {"model_type": "vit", "auto_map": OWN_CONFIG["auto_map"]}},
    "tokenizer": {"tokenizer_config.json": OWN_TOKENIZER},
    "everything": {"config.json": OWN_CONFIG, "tokenizer_config.json": OWN_TOKENIZER},
}


@pytest.mark.parametrize("changes", REMOTE_CODE.values(), ids=REMOTE_CODE)
def test_a_bases_own_code_never_runs_and_nobody_is_asked(
    changes: dict[str, dict[str, object]],
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    (folder / "own.py").write_text(CODE)
    for name, fields in changes.items():
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    monkeypatch.chdir(tmp_path)
    answers = io.StringIO("y\n" * 9)
    monkeypatch.setattr(sys, "stdin", answers)
    with pytest.raises(ModelError, match=r"Python code of its own .* never run here: give a base"):
        load_base(folder, device="cpu")
    assert answers.tell() == 0, "standard input is not read"
    assert not list(tmp_path.rglob("ran"))


def test_truncated_weights_are_an_error_of_ours(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(folder, device="cpu")


@pytest.mark.parametrize("dtype", ["float16", torch.float16])
def test_float16_on_a_cpu_is_refused_with_a_reason(dtype: object, tiny: Tiny) -> None:
    with pytest.raises(InputError, match="float16 on a CPU is an order of magnitude slower"):
        load_base(tiny("llama"), device="cpu", dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float12", "int8", "Tensor", ""])
def test_an_unknown_dtype_is_refused_by_name(dtype: str, tiny: Tiny) -> None:
    message = f"dtype must be float32, bfloat16 or float16, not '{dtype}'"
    with pytest.raises(InputError, match=message):
        load_base(tiny("llama"), device="cpu", dtype=dtype)


@pytest.mark.parametrize("device", ["tpu9000", "cuda:x"])
def test_an_unknown_device_is_refused_by_name(device: str, tiny: Tiny) -> None:
    with pytest.raises(InputError, match=f"device must be cpu, cuda, .* not '{device}'"):
        load_base(tiny("llama"), device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_this_machine_lacks_is_refused(tiny: Tiny) -> None:
    with pytest.raises(InputError, match=r"device 'cuda' was asked for, but torch .* finds none"):
        load_base(tiny("llama"), device="cuda")


def test_a_float16_checkpoint_is_computed_in_float32_on_a_cpu(tiny: Tiny, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny("llama")).half().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(tmp_path)
    assert load_base(tmp_path, device="cpu").dtype == torch.float32


def test_a_base_without_a_chat_template_gets_the_plain_one(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "langchain_cope"):
        base = load_base(tiny("llama", template=None, seed=5), device="cpu")
    assert "has no chat template; the plain one is used" in caplog.text
    assert base.tokenizer.chat_template == PLAIN_TEMPLATE
    ids = base.prompt_ids([*TALK, {"role": "assistant", "content": "Hi"}, TALK[1]])
    assert base.tokenizer.decode(ids) == (
        "System: Be brief.<|im_end|>\nUser: Hello<|im_end|>\n"
        "Assistant: Hi<|im_end|>\nUser: Hello<|im_end|>\nAssistant:"
    )


def test_a_refused_system_message_is_merged_into_the_first_user_turn(tiny: Tiny) -> None:
    base = load_base(tiny("gemma", template=NO_SYSTEM), device="cpu")
    text = base.tokenizer.decode(base.prompt_ids(TALK))
    assert text == "<|im_start|>user\nBe brief.\n\nHello<|im_end|>\n<|im_start|>model\n"
    only_system = base.tokenizer.decode(base.prompt_ids(TALK[:1]))
    assert only_system == "<|im_start|>user\nBe brief.<|im_end|>\n<|im_start|>model\n"


def test_a_template_that_takes_the_system_message_gets_it(tiny: Tiny) -> None:
    base = load_base(tiny("llama"), device="cpu")
    text = base.tokenizer.decode(base.conversation_ids(TALK))
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"


def test_a_conversation_refused_for_another_reason_is_an_input_error(tiny: Tiny) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    base = load_base(tiny("llama", template=template), device="cpu")
    message = "chat template refuses this conversation: roles must alternate"
    with pytest.raises(InputError, match=message):
        base.prompt_ids(TALK)


@pytest.mark.parametrize(
    ("model_limit", "tokenizer_limit", "context"),
    [(256, 100, 100), (64, 256, 64), (256, 10**30, 256)],
)
def test_the_context_is_the_smaller_limit_that_is_real(
    model_limit: int, tokenizer_limit: int, context: int, tiny: Tiny, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    for file, field, limit in [
        ("config.json", "max_position_embeddings", model_limit),
        ("tokenizer_config.json", "model_max_length", tokenizer_limit),
    ]:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), field: limit}))
    assert load_base(folder, device="cpu").context == context


def test_the_context_of_gpt2_is_its_positions(tiny: Tiny) -> None:
    assert load_base(tiny("gpt2", n_positions=128), device="cpu").context == 128


def test_a_merged_task_adapter_equals_pefts_own_merge(tiny: Tiny, adapter: Tiny) -> None:
    folder, task = tiny("llama"), adapter(tiny("llama"), seed=9)
    base = load_base(folder, device="cpu", task_adapter=task)
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = PeftModel.from_pretrained(model, task).merge_and_unload()
    assert same(state(base.model), state(expected))
    assert load_base(folder, device="cpu", task_adapter=task) is base
    plain = load_base(folder, device="cpu")
    assert plain is not base
    assert not same(state(plain.model), state(base.model))
    assert not any(p.requires_grad for p in base.model.parameters())


def test_a_users_adapter_works_on_top_of_the_task_adapter(tiny: Tiny, adapter: Tiny) -> None:
    folder = tiny("llama")
    task, user = (adapter(folder, seed=seed) for seed in (9, 1))
    engine = Engine.of(load_base(folder, device="cpu", task_adapter=task))
    prompt, completion = [5, 6, 7], [8, 9, 10]
    scores = engine.score([(prompt, completion)], engine.load_adapter(user))[0]
    engine.close()
    model = AutoModelForCausalLM.from_pretrained(folder)
    merged = PeftModel.from_pretrained(model, task).merge_and_unload()
    personal = PeftModel.from_pretrained(merged, user)
    with torch.no_grad():
        logits = personal(input_ids=torch.tensor([prompt + completion])).logits[0, 2:-1]
    log_probs = logits.double().log_softmax(-1)
    expected = log_probs.gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(scores.double(), expected, atol=1e-4, rtol=0)


def test_a_task_adapter_that_does_not_fit_is_an_error_of_ours(tiny: Tiny, adapter: Tiny) -> None:
    other = adapter(tiny("llama", hidden_size=48), seed=1, targets=["q_proj"])
    with pytest.raises(ModelError, match="cannot be merged into this base"):
        load_base(tiny("llama"), device="cpu", task_adapter=other)
    with pytest.raises(ModelNotFound, match="no task adapter"):
        load_base(tiny("llama"), device="cpu", task_adapter="/no/such/adapter")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2_moe"])
def test_a_skeleton_shares_every_parameters_storage(family: str, tiny: Tiny) -> None:
    base = load_base(tiny(family), device="cpu")
    skeleton = base.skeleton()
    theirs = dict(base.model.named_parameters())
    ours = dict(skeleton.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)
    modules = {id(module) for module in base.model.modules()}
    assert not any(id(module) in modules for module in skeleton.modules())
    assert skeleton.config is not base.model.config


def test_training_a_skeleton_leaves_the_base_bit_for_bit(tiny: Tiny) -> None:
    base = load_base(tiny("llama"), device="cpu")
    before, modules = state(base.model), [name for name, _ in base.model.named_modules()]
    assert not any(p.is_inference() or p.requires_grad for p in base.model.parameters())
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    personal = get_peft_model(base.skeleton(), config)
    trained = [p for p in personal.parameters() if p.requires_grad]
    starts = [p.detach().clone() for p in trained]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    for _ in range(2):  # B starts at zero: A moves at the second step only
        optimizer.zero_grad()
        personal(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    moved = [not torch.equal(p, start) for p, start in zip(trained, starts, strict=True)]
    assert all(moved), "every LoRA matrix moved"
    assert same(state(base.model), before)
    assert [name for name, _ in base.model.named_modules()] == modules
    assert not any(p.requires_grad for p in base.model.parameters())


def test_answering_leaves_the_base_bit_for_bit(tiny: Tiny, adapter: Tiny) -> None:
    base = load_base(tiny("llama"), device="cpu")
    before, config = state(base.model), copy.deepcopy(base.model.config.to_dict())
    engine = Engine.of(base)
    user = engine.load_adapter(adapter(tiny("llama"), seed=1))
    engine.generate([Request([5, 6, 7], user, Contrast(0.5), Sampling(max_tokens=5))])
    assert same(state(base.model), before)
    assert base.model.config.to_dict() == config
    assert not any(module._forward_hooks for module in base.model.modules())


HYBRIDS: dict[str, dict[str, object]] = {
    "mamba": {"hidden_size": 32, "state_size": 4},
    "lfm2": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention"],
    },
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "context_length": 64},
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_an_architecture_with_another_kind_of_state_is_refused_by_name(
    family: str, tiny: Tiny, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(family, num_hidden_layers=2, vocab_size=384, **HYBRIDS[family])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(tmp_path)
    base = load_base(tmp_path, device="cpu")
    message = rf"(?i){family}ForCausalLM keeps a state that is not plain attention"
    with pytest.raises(ModelError, match=message):
        Engine.of(base)


def test_loading_shows_no_progress_bars_and_leaves_the_setting_alone(
    tiny: Tiny, capfd: pytest.CaptureFixture[str]
) -> None:
    assert transformers_logging.is_progress_bar_enabled()
    load_base(tiny("llama", seed=78), device="cpu")
    capfd.readouterr()
    load_base(tiny("llama", seed=78), device="cpu", dtype="bfloat16")
    assert capfd.readouterr().err == ""
    assert transformers_logging.is_progress_bar_enabled()
