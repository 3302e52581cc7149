"""Store and models together: a version in plain peft, an erased user in a running engine."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from archives import changed_manifest, manifest_of, members, rewrite
from langchain_core.callbacks import BaseCallbackHandler
from peft import PeftModel
from personal import QUICK, ROWS
from safetensors.torch import load_file, save_file
from tiny import change_config
from transformers import AutoModelForCausalLM

from adapter_store import (
    AdapterNotFoundError,
    AdapterStore,
    FileKeys,
    InvalidAdapterError,
    MemoryBackend,
    UserErasedError,
)
from langchain_cope import ChatCoPe, EngineOptions, PersonalizeUser
from langchain_cope.engine import Engine, load_base
from langchain_cope.errors import ModelError

QUESTION = "What does the fox do all day?"


@pytest.fixture(scope="module")
def base(tiny: Callable[..., Path]) -> Path:
    return tiny("llama")


def logits_with(base: Path, folder: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.inference_mode():
        return model(torch.tensor([[5, 6, 7, 8, 9]])).logits


@pytest.mark.parametrize("kind", ["local", "memory", "encrypted"])
def test_a_published_version_works_in_plain_peft(
    kind: str, base: Path, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    stores = {
        "local": lambda: AdapterStore(tmp_path / "store"),
        "memory": lambda: AdapterStore(MemoryBackend()),
        "encrypted": lambda: AdapterStore(
            tmp_path / "store", keys=FileKeys.create(tmp_path / "keys")
        ),
    }
    store = stores[kind]()
    version = store.publish("alice", adapter(base, seed=1), base=load_base(base).fingerprint())
    store.publish("alice", adapter(base, seed=2), base=load_base(base).fingerprint())
    exported = store.export_peft("alice", tmp_path / "exported", version.version)
    expected, other = (logits_with(base, adapter(base, seed=seed)) for seed in (1, 2))
    assert torch.equal(logits_with(base, exported), expected)
    assert torch.equal(logits_with(base, store.fetch_dir(version)), expected)
    assert not torch.equal(expected, other)


def test_a_trained_version_is_what_vllm_reads(base: Path, tmp_path: Path) -> None:
    """Its loader takes these two files, a config of plain LoRA, and A and B of every module.

    The config has no trained biases or whole modules, and names of weights begin and end as here
    (vLLM's PEFTHelper and parse_fine_tuned_lora_name).
    """
    store = AdapterStore(tmp_path / "store")
    PersonalizeUser(model=str(base), store=store, recipe=QUICK, gate="always").invoke(
        {"user_id": "alice", "history": ROWS}
    )
    folder = store.export_peft("alice", tmp_path / "exported")
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["bias"] == "none"
    assert not any(
        config[name] for name in ("modules_to_save", "use_dora", "rank_pattern", "alpha_pattern")
    )
    weights = load_file(folder / "adapter_model.safetensors")
    modules = dict(AutoModelForCausalLM.from_pretrained(base).named_modules())
    adapted = {name for name in modules if name.rpartition(".")[2] in config["target_modules"]}
    assert adapted
    assert set(weights) == {
        f"base_model.model.{name}.lora_{part}.weight" for name in adapted for part in "AB"
    }
    for name in adapted:
        num_out, num_in = modules[name].weight.shape
        assert weights[f"base_model.model.{name}.lora_A.weight"].shape == (config["r"], num_in)
        assert weights[f"base_model.model.{name}.lora_B.weight"].shape == (num_out, config["r"])


def changed_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def with_value(value: float, dtype: torch.dtype) -> Callable[[Path], None]:
    """Return a change of an adapter that puts one value at the end of its last matrix."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(dtype)
        tensors[max(tensors)].view(-1)[-1] = value

    return lambda folder: changed_weights(folder, change)


def with_tensor(name: str) -> Callable[[Path], None]:
    return lambda folder: changed_weights(
        folder, lambda tensors: tensors.update({f"base_model.model.{name}": torch.ones(2)})
    )


NO_NUMBER = "holds NaN or infinite values: train it again"
UNSERVED = {
    **{
        f"{value} in {dtype}": (with_value(value, dtype), NO_NUMBER)
        for value in (float("nan"), float("inf"), -float("inf"))
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    },
    "another kind": (partial(change_config, peft_type="IA3"), "uses peft_type 'IA3', which"),
    "DoRA": (partial(change_config, use_dora=True), "uses DoRA (use_dora), which the engine"),
    "DoRA by its tensor": (with_tensor("q_proj.lora_magnitude_vector"), "uses DoRA (use_dora), "),
    "biases": (partial(change_config, bias="all"), "uses trained biases (bias, lora_bias), which"),
    "whole modules": (
        partial(change_config, modules_to_save=["lm_head"]),
        "uses fully trained modules (modules_to_save ['lm_head']), which the engine",
    ),
    "PiSSA": (partial(change_config, init_lora_weights="pissa"), "init_lora_weights 'pissa'"),
    "a variant": (partial(change_config, layer_replication=[[0, 2]]), "uses layer_replication, "),
    "embeddings": (with_tensor("embed_tokens.lora_embedding_A"), "uses LoRA on embeddings, which"),
    "a whole tensor": (
        with_tensor("lm_head.weight"),
        "tensor 'base_model.model.lm_head.weight' is no LoRA matrix of a linear layer; only those",
    ),
}


@pytest.mark.parametrize("kind", UNSERVED)
def test_what_no_engine_serves_is_not_stored_by_any_way(
    kind: str, base: Path, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    change, said = UNSERVED[kind]
    folder = shutil.copytree(adapter(base, seed=1), tmp_path / "adapter")
    store, fingerprint = AdapterStore(tmp_path / "store"), {"weights": "w"}
    first = store.publish("alice", folder, base=fingerprint)
    archive = store.export_user("alice", tmp_path / "alice.tar")
    change(folder)
    files = {path.name: path.read_bytes() for path in folder.glob("adapter_*")}
    put_into_archive(archive, files)
    for store_it in (
        lambda: store.publish("alice", folder, base=fingerprint),
        lambda: store.publish("alice", files, base=fingerprint),
        lambda: store.import_peft("alice", folder, base=fingerprint),
        lambda: AdapterStore(tmp_path / "other").import_user(archive),
    ):
        with pytest.raises(InvalidAdapterError, match=re.escape(said)):
            store_it()
    assert [version.version for version in store.versions("alice")] == [first.version]
    assert AdapterStore(tmp_path / "other").versions("alice") == []
    with pytest.raises(ModelError, match=re.escape(said)):
        Engine.of(load_base(base)).load_adapter(folder)


def put_into_archive(archive: Path, files: dict[str, bytes]) -> None:
    """Replace the files of the first version, and say so in the manifest."""
    rows = members(archive)
    version = manifest_of(rows)["versions"][0]
    version["files"] = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        for name, data in files.items()
    }
    head, *others = changed_manifest(rows, versions=[version])
    changed = [(member, files[Path(member.name).name]) for member, _ in others]
    rewrite(archive, [head, *changed])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_largest_numbers_are_numbers(
    dtype: torch.dtype, base: Path, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(adapter(base, seed=1), tmp_path / "adapter")
    for value in (torch.finfo(dtype).max, torch.finfo(dtype).min, torch.finfo(dtype).tiny):
        with_value(value, dtype)(folder)
        AdapterStore(tmp_path / "store").publish("alice", folder, base={"weights": "w"})


def test_an_erased_user_is_not_served_from_an_engines_slot(
    base: Path, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """The adapter is still in its slot; the request after the erasure does not reach it."""
    store = AdapterStore(tmp_path / "store")
    version = store.publish("alice", adapter(base, seed=1), base=load_base(base).fingerprint())
    chat = ChatCoPe(
        model=str(base), store=store, user_id="alice", max_tokens=12, engine_options=EngineOptions()
    )
    plain = chat.invoke(QUESTION, {"configurable": {"user_id": None}}).content
    first = chat.invoke(QUESTION)
    assert first.response_metadata["adapter_version"] == version.version
    assert first.content != plain
    AdapterStore(tmp_path / "store").erase_user("alice")  # by another process, as it were
    after = chat.invoke(QUESTION)
    assert after.response_metadata["adapter_version"] is None
    assert after.content == plain
    for kwargs in ({"adapter_version": version.version}, {}):
        strict = ChatCoPe(
            model=str(base),
            store=str(tmp_path / "store"),
            user_id="alice",
            on_missing_adapter="error",
            **kwargs,
        )
        with pytest.raises(AdapterNotFoundError):
            strict.invoke(QUESTION)
    again = store.publish("alice", adapter(base, seed=2), base=load_base(base).fingerprint())
    assert chat.invoke(QUESTION).response_metadata["adapter_version"] == again.version


class EraseAt(BaseCallbackHandler):
    """Erases alice as a stage of her training begins."""

    run_inline = True

    def __init__(self, store: AdapterStore, stage: str) -> None:
        self.store, self.at = store, stage

    def on_chain_start(self, *_: object, name: str = "", **__: object) -> None:
        if name == self.at:
            self.store.erase_user("alice")


@pytest.mark.parametrize("active", [False, True], ids=["of a new user", "of a user with versions"])
def test_a_training_publishes_nothing_of_a_user_erased_meanwhile(
    active: bool, base: Path, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    store = AdapterStore(tmp_path / "store")
    if active:
        store.publish("alice", adapter(base, seed=1), base=load_base(base).fingerprint())
    learner = PersonalizeUser(model=str(base), store=store, recipe=QUICK, gate="always")
    request = {"user_id": "alice", "history": ROWS}
    with pytest.raises(UserErasedError):
        learner.invoke(request, {"callbacks": [EraseAt(store, "dpo")]})
    assert store.active("alice") is None
    # A history that is given again after the erasure may be learnt from.
    assert learner.invoke(request).published
