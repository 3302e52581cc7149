"""Which dtype a CPU computes in where none is named, and that it stays so."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf_files import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from langchain_cope import ChatCoPe, PersonalizeUser
from langchain_cope.engine import load_base
from langchain_cope.engine.base import cpu_dtype as module
from langchain_cope.engine.base import user_cache
from langchain_cope.engine.base.cpu_dtype import SMALL_BASE, cpu_dtype

Tiny = Callable[..., Path]
LARGE = 10 * SMALL_BASE
BFLOAT16_CPU = "model name: a CPU\nflags: avx512_bf16 amx_bf16"
PLAIN_CPU = "model name: a CPU\nflags: avx2"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and nothing measured yet."""
    monkeypatch.setattr(user_cache, "user_cache_path", lambda *_, **__: tmp_path / "cache")
    module._fastest.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[torch.dtype]]:
    """`measured(float32=…, bfloat16=…)`: a CPU on which products take so many seconds."""

    def take(cpu: str = BFLOAT16_CPU, **seconds: float) -> list[torch.dtype]:
        calls: list[torch.dtype] = []

        def timed(rows: torch.Tensor, weights: torch.Tensor) -> float:
            calls.append(weights.dtype)
            slowed = 100.0 if len(calls) % 5 else 1.0  # other work, most of the time
            return slowed * seconds[str(weights.dtype).removeprefix("torch.")]

        monkeypatch.setattr(module, "cpu_features", lambda: cpu)
        monkeypatch.setattr(module, "_seconds", timed)
        module._fastest.cache_clear()
        return calls

    return take


@pytest.mark.parametrize(
    ("cpu", "float32", "bfloat16", "expected"),
    [
        (BFLOAT16_CPU, 1.0, 0.5, torch.bfloat16),
        (BFLOAT16_CPU, 1.0, 0.95, torch.float32),  # not clearly
        (BFLOAT16_CPU, 1.0, 20.0, torch.float32),
        (PLAIN_CPU, 1.0, 0.5, torch.float32),  # not natively
        ("", 1.0, 0.5, torch.float32),  # not Linux
    ],
)
def test_bfloat16_is_taken_where_it_is_native_and_clearly_faster(
    cpu: str,
    float32: float,
    bfloat16: float,
    expected: torch.dtype,
    measured: Callable[..., list[torch.dtype]],
) -> None:
    measured(cpu, float32=float32, bfloat16=bfloat16)
    assert cpu_dtype(LARGE) == expected
    assert cpu_dtype(SMALL_BASE - 1) == torch.float32


def test_the_measurement_is_kept_for_later_processes(
    cache: Path, measured: Callable[..., list[torch.dtype]]
) -> None:
    assert measured(float32=1.0, bfloat16=0.5) == []
    assert cpu_dtype(LARGE) == torch.bfloat16
    later = measured(float32=0.5, bfloat16=1.0)
    assert cpu_dtype(LARGE) == torch.bfloat16
    assert later == [], "it was not measured again"
    measured(BFLOAT16_CPU.replace("a CPU", "another"), float32=0.5, bfloat16=1.0)
    assert cpu_dtype(LARGE) == torch.float32


@pytest.mark.parametrize("damage", ["", "float8", "\xff", "folder"])
def test_a_damaged_or_unwritable_cache_costs_a_measurement_only(
    damage: str, cache: Path, measured: Callable[..., list[torch.dtype]]
) -> None:
    measured(float32=1.0, bfloat16=0.5)
    assert cpu_dtype(LARGE) == torch.bfloat16
    (entry,) = (cache / "dtype").iterdir()
    entry.unlink()
    if damage == "folder":
        entry.parent.rmdir()
        entry.parent.write_text("in the way")
    else:
        entry.write_text(damage, encoding="latin-1")
    calls = measured(float32=1.0, bfloat16=0.5)
    assert cpu_dtype(LARGE) == torch.bfloat16
    assert calls


def test_a_machine_without_a_home_folder_measures_too(
    monkeypatch: pytest.MonkeyPatch, measured: Callable[..., list[torch.dtype]]
) -> None:
    def no_home(*_: object, **__: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(user_cache, "user_cache_path", no_home)
    measured(float32=1.0, bfloat16=0.5)
    assert cpu_dtype(LARGE) == torch.bfloat16


def test_this_machine_is_measured_the_same_every_time() -> None:
    if "bf16" not in module.cpu_features():
        pytest.skip("this CPU has no bfloat16")
    assert len({module._bfloat16_is_faster() for _ in range(5)}) == 1


@pytest.fixture(scope="module")
def wide(tiny: Tiny) -> Path:
    """A base that is large enough to be measured for, by its width and depth."""
    return tiny("llama", hidden_size=1024, num_hidden_layers=3, seed=9)


def test_chat_and_training_compute_in_the_measured_dtype(
    wide: Path, measured: Callable[..., list[torch.dtype]]
) -> None:
    measured(float32=1.0, bfloat16=0.5)
    chat, training = ChatCoPe(model=str(wide)), PersonalizeUser(model=str(wide))
    assert chat._engine().base.dtype == torch.bfloat16
    assert training._engine() is chat._engine()
    chat.close()


def test_a_named_dtype_is_taken_unmeasured(
    wide: Path, measured: Callable[..., list[torch.dtype]]
) -> None:
    calls = measured(float32=1.0, bfloat16=0.5)
    assert load_base(wide, device="cpu", dtype="float32").dtype == torch.float32
    assert calls == []


def test_where_the_fingerprint_holds_the_dtype_it_is_float32_everywhere(
    tiny: Tiny, tmp_path: Path, measured: Callable[..., list[torch.dtype]]
) -> None:
    measured(float32=1.0, bfloat16=0.5)
    source = tiny("llama", hidden_size=1024, num_hidden_layers=3, seed=9)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    assert load_base(tmp_path, device="cpu").dtype == torch.float32


def test_a_gguf_file_is_computed_in_the_measured_dtype(
    tiny: Tiny,
    tmp_path: Path,
    measured: Callable[..., list[torch.dtype]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SMALL_BASE", 0)
    measured(float32=1.0, bfloat16=0.5)
    file = write_gguf(tmp_path / "model.gguf", tiny("llama")).path
    assert load_base(file, device="cpu").dtype == torch.bfloat16
