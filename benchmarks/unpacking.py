"""GGUF files: how long they take to load, what memory and disk unpacking takes, and kills.

    python benchmarks/unpacking.py [MODEL] [--dtype bfloat16] [--rounds 5] [--kills 0]

MODEL is what `load_base` takes, by default `smollm2`. Every measurement runs in a process of its
own, forked from one that has imported everything, with a cache folder of its own:

- cold: `load_base` where nothing is unpacked yet. Its peak of resident memory (Linux) is measured
  while the file is unpacked, against the size of the unpacked weights.
- warm: `load_base` where all is unpacked, in the order of rounds cold, warm, cold, warm, …
- kills: a process is killed (SIGKILL) at a random moment of unpacking; the next one has to load the
  same weights, and to leave nothing half made.

A table, then one JSON object. The exit status is 1 where a start after a kill did not work.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf  # noqa: F401  # imports are no part of what is measured
import torch
import transformers.modeling_gguf_pytorch_utils
import transformers.models.llama.modeling_llama  # noqa: F401

import langchain_cope.engine.base.gguf.config
import langchain_cope.engine.base.gguf.tensors  # noqa: F401
from langchain_cope.engine import load_base
from langchain_cope.engine.base.gguf.source import find_gguf

SEED = 0


def main() -> None:
    options = parsed()
    facts: dict[str, Any] = {"model": options.model, "dtype": options.dtype}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        rounds = []
        for _ in range(options.rounds):
            shutil.rmtree(cache, ignore_errors=True)
            unpacking = in_child(cache, lambda: unpack(options))
            warm = in_child(cache, lambda: load(options))
            rounds.append({**unpacking, "warm_s": warm["load_s"]})
        facts |= {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
        facts["weights"] = weights_digest(cache)
        facts["memory_ratio"] = facts["memory_bytes"] / facts["weights_bytes"]
        facts["kills"] = options.kills
        facts["failed_after_kills"] = kill_and_start(cache, options, facts)
    show(facts)
    sys.exit(1 if facts["failed_after_kills"] else 0)


def unpack(options: argparse.Namespace) -> dict[str, Any]:
    """Unpack the file; return seconds, the rise of the peak of resident memory, and sizes."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = peak_bytes(), time.perf_counter()
    file = find_gguf(options.model, None)
    assert file is not None, f"{options.model} is no GGUF file"
    folder = file.unpacked(getattr(torch, options.dtype), torch.device("cpu"))
    return {
        "cold_s": time.perf_counter() - start,
        "memory_bytes": peak_bytes() - before,
        "file_bytes": file.path.stat().st_size,
        "weights_bytes": (folder / "model.safetensors").stat().st_size,
        "disk_bytes": sum(path.stat().st_size for path in file.folder.rglob("*")),
    }


def load(options: argparse.Namespace) -> dict[str, Any]:
    """Load the base; return the seconds that it took."""
    start = time.perf_counter()
    load_base(options.model, device="cpu", dtype=options.dtype)
    return {"load_s": time.perf_counter() - start}


def kill_and_start(cache: Path, options: argparse.Namespace, facts: dict[str, Any]) -> int:
    """Kill processes that unpack; return after how many of them the next start did not work."""
    moments, failed = random.Random(SEED), 0
    for _ in range(options.kills):
        shutil.rmtree(cache, ignore_errors=True)
        pid = fork(cache, lambda: unpack(options), None)
        time.sleep(moments.uniform(0, facts["cold_s"]))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        try:
            in_child(cache, lambda: load(options))
            whole = weights_digest(cache) == facts["weights"]
        except ChildProcessError:
            whole = False
        failed += not whole or bool(list(cache.rglob(".*")))
    return failed


def in_child(cache: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `work` returns in a new process whose cache folder is `cache`."""
    reading, writing = os.pipe()
    pid = fork(cache, work, writing)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    if os.waitpid(pid, 0)[1] or not text:
        raise ChildProcessError("a process failed, see above")
    result: dict[str, Any] = json.loads(text)
    return result


def fork(cache: Path, work: Callable[[], dict[str, Any]], writing: int | None) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ["XDG_CACHE_HOME"] = str(cache)
        result = json.dumps(work())
        if writing is not None:
            os.write(writing, result.encode())
        status = 0
    finally:
        os._exit(status)


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def weights_digest(cache: Path) -> str:
    (file,) = cache.rglob("model.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def show(facts: dict[str, Any]) -> None:
    name = f"{facts['model']} as {facts['dtype']}"
    print(f"{name:32} {'cold':>7} {'warm':>7} {'memory':>9} {'weights':>9} {'disk':>9}")
    sizes = [f"{facts[f'{what}_bytes'] / 1e6:6.0f} MB" for what in ("memory", "weights", "disk")]
    times = [f"{facts[f'{what}_s']:5.2f} s" for what in ("cold", "warm")]
    print(f"{'median':32} {' '.join([*times, *sizes])}")
    print(f"resident memory rose by {facts['memory_ratio']:.2f} times the unpacked weights")
    if facts["kills"]:
        print(f"{facts['failed_after_kills']} of {facts['kills']} starts after a kill failed")
    print(json.dumps(facts))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
