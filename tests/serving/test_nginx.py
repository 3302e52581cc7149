"""Behind a real nginx, by the configuration that the documentation gives."""

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving.conftest import Running, wait_until

from langchain_cope.serving import sse
from langchain_cope.serving.jobs import Job

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
PAGE = Path(__file__).parents[2] / "docs" / "serve-operators.md"
AROUND = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/a; uwsgi_temp_path {folder}/b; scgi_temp_path {folder}/c;
    {server}
}}
"""


@pytest.fixture(scope="module")
def proxy(server: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an nginx before the server; it gives up after a second without a byte."""
    folder = tmp_path_factory.mktemp("nginx")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    block = re.search(r"```nginx\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    config = re.sub(r" *ssl_.*\n", "", block[1])
    for written, here in {
        "listen 443 ssl": f"listen 127.0.0.1:{port}",
        "http://127.0.0.1:8000": server.url,
        "proxy_read_timeout 300s": "proxy_read_timeout 1s",
        "X-OpenWebUI-User-Id": "X-User",
    }.items():
        assert written in config
        config = config.replace(written, here)
    (folder / "nginx.conf").write_text(AROUND.format(folder=folder, server=config))
    process = subprocess.Popen([str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf")])
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return httpx.get(f"{url}/healthz").status_code == 200
        except httpx.TransportError:
            return False

    wait_until(answers, seconds=10)
    yield url
    process.terminate()
    process.wait(10)


def client(server: Running, proxy: str, role: str, **headers: str) -> httpx.Client:
    key = {"Authorization": f"Bearer {server.keys[role]}"}
    return httpx.Client(base_url=proxy, headers={**key, **headers}, timeout=30)


def test_a_stream_comes_through_piece_by_piece(server: Running, proxy: str) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Tell me more"}],
        "max_tokens": 900,
        "temperature": 1,
        "n": 8,
        "stream": True,
    }
    engine = server.state.engine
    assert engine is not None
    with (
        client(server, proxy, "alice") as asking,
        asking.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        assert engine.statistics().running > 0, "the first piece came with the last one"
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"


def test_pings_keep_an_idle_stream_open(
    server: Running, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "PING_SECONDS", 0.3)
    job = Job("alice")  # which waits, since nobody has queued it
    server.state.runner._jobs[job.id] = job
    seen: list[str] = []
    started = time.monotonic()
    with (
        client(server, proxy, "alice") as asking,
        asking.stream("GET", f"/v1/personalize/{job.id}/events") as response,
    ):
        for line in response.iter_lines():
            seen.append(line)
            if time.monotonic() - started > 2.5:  # thrice what nginx waits for a byte
                server.state.runner.cancel(job)
    assert seen.count(": ping") >= 5
    end: dict[str, Any] = json.loads(seen[-2].removeprefix("data: "))
    assert end["status"] == "cancelled"


def test_nobody_outside_names_a_user_in_the_header(server: Running, proxy: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    with client(server, proxy, "proxy", **{"X-User": "alice"}) as asking:
        answer = asking.post("/v1/chat/completions", json=body)
        refused = asking.post("/v1/chat/completions", content=b"x" * 1_200_000)
    assert (answer.status_code, answer.json()["cope"]["adapter_version"]) == (200, None)
    assert refused.status_code == 413
