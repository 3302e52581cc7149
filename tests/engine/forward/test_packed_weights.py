"""Few rows are multiplied with the 4-bit blocks of a GGUF file, many with the weights."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import Written, write_gguf

from langchain_cope.engine import (
    Base,
    Contrast,
    Engine,
    EngineOptions,
    Request,
    Sampling,
    load_base,
)
from langchain_cope.engine.base.gguf import packed as packed_file
from langchain_cope.engine.base.gguf.blocks import FileBlocks
from langchain_cope.engine.base.loading import unload_base
from langchain_cope.engine.forward import packed_weights
from langchain_cope.engine.forward.packed_weights import BLOCK, Blocks, PackedWeight

Tiny = Callable[..., Path]
KINDS = [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0]
SIZES = {"intermediate_size": 64}  # whole blocks
FEW = 4  # rows
CONTRAST = Contrast(0.3)


@pytest.fixture(autouse=True)
def _small_weights_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack what is small, too, and use it up to `FEW` rows, whatever this machine is fast at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packed_weights, "LARGE", 0)
    monkeypatch.setattr(packed_file, "rows_that_pay", lambda *_: FEW)


@pytest.fixture
def written(tiny: Tiny, tmp_path: Path) -> Written:
    return write_gguf(tmp_path / "model.gguf", tiny("llama", **SIZES), Kind.Q4_1)


@pytest.fixture
def engine_of() -> Iterator[Callable[..., Engine]]:
    engines = []

    def get(base: Base, **options: object) -> Engine:
        engines.append(Engine(base, EngineOptions(speculation=False, **options)))  # type: ignore[arg-type]
        return engines[-1]

    yield get
    for engine in engines:
        engine.close()


@pytest.fixture
def rows_packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each packed product that is computed."""
    rows: list[int] = []
    compute = PackedWeight.__call__

    def noted(self: PackedWeight, states: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows.append(states.numel() // states.shape[-1])
        return compute(self, states, bias)

    monkeypatch.setattr(PackedWeight, "__call__", noted)
    return rows


def loaded(written: Written, dtype: str = "bfloat16", **options: object) -> Base:
    return load_base(written.path, device="cpu", dtype=dtype, **options)  # type: ignore[arg-type]


def packed_parts(engine: Engine) -> set[str]:
    """The linear layers that have packed products, by the ends of their names."""
    alike = engine._batch.forward._alike  # type: ignore[attr-defined]
    return {
        path.removeprefix("model.layers.")
        for some in alike
        for product in some
        if product.packed
        for path in product.site.paths
    }


def packed_product(base: Base, weights: list[torch.Tensor]) -> PackedWeight:
    source = base.block_source()
    assert source is not None
    (product,) = source.packed([weights])
    assert product is not None
    return product


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    "names",
    [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ],
    ids=" ".join,
)
def test_packed_products_are_those_of_the_files_values(
    names: list[str], kind: Kind, tiny: Tiny, tmp_path: Path
) -> None:
    """Queries and keys lie in another order in the file (`gguf_files.permute`)."""
    written = write_gguf(tmp_path / "model.gguf", tiny("llama", **SIZES), kind)
    base = loaded(written)
    paths = [f"model.layers.1.{name}.weight" for name in names]
    weights = [base.model.get_parameter(path) for path in paths]
    made, mapped = (packed_product(base, weights) for _ in range(2))
    assert torch.equal(made.codes, mapped.codes)
    assert torch.equal(made.scales, mapped.scales)
    product = mapped
    held = torch.cat([written.source.get_parameter(path) for path in paths]).double()
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 7, held.shape[1], generator=generator).bfloat16()
    bias = torch.randn(len(held), generator=generator).bfloat16()
    expected = states.double() @ held.t() + bias.double()
    error = (product(states, bias).double() - expected).norm() / expected.norm()
    dense = torch.nn.functional.linear(states, held.bfloat16(), bias)
    usual = (dense.double() - expected).norm() / expected.norm()
    assert error < 1.6 * usual < 0.01


def test_packed_weights_of_smollm2_are_nearer_than_rounded_scales_and_zeros() -> None:
    base = load_base("smollm2", device="cpu", dtype="bfloat16")
    assert base.gguf is not None
    source = FileBlocks(base.gguf, base.model)
    for layer in ("self_attn.o_proj", "mlp.down_proj"):
        name = f"model.layers.7.{layer}.weight"
        held = source.blocks(name, base.model.get_parameter(name))
        assert held is not None
        scales, zeros = held.scales.bfloat16().float(), held.zeros.bfloat16().float()
        exact, rounded = values(held), values(replace(held, scales=scales, zeros=zeros))
        # As the kernel holds them: (blocks of a row, out, scale and zero).
        scales, zeros = PackedWeight.of([held]).scales.float().permute(2, 1, 0)
        packed = values(replace(held, scales=scales, zeros=zeros))
        assert (packed - exact).norm() < 0.97 * (rounded - exact).norm()


