import contextlib
import json
import logging
import os
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save

from adapter_store import AdapterStore, Backend, FileKeys, LocalBackend, MemoryBackend

Files = dict[str, bytes]


def make_files(seed: int = 0, num_values: int = 64) -> Files:
    values = numpy.random.default_rng(seed).standard_normal(num_values)
    matrix = values.astype("float32").reshape(4, -1)
    tensors = {
        "base_model.model.q_proj.lora_A.weight": matrix,
        "base_model.model.q_proj.lora_B.weight": numpy.ascontiguousarray(matrix.T),
    }
    return {
        "adapter_model.safetensors": save(tensors),
        "adapter_config.json": json.dumps({"peft_type": "LORA", "r": 4}).encode(),
    }


@pytest.fixture
def files() -> Callable[..., Files]:
    """Makes the two files of a small adapter: other bytes for another seed."""
    return make_files


@pytest.fixture
def peft_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "peft"
    folder.mkdir()
    for name, content in make_files().items():
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text("what peft writes besides")
    (folder / "adapter_model.bin").write_bytes(b"a pickle, never read")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder of a local store."""
    return tmp_path / "store"


@pytest.fixture
def local(root: Path) -> AdapterStore:
    return AdapterStore(root)


@pytest.fixture
def keys(tmp_path: Path) -> FileKeys:
    """A key file with one master key."""
    return FileKeys.create(tmp_path / "keys")


@pytest.fixture(params=["local", "memory"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Path | MemoryBackend:
    """Where an empty store may be, on each backend."""
    return tmp_path / "store" if request.param == "local" else MemoryBackend(request.node.name)


@pytest.fixture
def backend(location: Path | MemoryBackend) -> Backend:
    """The backend of that location."""
    return location if isinstance(location, MemoryBackend) else LocalBackend(location)


@pytest.fixture
def unprivileged() -> Callable[[], contextlib.AbstractContextManager[Path]]:
    """Gives a folder, and runs the block as a user who is bound by permissions, as root is not."""

    @contextlib.contextmanager
    def as_nobody() -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as name:
            is_root = os.geteuid() == 0
            if is_root:
                os.chown(name, 65534, 65534)
                os.seteuid(65534)
            try:
                yield Path(name)
            finally:
                if is_root:
                    os.seteuid(0)
                for folder, _, _ in os.walk(name):
                    Path(folder).chmod(0o700)

    return as_nobody


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The URL of a real HTTP server that speaks S3."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    server.stop()


@pytest.fixture
def s3_url(s3_server: str) -> str:
    """The URL of an empty bucket's prefix on that server."""
    bucket = f"bucket-{os.urandom(6).hex()}"
    request = urllib.request.Request(f"{s3_server}/{bucket}", method="PUT")
    urllib.request.urlopen(request, timeout=30).close()
    return f"s3://key:s3cr3t@{bucket}/some/prefix?endpoint={s3_server}&region=us-east-1"
