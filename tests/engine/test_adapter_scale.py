"""An adapter at another strength equals peft's with its scaling multiplied, in any batch."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine.reference import Reference, Tally
from tiny import change_config

from langchain_cope.engine import AdapterSource, Contrast, Engine, Request, Sampling
from langchain_cope.engine.prefix_cache import BLOCK

Tiny = Callable[..., Path]
SCALES = (0.0, 0.4, 1.0, 1.7)
PROMPT = torch.randint(
    3, 380, (2 * BLOCK + 5,), generator=torch.Generator().manual_seed(8)
).tolist()


def references(base: Path, folder: Path, into: Path) -> dict[float, Reference]:
    """Peft with the adapter's `lora_alpha` multiplied; the base alone for 0."""
    found = {0.0: Reference(base)}
    rank_alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    for scale in SCALES[1:]:
        copy = Path(shutil.copytree(folder, into / f"{scale}"))
        change_config(copy, lora_alpha=rank_alpha * scale)
        found[scale] = Reference(base, copy)
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_scales_of_one_adapter_in_one_batch_equal_peft_each(
    alpha: float, tiny: Tiny, adapter: Tiny, engine: Engine, tmp_path: Path
) -> None:
    folder = adapter(tiny("llama"), seed=1)
    ann, expected = engine.load_adapter(folder), references(tiny("llama"), folder, tmp_path)
    sampling = Sampling(max_tokens=16)
    requests = [
        Request(PROMPT, ann, Contrast(alpha), sampling, adapter_scale=scale) for scale in SCALES
    ]
    # Together, then one after the other: what one scale left in the caches must not serve another.
    answers = [*engine.generate(requests), *(engine.generate([each])[0] for each in requests)]
    assert answers[:4] == answers[4:]
    assert len({answer.token_ids for answer in answers}) == len(SCALES)
    tally = Tally()
    for scale, answer in zip(SCALES, answers, strict=False):
        of_base = 0.0 if scale == 0 else alpha
        tally.compare(expected[scale], PROMPT, list(answer.token_ids), of_base, 0.1, f"{scale}")
    assert (tally.differences, tally.num_ties) == ([], 0)


def test_at_scale_zero_the_base_answers_and_nothing_is_loaded(engine: Engine) -> None:
    def folder() -> Path:
        raise AssertionError("it was fetched")

    sampling = Sampling(max_tokens=16, temperature=1.0, seed=3)
    source = AdapterSource("never loaded", folder)
    silent = Request(PROMPT, source, sampling=sampling, adapter_scale=0.0)
    alone = Request(PROMPT, sampling=sampling)
    first, second = engine.generate([silent, alone])
    assert first == second
    assert silent.num_rows == 1


def test_all_scales_of_a_version_share_its_slot(tiny: Tiny, adapter: Tiny, engine: Engine) -> None:
    folder = adapter(tiny("llama"), seed=1)
    source, loaded = AdapterSource("ann, version 1", lambda: folder), engine.load_adapter(folder)
    before = engine.statistics().adapters_loaded
    for scale in SCALES[1:]:
        both = [
            Request(PROMPT, each, Contrast(0.5), adapter_scale=scale) for each in (source, loaded)
        ]
        first, second = engine.generate(both)
        assert first == second
    assert engine.statistics().adapters_loaded == before + 1


@pytest.mark.parametrize("scale", [-0.1, math.nan, math.inf, "1", None])
def test_a_scale_out_of_range_is_refused_with_its_value(scale: float) -> None:
    expected = rf"adapter_scale must be a finite number ≥ 0, not {scale!r}"
    with pytest.raises(ValueError, match=expected):
        Request([1], adapter_scale=scale)


def test_a_scale_beyond_all_use_is_refused() -> None:
    assert Request([1], adapter_scale=1000).adapter_scale == 1000
    with pytest.raises(ValueError, match=r"adapter_scale must be 1000 at most, not 1e\+38: 1 is"):
        Request([1], adapter_scale=1e38)