def values(held: Blocks) -> torch.Tensor:
    """What blocks of one plane stand for, in float64."""
    codes = held.codes.view(*held.scales.shape, BLOCK).double() - 8
    return (codes * held.scales.unsqueeze(-1) + held.zeros.unsqueeze(-1)).flatten(1)


def test_only_matrices_with_the_files_values_are_packed(
    written: Written, adapter: Tiny, tiny: Tiny, engine_of: Callable[..., Engine]
) -> None:
    everything = packed_parts(engine_of(loaded(written)))
    assert {"0.self_attn.q_proj", "1.mlp.down_proj", "1.mlp.up_proj"} <= everything
    folder = adapter(tiny("llama", **SIZES), seed=3, targets=["v_proj"])
    merged = packed_parts(engine_of(loaded(written, task_adapter=folder)))
    attention = {f"{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in "qkv"}
    assert everything - merged == attention, "they lie side by side"

    base = loaded(written)
    with torch.no_grad():
        base.model.get_parameter("model.layers.0.mlp.down_proj.weight")[5, 7] += 1
    assert everything - packed_parts(engine_of(base)) == {"0.mlp.down_proj"}


def test_a_second_start_takes_the_kept_products_without_reading_the_file(
    written: Written, tiny: Tiny, engine_of: Callable[..., Engine], tmp_path: Path
) -> None:
    base = loaded(written)
    everything = packed_parts(engine_of(base))
    (kept,) = tmp_path.glob("cache/langchain-cope/gguf/*/packed-*/blocks.safetensors")
    written.path.unlink()
    assert packed_parts(engine_of(base)) == everything

    kept.write_bytes(kept.read_bytes()[:100])
    assert packed_parts(engine_of(base)) == set(), "damaged, and the file has gone"


@pytest.mark.parametrize("place", [-1, -5000])
def test_a_bit_that_a_disk_has_turned_is_noticed(
    place: int, written: Written, engine_of: Callable[..., Engine], tmp_path: Path
) -> None:
    base = loaded(written)
    everything = packed_parts(engine_of(base))
    (kept,) = tmp_path.glob("cache/langchain-cope/gguf/*/packed-*/blocks.safetensors")
    content = bytearray(kept.read_bytes())
    good = bytes(content)
    content[place] ^= 16
    kept.unlink()  # the engine has mapped it
    kept.write_bytes(content)
    assert packed_parts(engine_of(base)) == everything
    assert packed_parts(engine_of(base)) == everything
    assert kept.read_bytes() == good, "made anew"


@pytest.mark.parametrize("damage", [b"", b"\2" + bytes(7) + b"{}", b"no such file"])
def test_a_damaged_file_of_products_is_made_anew(
    damage: bytes, written: Written, engine_of: Callable[..., Engine], tmp_path: Path
) -> None:
    base = loaded(written)
    everything = packed_parts(engine_of(base))
    (kept,) = tmp_path.glob("cache/langchain-cope/gguf/*/packed-*/blocks.safetensors")
    whole = kept.read_bytes()
    kept.write_bytes(damage)
    assert packed_parts(engine_of(base)) == everything
    assert packed_parts(engine_of(base)) == everything
    assert kept.read_bytes() == whole


@pytest.mark.parametrize("has_kept", [True, False])
def test_changed_weights_get_no_products_and_leave_those_of_others(
    has_kept: bool, written: Written, engine_of: Callable[..., Engine]
) -> None:
    if has_kept:
        packed_parts(engine_of(loaded(written)))
    base = loaded(written)
    weight = base.model.get_parameter("model.layers.0.mlp.down_proj.weight")
    held = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(held.flip(0))  # the same bits in another order
    changed = packed_parts(engine_of(base))
    with torch.no_grad():
        weight.copy_(held)
    assert packed_parts(engine_of(base)) - changed == {"0.mlp.down_proj"}


def test_products_for_another_torch_are_replaced(
    written: Written,
    engine_of: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    base = loaded(written)
    engine_of(base)
    (kept,) = tmp_path.glob("cache/langchain-cope/gguf/*/packed-*")
    monkeypatch.setattr(torch, "__version__", "99.0")
    everything = packed_parts(engine_of(base))
    (other,) = tmp_path.glob("cache/langchain-cope/gguf/*/packed-*")
    assert everything
    assert other != kept


def test_unpacked_weights_lie_in_one_mapping_without_a_copy(written: Written) -> None:
    base = loaded(written)
    places = {each.untyped_storage().data_ptr() for each in base.model.parameters()}
    assert len(places) == 1
    parameter = base.model.get_parameter("model.layers.0.mlp.down_proj.weight")
    with torch.no_grad():
        parameter.add_(1)
    unload_base(base)
    again = loaded(written).model.get_parameter("model.layers.0.mlp.down_proj.weight")
    assert not torch.equal(again, parameter), "the file keeps its values"


@pytest.mark.parametrize("how", ["float32", "switched off", "file gone"])
def test_nothing_is_packed_where_it_does_not_apply(
    how: str, written: Written, engine_of: Callable[..., Engine]
) -> None:
    base = loaded(written, "float32" if how == "float32" else "bfloat16")
    if how == "file gone":
        written.path.unlink()
    assert packed_parts(engine_of(base, packed_weights=how != "switched off")) == set()


def test_a_packing_that_fails_leaves_the_forward_without_it(
    written: Written, engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise MemoryError

    monkeypatch.setattr(packed_file, "rows_that_pay", fail)
    assert packed_parts(engine_of(loaded(written))) == set()


def requests(
    engine: Engine, adapter: Path, numbers: range, contrast: Contrast = CONTRAST
) -> list[Request]:
    user = engine.load_adapter(adapter)
    sampling, generator = Sampling(max_tokens=12), torch.Generator()
    prompts = [
        torch.randint(3, 380, (9,), generator=generator.manual_seed(number)).tolist()
        for number in numbers
    ]
    return [Request(prompt, user, contrast, sampling, logprobs=True) for prompt in prompts]


def test_one_user_takes_packed_products_and_many_the_weights(
    written: Written,
    adapter: Tiny,
    tiny: Tiny,
    engine_of: Callable[..., Engine],
    rows_packed: list[int],
) -> None:
    engine, folder = engine_of(loaded(written)), adapter(tiny("llama", **SIZES), seed=1)
    rows_packed.clear()  # the check at the start runs them with more rows
    engine.generate(requests(engine, folder, range(1)))
    assert set(rows_packed) == {2}
    rows_packed.clear()
    streams = engine.stream_all(requests(engine, folder, range(8)))
    for stream in streams:
        next(stream)
    for stream in streams:
        stream.close()
    assert rows_packed == [], "sixteen rows"


def test_packed_answers_are_as_near_to_float32_as_bfloat16s(
    written: Written, adapter: Tiny, tiny: Tiny, engine_of: Callable[..., Engine]
) -> None:
    """Both are held against float32's probabilities of the tokens that they chose."""
    folder = adapter(tiny("llama", **SIZES), seed=1)
    exact = engine_of(loaded(written, "float32"))
    distance = {}
    for packed in (True, False):
        engine = engine_of(loaded(written), packed_weights=packed)
        differences = []
        for request in requests(engine, folder, range(12)):
            (answer,) = engine.generate([request])
            scored = exact.score(
                [(list(request.prompt), list(answer.token_ids))], exact.load_adapter(folder)
            )[0]
            mine = torch.tensor([token.log_p_user for token in answer.logprobs])
            differences.append((mine - scored).abs())
        distance[packed] = torch.cat(differences).mean()
    assert distance[True] < 1.3 * distance[False] < 0.1


def test_answers_alone_and_beside_others_differ_only_where_two_tokens_are_near(
    written: Written, adapter: Tiny, tiny: Tiny, engine_of: Callable[..., Engine]
) -> None:
    folder = adapter(tiny("llama", **SIZES), seed=1)
    engine, exact = engine_of(loaded(written)), engine_of(loaded(written, "float32"))
    asked = requests(engine, folder, range(24), Contrast(0.0))
    alone = [engine.generate([request])[0].token_ids for request in asked]
    together = [answer.token_ids for answer in engine.generate(asked)]
    num_equal = 0
    for request, one, other in zip(asked, alone, together, strict=True):
        if one == other:
            num_equal += 1
            continue
        pairs = list(zip(one, other, strict=False))
        first = next(index for index, (mine, theirs) in enumerate(pairs) if mine != theirs)
        shared = [*request.prompt, *one[:first]]
        choices = [(shared, [token]) for token in pairs[first]]
        mine, theirs = exact.score(choices, exact.load_adapter(folder))
        assert (mine - theirs).abs() < 0.2, "nats"
    assert num_equal > 12
