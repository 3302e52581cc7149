"""GGUF files of several architectures and quantizations give the answers of their sources."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import Written, permute, unpermute, write_gguf

from langchain_cope.engine import Base, load_base
from langchain_cope.engine.base.gguf.header import read_header
from langchain_cope.errors import ModelError

Tiny = Callable[..., Path]
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
PROMPT = [5, 60, 7, 200, 9, 31, 44, 100, 3, 77, 8, 18, 250, 19]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "langchain-cope" / "gguf"


def loaded(path: Path | str, dtype: str = "float32") -> Base:
    return load_base(path, device="cpu", dtype=dtype)


def logits(base: Base) -> torch.Tensor:
    with torch.no_grad():
        return base.model(input_ids=torch.tensor([PROMPT])).logits[0]


def agrees(base: Base, written: Written) -> bool:
    return torch.allclose(logits(base), written.logits(PROMPT), rtol=1e-4, atol=1e-4)


FILES: dict[str, tuple[str, Kind, dict[str, object]]] = {
    "llama F32": ("llama", Kind.F32, {}),
    "llama F16": ("llama", Kind.F16, {}),
    "llama Q4_1": ("llama", Kind.Q4_1, {}),
    "llama Q6_K": ("llama", Kind.Q6_K, WIDE),
    "llama of another base": (
        "llama",
        Kind.F32,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    ),
    "llama tied": ("llama", Kind.Q8_0, {"tie_word_embeddings": True}),
    "qwen2 Q8_0": ("qwen2", Kind.Q8_0, {}),
    "qwen2 BF16": ("qwen2", Kind.BF16, {}),
    "qwen3 Q5_0": ("qwen3", Kind.Q5_0, {}),
    "qwen3 Q4_K": ("qwen3", Kind.Q4_K, WIDE),
    "gemma2 Q4_0": ("gemma2", Kind.Q4_0, {"tie_word_embeddings": True}),
    "gemma3 Q8_0": ("gemma3_text", Kind.Q8_0, {"tie_word_embeddings": True}),
    "phi3 Q8_0": ("phi3", Kind.Q8_0, {}),
    "qwen2_moe F16": ("qwen2_moe", Kind.F16, {}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_the_logits_of_its_source(name: str, tiny: Tiny, tmp_path: Path) -> None:
    family, kind, changes = FILES[name]
    written = write_gguf(tmp_path / "model.gguf", tiny(family, **changes), kind)
    base = loaded(written.path)
    assert agrees(base, written)
    talk = [{"role": "user", "content": "What is 12 + 345?\n\n  Wörter 🙂"}]
    theirs = written.tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    assert base.prompt_ids(talk) == theirs
    assert base.eos_ids == {written.tokenizer.eos_token_id}
    assert base.context == written.source.config.max_position_embeddings


def test_heads_are_permuted_back_as_numpy_does_it(tiny: Tiny, tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "model.gguf", tiny("llama"), Kind.Q8_0)
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader(written.path).tensors}
    state = loaded(written.path).model.state_dict()
    for layer in range(2):
        attention = f"model.layers.{layer}.self_attn"
        assert not np.array_equal(
            state[f"{attention}.q_proj.weight"], tensors[f"blk.{layer}.attn_q.weight"]
        )
        for part, heads in {"q": 4, "k": 2}.items():
            expected = unpermute(tensors[f"blk.{layer}.attn_{part}.weight"], heads)
            assert np.array_equal(state[f"{attention}.{part}_proj.weight"], expected)
    rows = np.arange(24).reshape(8, 3)
    assert np.array_equal(permute(rows, 2)[:, 0] // 3, [0, 2, 1, 3, 4, 6, 5, 7])


def reader(path: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(path)


WRONG: dict[str, dict[str, object]] = {
    "permutation": {"permuted": False},
    "rope base": {"fields": {"llama.rope.freq_base": 20_000.0}},
    "epsilon": {"fields": {"llama.attention.layer_norm_rms_epsilon": 0.5}},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_file_with_another_value_gives_other_logits(
    what: str, tiny: Tiny, tmp_path: Path
) -> None:
    written = write_gguf(tmp_path / "model.gguf", tiny("llama"), **WRONG[what])  # type: ignore[arg-type]
    assert not agrees(loaded(written.path), written)


def test_another_ending_token_in_the_file_ends_answers(tiny: Tiny, tmp_path: Path) -> None:
    folder, ends = (
        tiny("llama"),
        {"tokenizer.ggml.eos_token_id": 0, "tokenizer.chat_template": None},
    )
    other = loaded(write_gguf(tmp_path / "other.gguf", folder, fields=ends).path)
    assert other.eos_ids == {0}
    turn = {"tokenizer.ggml.eot_token_id": 1, "tokenizer.chat_template": None}
    assert loaded(write_gguf(tmp_path / "turn.gguf", folder, fields=turn).path).eos_ids == {1, 2}


SCALINGS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "linear": (
        {"rope_type": "linear", "factor": 4.0},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 64,
        },
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"llama.rope.scaling.original_context_length": 64},
    ),
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_positions_turn_as_the_file_says(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    rope, fields = SCALINGS[kind]
    folder = tiny("llama", rope_parameters={"rope_theta": 10_000.0, **rope})
    extra = {"rope_freqs.weight": divisors(rope)} if kind == "llama3" else {}
    written = write_gguf(tmp_path / "model.gguf", folder, fields=fields, extra=extra)
    base = loaded(written.path)
    assert base.model.config.rope_parameters["rope_type"] == kind
    assert agrees(base, written)
    assert not agrees(loaded(write_gguf(tmp_path / "plain.gguf", folder).path), written)


def test_layers_with_a_window_turn_by_their_own_base(tiny: Tiny, tmp_path: Path) -> None:
    bases = {"full_attention": 1000.0, "sliding_attention": 100.0}
    rope = {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()}
    folder = tiny("gemma3_text", rope_parameters=rope, tie_word_embeddings=True)
    fields = {"gemma3.rope.freq_base_swa": 100.0}
    written = write_gguf(tmp_path / "model.gguf", folder, fields=fields)
    assert agrees(loaded(written.path), written)


def divisors(rope: dict[str, object]) -> np.ndarray:
    """What Llama 3's converter writes: a divisor for each frequency."""
    head, trained = 8, 64
    result = []
    for index in range(head // 2):
        wave = 2 * np.pi * 10_000.0 ** (2 * index / head)
        if wave < trained / 4:
            result.append(1.0)
        elif wave > trained / 1:
            result.append(8.0)
        else:
            smooth = (trained / wave - 1) / (4 - 1)
            result.append(1 / ((1 - smooth) / 8 + smooth))
    return np.array(result, np.float32)


def refusal(path: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        loaded(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


OTHER_FILES: dict[str, tuple[dict[str, object], str]] = {
    "a part": ({"split.count": 3}, "is one of 3 parts of a model: join them"),
    "an adapter": ({"general.type": "adapter"}, "is an adapter, not a base model"),
    "the image part": ({"general.type": "mmproj"}, "is the image part of a model"),
    "embeddings": ({"llama.pooling_type": 1}, "is a model of embeddings"),
    "an importance matrix": ({"general.type": "imatrix"}, "holds no model"),
    "an odd scaling": (
        {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0},
        "are scaled by 'longrope'",
    ),
    "a scaled attention": ({"llama.rope.scaling.attn_factor": 2.0}, "scaled by attn_factor 2.0"),
    "a text as the base": ({"llama.rope.freq_base": "much"}, "cannot be unpacked: "),
    "a text as a size": ({"llama.attention.key_length": "eight"}, "cannot be unpacked: "),
    "a text as a count": ({"split.count": "one"}, "cannot be unpacked: "),
    "half a turn": (
        {"llama.rope.dimension_count": 4, "llama.attention.key_length": 8},
        "turns 4 of 8",
    ),
    "another width": ({"llama.feed_forward_length": 64}, "but its configuration asks for"),
    "more layers": ({"llama.block_count": 3}, "missing"),
    "fewer layers": ({"llama.block_count": 1}, "left over"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "cannot read the architecture 'llama'"),
    "no heads": ({"llama.attention.head_count": 0}, "'llama'"),
}


@pytest.mark.parametrize("what", OTHER_FILES)
def test_a_file_that_is_no_such_model_is_refused_by_name(
    what: str, tiny: Tiny, tmp_path: Path, cache: Path
) -> None:
    fields, reason = OTHER_FILES[what]
    path = write_gguf(tmp_path / "odd.gguf", tiny("llama"), fields=fields).path
    message = refusal(path)
    assert reason in message
    assert str(path) in message
    assert not list(cache.glob("*/.*")), "nothing half made is left"


@pytest.mark.parametrize("arch", ["bert", "t5", "rwkv6", "qwen9"])
def test_an_architecture_that_is_not_read_is_named(arch: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", arch)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file):
        step()
    writer.write_tensors_to_file()
    writer.close()
    assert f"cannot read the architecture '{arch}'" in refusal(tmp_path / "model.gguf")


def test_a_file_cut_anywhere_or_with_any_byte_changed_is_no_crash(
    tiny: Tiny, tmp_path: Path
) -> None:
    whole = write_gguf(tmp_path / "model.gguf", tiny("llama")).path.read_bytes()
    path = tmp_path / "damaged.gguf"
    for end in [0, 3, 4, 8, 20, 100, 3000, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:end])
        message = refusal(path)
        assert "cut off" in message or "has room for" in message or end < 8
    generator = np.random.default_rng(0)
    header = whole.index(b"blk.1.ffn_down") + 100
    for _ in range(300):
        data = bytearray(whole)
        at = int(generator.integers(0, header))
        data[at : at + 8] = generator.integers(0, 256, 8, dtype=np.uint8).tobytes()
        path.write_bytes(data)
        try:
            fields = read_header(path).fields
        except ModelError:
            continue
        assert fields


HEADS = {
    "empty": b"",
    "text": b"not a model",
    "version 1": b"GGUF" + (1).to_bytes(4, "little") + bytes(64),
    "big-endian": b"GGUF" + (3).to_bytes(4, "big") + bytes(64),
    "far aligned": b"".join(
        [
            b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little"),
            (17).to_bytes(8, "little") + b"general.alignment",
            (10).to_bytes(4, "little") + (1 << 62).to_bytes(8, "little"),
        ]
    ),
    "endless": b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 64,
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_what_is_no_gguf_is_refused_by_name(head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(head)
    assert f"{path} cannot be read as a GGUF file" in refusal(path)
