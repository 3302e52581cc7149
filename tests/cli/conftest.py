import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adapter_store import AdapterStore, AdapterVersion

COMMAND = [sys.executable, "-c", "from cope_lc.main import app; app()"]
METRICS = {
    "base": {"nll": 4.8013, "rouge1": 0.15, "rougeL": 0.142},
    "sft": {"nll": 4.67, "rouge1": 0.16, "rougeL": 0.15},
    "dpo": {"nll": 4.6612, "rouge1": 0.16, "rougeL": 0.151},
    "cope": {"rouge1": 0.171, "rougeL": 0.16},
}


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one strict JSON value and nothing else."""
        return json.loads(
            self.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
        )

    @property
    def error(self) -> str:
        """The one line on standard error."""
        lines = self.stderr.splitlines()
        assert len(lines) == 1, self.stderr
        assert "Traceback" not in self.stderr
        return lines[0]


@pytest.fixture
def cope_lc(store_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs the command line in this process, with an empty default store."""
    from cope_lc.main import app

    monkeypatch.setenv("COPE_STORE", str(store_folder))
    # CliRunner fixes the width of help only.
    monkeypatch.setenv("COLUMNS", "120")

    def invoke(*words: object, stdin: str | bytes = "") -> Outcome:
        result = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return invoke


@pytest.fixture
def process(store_folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the command line in a process of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: object, **options: Any) -> subprocess.Popen[str]:
        environment = {**os.environ, "COPE_STORE": str(store_folder), **options.pop("env", {})}
        pipe = subprocess.PIPE
        streams = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe, **options}
        command = [*COMMAND, *map(str, words)]
        started.append(subprocess.Popen(command, text=True, env=environment, **streams))
        return started[-1]

    yield start
    for run in started:
        run.kill()
        with run:  # which closes its streams
            pass


@pytest.fixture
def store(store_folder: Path) -> AdapterStore:
    return AdapterStore(store_folder)


@pytest.fixture
def publish(
    store: AdapterStore, tiny: Callable[..., Path], adapter: Callable[..., Path]
) -> Callable[..., AdapterVersion]:
    """Publishes a random adapter of the tiny Llama for a user."""
    from langchain_cope.engine import load_base

    def published(
        user: str = "alice", seed: int = 1, family: str = "llama", **facts: Any
    ) -> AdapterVersion:
        base = load_base(tiny(family)).fingerprint()
        facts = {"metrics": METRICS, "alpha": 0.1, "tau": 0.1, **facts}
        return store.publish(user, adapter(tiny(family), seed=seed), base=base, **facts)

    return published


@pytest.fixture
def of_headlines(tiny: Callable[..., Path]) -> dict[str, Any]:
    """Metadata of a version whose user was asked for headlines alone."""
    from personal import metadata_of_headlines

    from langchain_cope.engine import load_base

    return metadata_of_headlines(load_base(tiny()))


@pytest.fixture
def history(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows, or as many items as asked for, as a JSONL file."""

    def write(rows: int | list[Any] = 8, name: str = "user.jsonl") -> Path:
        if isinstance(rows, int):
            rows = [
                {"prompt": f"Say number {number}.", "completion": f"It is {number}, friend."}
                for number in range(rows)
            ]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path = tmp_path / name
        path.write_text("".join(lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def read_only() -> Callable[..., contextlib.AbstractContextManager[Path]]:
    """Gives a folder, with a copy of a file, that the block, run as a plain user, cannot write."""

    @contextlib.contextmanager
    def as_nobody(file: Path | None = None) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as name:
            if file is not None:
                shutil.copy(file, name)
            Path(name).chmod(0o555)
            is_root = os.geteuid() == 0  # permissions do not bind root
            if is_root:
                os.seteuid(65534)
            try:
                yield Path(name)
            finally:
                if is_root:
                    os.seteuid(0)
                Path(name).chmod(0o700)

    return as_nobody
