"""What an adapter is bound to: a harmless re-save changes nothing, other changes their own part."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from langchain_cope.engine import load_base

Tiny = Callable[..., Path]


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be changed."""
    return shutil.copytree(tiny("llama"), tmp_path / "copy")


def fingerprint(folder: Path, **settings: object) -> dict[str, str]:
    return load_base(folder, device="cpu", **settings).fingerprint()  # type: ignore[arg-type]


def differing(one: dict[str, str], other: dict[str, str]) -> set[str]:
    assert one.keys() == other.keys()
    return {part for part in one if one[part] != other[part]} - {"model"}


def change_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_it_has_the_parts_that_a_refusal_names(tiny: Tiny) -> None:
    parts = fingerprint(tiny("llama"))
    digests = {"architecture", "weights", "tokenizer", "chat_template"}
    assert parts.keys() == {*digests, "model", "task_adapter", "quantization"}
    assert all(isinstance(value, str) for value in parts.values())
    assert parts["model"] == str(tiny("llama"))
    assert parts["task_adapter"] == parts["quantization"] == "none"
    for part in digests:
        assert len(bytes.fromhex(parts[part])) == 32


def test_a_copy_elsewhere_has_the_same(tiny: Tiny, folder: Path) -> None:
    assert differing(fingerprint(tiny("llama")), fingerprint(folder)) == set()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_re_save_in_several_shards_has_the_same(family: str, tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(family)
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert differing(fingerprint(source), fingerprint(tmp_path)) == set()


def test_the_dtype_of_computation_is_no_part(tiny: Tiny) -> None:
    half = fingerprint(tiny("llama"), dtype="bfloat16")
    assert differing(fingerprint(tiny("llama")), half) == set()


def test_one_changed_weight_changes_the_weights_only(tiny: Tiny, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert differing(fingerprint(tiny("llama")), fingerprint(folder)) == {"weights"}


def test_two_tensors_exchanged_change_the_weights(tiny: Tiny, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    one, other = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
    tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert differing(fingerprint(tiny("llama")), fingerprint(folder)) == {"weights"}


def test_the_same_values_stored_in_another_dtype_are_other_weights(
    tiny: Tiny, folder: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.to(torch.float64) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert differing(fingerprint(tiny("llama")), fingerprint(folder)) == {"weights"}


@pytest.mark.parametrize(
    "field",
    [{"rms_norm_eps": 1e-3}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}],
    ids=str,
)
def test_an_architecture_field_changes_the_architecture_only(
    field: dict[str, object], tiny: Tiny, folder: Path
) -> None:
    change_json(folder / "config.json", **field)
    assert differing(fingerprint(tiny("llama")), fingerprint(folder)) == {"architecture"}


@pytest.mark.parametrize(
    "field",
    [{"transformers_version": "4.0.0"}, {"use_cache": False}, {"dtype": "bfloat16"}],
    ids=str,
)
def test_a_field_that_computes_nothing_changes_nothing(
    field: dict[str, object], tiny: Tiny, folder: Path
) -> None:
    change_json(folder / "config.json", **field)
    assert differing(fingerprint(tiny("llama")), fingerprint(folder)) == set()


def test_another_chat_template_changes_the_template_only(tiny: Tiny, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template += "\n"
    tokenizer.save_pretrained(folder)
    assert differing(fingerprint(tiny("llama")), fingerprint(folder)) == {"chat_template"}


CHANGES = [
    "a token renamed",
    "a merge dropped",
    "a special token added",
    "another end token",
    "a normalizer",
]


@pytest.mark.parametrize("change", CHANGES)
def test_another_tokenizer_changes_the_tokenizer_only(
    change: str, tiny: Tiny, folder: Path
) -> None:
    path = folder / "tokenizer.json"
    rules = json.loads(path.read_text())
    if change == "a token renamed":
        vocabulary = rules["model"]["vocab"].items()
        rules["model"]["vocab"] = {("zzz" if i == 200 else t): i for t, i in vocabulary}
        rules["model"]["merges"] = []
    elif change == "a merge dropped":
        rules["model"]["merges"].pop()
    elif change == "a special token added":
        rules["added_tokens"].append({**rules["added_tokens"][0], "id": 384, "content": "<|new|>"})
    elif change == "another end token":
        change_json(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    else:
        rules["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(rules))
    assert differing(fingerprint(tiny("llama")), fingerprint(folder)) == {"tokenizer"}


def test_using_the_tokenizer_changes_nothing(folder: Path) -> None:
    base = load_base(folder, device="cpu")
    base.tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=3)
    expected = base.fingerprint()
    base._fingerprint = None
    base.tokenizer(["a"], padding="max_length", max_length=9)
    assert base.fingerprint() == expected


def test_a_task_adapter_changes_its_own_part_only(tiny: Tiny, adapter: Tiny) -> None:
    plain = fingerprint(tiny("llama"))
    folders = [adapter(tiny("llama"), seed=seed) for seed in (1, 2)]
    one, other = (fingerprint(tiny("llama"), task_adapter=folder) for folder in folders)
    assert differing(plain, one) == differing(one, other) == {"task_adapter"}


def test_a_returned_fingerprint_can_be_changed_without_harm(tiny: Tiny) -> None:
    base = load_base(tiny("llama"), device="cpu")
    base.fingerprint()["weights"] = "spoilt"
    assert base.fingerprint()["weights"] != "spoilt"
