"""Where the store meets models: a published version in plain peft, and an erased user in a running engine."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from langchain_core.callbacks import BaseCallbackHandler
from peft import PeftModel
from personal import QUICK, ROWS
from transformers import AutoModelForCausalLM

from adapter_store import AdapterNotFoundError, AdapterStore, FileKeys, MemoryBackend, UserErasedError
from langchain_cope import ChatCoPe, EngineOptions, PersonalizeUser
from langchain_cope.engine.model import load_base

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
        "encrypted": lambda: AdapterStore(tmp_path / "store", keys=FileKeys.create(tmp_path / "keys")),
    }
    store = stores[kind]()
    version = store.publish("alice", adapter(base, seed=1), base=load_base(base).fingerprint())
    store.publish("alice", adapter(base, seed=2), base=load_base(base).fingerprint())
    exported = store.export_peft("alice", tmp_path / "exported", version.version)
    expected, other = (logits_with(base, adapter(base, seed=seed)) for seed in (1, 2))
    assert torch.equal(logits_with(base, exported), expected)
    assert torch.equal(logits_with(base, store.fetch_dir(version)), expected)
    assert not torch.equal(expected, other)
    # What vLLM reads: these two names, and nothing that it would take for another format.
    assert {path.name for path in exported.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_an_erased_user_is_not_served_from_a_slot_of_a_running_engine(
    base: Path, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """The adapter is still in its slot; the request after the erasure does not reach it."""
    store = AdapterStore(tmp_path / "store")
    version = store.publish("alice", adapter(base, seed=1), base=load_base(base).fingerprint())
    chat = ChatCoPe(model=str(base), store=store, user_id="alice", max_tokens=12, engine_options=EngineOptions())
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
            model=str(base), store=str(tmp_path / "store"), user_id="alice", on_missing_adapter="error", **kwargs
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
def test_a_training_under_way_publishes_nothing_of_a_user_who_is_erased_meanwhile(
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
    assert learner.invoke(request).published  # what is given again after the erasure may be learnt from
