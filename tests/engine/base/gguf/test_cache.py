"""Files are unpacked once: whole or not at all, whoever is killed, and only where there is room."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from gguf_files import write_gguf

from langchain_cope.engine import load_base
from langchain_cope.engine.base.bundled import smollm2_file
from langchain_cope.engine.base.gguf.cache import GgufFile
from langchain_cope.errors import ModelError

Tiny = Callable[..., Path]
CPU = torch.device("cpu")
# A process that has imported everything, and forks one that unpacks for each line it reads.
SERVER = """
import json, os, signal, sys, time
from pathlib import Path
import torch, transformers, gguf
import transformers.modeling_gguf_pytorch_utils, transformers.models.llama.modeling_llama
import langchain_cope.engine.base.gguf.config as config
import langchain_cope.engine.base.gguf.tensors as tensors
from langchain_cope.engine.base.gguf.cache import GgufFile
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
def stop():
    print("here", flush=True)
    time.sleep(60)
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if os.fork() == 0:
        sys.stdout = open(job["log"], "w")
        os.environ["XDG_CACHE_HOME"] = job["cache"]
        exec(job["before"])
        file = GgufFile.of(Path(job["file"]))
        print(file.unpacked(getattr(torch, job["dtype"]), torch.device("cpu")), flush=True)
        exec(job["after"])
        sys.stdout.flush()
        os._exit(0)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=pipe, stdout=pipe, text=True)
    with process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield process


class Unpacking:
    """A process that unpacks; what it says comes line by line."""

    def __init__(self, server: "subprocess.Popen[str]", log: Path, **job: str) -> None:
        self._log = log
        log.touch()
        text = {"before": "print(os.getpid(), flush=True)\n" + job.pop("before", ""), "after": ""}
        assert server.stdin
        server.stdin.write(json.dumps({**text, **job, "log": str(log)}) + "\n")
        server.stdin.flush()
        self.pid = int(self.line(0))

    def line(self, index: int) -> str:
        """Wait for a line and return it."""
        for _ in range(6000):
            text = self._log.read_text()
            if text.count("\n") > index:
                return text.splitlines()[index]
            time.sleep(0.02)
        raise TimeoutError(text)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        while Path(f"/proc/{self.pid}").exists():
            time.sleep(0.01)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tiny: Tiny, tmp_path: Path) -> Path:
    """A GGUF file."""
    folder = tiny("llama", hidden_size=64, intermediate_size=256)
    return write_gguf(tmp_path / "model.gguf", folder).path


def test_the_second_load_unpacks_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = GgufFile.of(file)
    folder = found.unpacked(torch.float32, CPU)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setitem(sys.modules, "gguf", None)  # not even needed any more
    assert GgufFile.of(file).unpacked(torch.float32, CPU) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert load_base(file, device="cpu", dtype="float32").source == str(folder)


def test_processes_at_once_unpack_once(
    file: Path, cache: Path, tmp_path: Path, server: "subprocess.Popen[str]"
) -> None:
    job = {"file": str(file), "cache": str(cache), "dtype": "float32"}
    at_once = [Unpacking(server, tmp_path / f"log{number}", **job) for number in range(3)]
    folders = {process.line(1) for process in at_once}
    assert len(folders) == 1
    made = Path(folders.pop()).parent
    assert {path.name for path in made.iterdir()} == {"description", "float32", "lock"}


STOPS = {  # where the process is when it is killed
    "the description": "config.set_rope = lambda *a: stop()",
    "before the tensors": "tensors.Unpacking.write = lambda *a: stop()",
    "amid the tensors": (
        "d = tensors._dequantized; n = iter(range(99))\n"
        "tensors._dequantized = lambda *a: stop() if next(n) == 8 else d(*a)"
    ),
    "after the tensors": "u = tensors.Unpacking.write\n"
    "tensors.Unpacking.write = lambda *a: (u(*a), stop())",
    "before the rename": "Path.rename = lambda *a: stop()",
}


