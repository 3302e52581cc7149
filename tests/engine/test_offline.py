"""Offline requests are answered alike whatever the clock and earlier answers say."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from langchain_cope.engine import Engine, EngineOptions, Request, Sampling, load_base

Tiny = Callable[..., Path]


def requests(offline: bool) -> list[Request]:
    """Prompts of many lengths, some with a phrase over and over, each sampled with a seed."""
    made = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        phrase = torch.randint(3, 380, (7 + 6 * seed,), generator=generator).tolist()
        sampling = Sampling(max_tokens=24, temperature=1.0 if seed % 2 else 0.0, seed=seed)
        made.append(Request([*phrase, *phrase], sampling=sampling, offline=offline))
    return made


@pytest.fixture
def engine(tiny: Tiny) -> Engine:
    base = load_base(tiny("llama"), device="cpu", dtype="bfloat16")
    return Engine(base, EngineOptions(speculation=True))


@pytest.mark.parametrize("offline", [True, False])
def test_only_offline_requests_take_the_same_steps_on_a_slow_machine(
    engine: Engine, offline: bool
) -> None:
    taken = []
    answers = []
    for rate in (1e6, 1.0):
        engine._scheduler._prefill_rate = rate  # tokens of prompts a second, as measured
        before = engine.statistics()
        answers.append(engine.generate(requests(offline)))
        after = engine.statistics()
        taken.append((after.prefills - before.prefills, after.steps - before.steps))
    engine.close()
    assert (taken[0] == taken[1]) is offline
    reused = after.prefix_tokens_reused, after.drafted
    assert (reused == (0, 0)) is offline
    if offline:
        assert answers[0] == answers[1]


def test_twice_as_many_offline_rows_are_decoded_together(tiny: Tiny) -> None:
    engine = Engine(load_base(tiny("llama"), device="cpu"), EngineOptions(max_rows=4))
    most: dict[bool, int] = {}
    for offline in (True, False):
        decode, seen = engine._batch.decode, []

        def counted(decode: Callable[[], None] = decode, seen: list[int] = seen) -> None:
            seen.append(len(engine._batch._decode_rows))
            decode()

        engine._batch.decode = counted  # type: ignore[method-assign]
        answers = engine.generate(requests(offline))
        engine._batch.decode = decode  # type: ignore[method-assign]
        most[offline] = max(seen)
        assert len(answers) == 12
    engine.close()
    assert most == {True: 8, False: 4}
