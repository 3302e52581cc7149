"""Steps take as many threads as other programs leave cores for."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import DEVICE

from langchain_cope.engine import Engine, Request, Sampling, load_base
from langchain_cope.engine.free_cores import FreeCores

CORES = os.cpu_count() or 1
BURN = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def in_a_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_threads_follow_what_other_programs_take() -> None:
    seen: list[int] = []
    usage = [0.0, 0.0]

    def later(seconds: float, busy_cores: float) -> None:
        usage[0] += seconds
        usage[1] += seconds * busy_cores

    def work() -> None:
        usage[0] = time.monotonic() - 100  # every look is due
        cores = FreeCores(lambda: (usage[0], usage[1]))
        for seconds, busy_cores in (
            (0.3, 0.2),
            (0.3, CORES - 1.5),  # one is left
            (0.1, 0.0),  # too short to tell
            (60.0, 0.0),  # too long to tell
            (0.5, CORES + 1.0),  # none is left: one, all the same
            (0.3, 0.0),
        ):
            later(seconds, busy_cores)
            cores.take_free()
            seen.append(torch.get_num_threads())
        later(0.3, CORES)
        cores.take_free()
        cores.take_all()
        seen.append(torch.get_num_threads())

    in_a_thread(work)
    assert seen == [2, 1, 1, 1, 1, 2, 2]
    assert torch.get_num_threads() == 2  # other threads keep theirs


def test_an_engine_whose_cores_are_all_taken_steps_on_one_thread(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(load_base(tiny("llama"), device=DEVICE, dtype="float32"))
    step, used = engine._scheduler.step, []

    def observed() -> None:
        used.append(torch.get_num_threads())
        step()

    monkeypatch.setattr(engine._scheduler, "step", observed)
    request = Request([1, 2, 3], sampling=Sampling(max_tokens=40))
    burners = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(CORES)]
    try:
        deadline = time.monotonic() + 20
        while 1 not in used and time.monotonic() < deadline:
            engine.generate([request])
        assert used[-1] == 1
        used.clear()
        engine.generate([replace(request, offline=True)])  # whose result is to be the same
        assert set(used) == {2}
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
        engine.close()


@pytest.mark.skipif(not hasattr(os, "nice"), reason="this system has no niceness")
def test_a_nice_program_gives_way_to_nice_ones() -> None:
    look = (
        "import os, time; os.nice(15)\n"
        "from langchain_cope.engine.free_cores import _usage\n"
        "a = _usage(); time.sleep(1); b = _usage(); print((b[1] - a[1]) / (b[0] - a[0]))"
    )
    burners = [
        subprocess.Popen([sys.executable, "-c", "import os; os.nice(15)\n" + BURN])
        for _ in range(CORES)
    ]
    try:
        seen = subprocess.run([sys.executable, "-c", look], capture_output=True, check=True)
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    assert float(seen.stdout) > CORES - 0.7