@pytest.mark.parametrize("where", STOPS)
def test_after_a_kill_the_next_start_works(
    where: str, file: Path, cache: Path, tmp_path: Path, server: "subprocess.Popen[str]"
) -> None:
    job = {"file": str(file), "cache": str(cache), "dtype": "float32"}
    process = Unpacking(server, tmp_path / "log", before=STOPS[where], **job)
    assert process.line(1) == "here"
    process.kill()
    assert list(cache.rglob(".*")), "it was killed in the middle"
    base = load_base(file, device="cpu", dtype="float32")
    assert not list(cache.rglob(".*")), "what it left is gone"
    assert torch.isfinite(base.model(input_ids=torch.tensor([[5, 6]])).logits).all()


def test_resident_memory_rises_by_little_more_than_the_weights(
    cache: Path, tmp_path: Path, server: "subprocess.Popen[str]"
) -> None:
    peak = "int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    job = {"file": str(smollm2_file()), "cache": str(cache), "dtype": "bfloat16"}
    before = f"Path('/proc/self/clear_refs').write_text('5'); start = {peak}"
    process = Unpacking(
        server, tmp_path / "log", before=before, after=f"print({peak} - start)", **job
    )
    size = (Path(process.line(1)) / "model.safetensors").stat().st_size
    assert size > 269e6
    assert int(process.line(2)) * 1024 < 1.2 * size


Room = namedtuple("Room", ["total", "used", "free"])


def test_without_room_on_the_disk_the_numbers_are_said(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Room(10**9, 10**9, 7 * 10**6))
    message = (
        r"model.gguf \(\d+ MB\) becomes \d+ MB as torch.float32, but there are 7 MB free in .*"
    )
    with pytest.raises(ModelError, match=message + "XDG_CACHE_HOME"):
        load_base(file, device="cpu", dtype="float32")
    assert not list(cache.rglob("*.safetensors"))


def test_without_memory_for_it_the_numbers_are_said(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langchain_cope.engine.device.free_bytes", lambda device: 30_000)
    message = r"becomes \d+ MB as torch.bfloat16, but cpu has 0 MB of free memory: give a smaller"
    with pytest.raises(ModelError, match=message):
        load_base(file, device="cpu", dtype="bfloat16")
    with monkeypatch.context() as enough:
        enough.setattr("langchain_cope.engine.device.free_bytes", lambda device: 10**12)
        GgufFile.of(file).unpacked(torch.bfloat16, CPU)
    with pytest.raises(ModelError, match=message):
        load_base(file, device="cpu", dtype="bfloat16")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_is_named(file: Path, cache: Path) -> None:
    cache.mkdir(mode=0o500)
    with pytest.raises(ModelError, match=r"cannot be unpacked into .*XDG_CACHE_HOME"):
        load_base(file, device="cpu")


def test_a_cache_in_the_way_of_a_file_is_named(file: Path, cache: Path) -> None:
    cache.write_text("a file, not a folder")
    with pytest.raises(ModelError, match=r"cannot be unpacked into .*XDG_CACHE_HOME"):
        load_base(file, device="cpu")


@pytest.mark.parametrize("taken", ["*/model.safetensors", "*/tokenizer.json", "*/*"])
def test_files_that_were_taken_out_of_the_cache_come_back(taken: str, file: Path) -> None:
    folder = GgufFile.of(file).unpacked(torch.float32, CPU)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.parent.glob(taken):
        path.unlink()
    assert GgufFile.of(file).unpacked(torch.float32, CPU) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_another_version_of_unpacking_unpacks_anew(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = GgufFile.of(file).unpacked(torch.float32, CPU)
    monkeypatch.setattr("langchain_cope.engine.base.gguf.cache._VERSION", 3)
    assert GgufFile.of(file).unpacked(torch.float32, CPU) != first
