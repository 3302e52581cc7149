"""Under load and at the end: who goes frees room, who is slow holds up nobody, nothing is lost."""

import json
import logging
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving.conftest import Running, running, wait_until

from langchain_cope.engine import EngineOptions
from langchain_cope.serving import create_app, heads
from langchain_cope.serving.request_log import JsonLines, log

CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Tell me more"}],
    "max_tokens": 900,
    "temperature": 1,
    "stop": None,
}


def engine_of(server: Running) -> Any:
    engine = server.state.engine
    assert engine is not None
    return engine


def send(
    server: Running, role: str, body: bytes, length: int | None = None, times: int = 1
) -> socket.socket:
    """Send a request, once or more often, and read nothing; `length` is the one declared."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.settimeout(10)
    connection.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {server.keys[role]}\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    connection.sendall((head.encode() + body) * times)
    return connection


def num_begun(server: Running) -> int:
    now = engine_of(server).statistics()
    return int(now.running + now.answers)


def is_idle(server: Running) -> bool:
    now = engine_of(server).statistics()
    return bool(now.rows == now.waiting == now.adapters_in_use == 0) and (
        server.state.admission.num_waiting == 0
    )


@pytest.mark.parametrize(("stream", "times"), [(True, 1), (False, 1), (True, 2)])
def test_clients_that_go_free_their_rows_within_a_second(
    stream: bool, times: int, server: Running
) -> None:
    wait_until(lambda: is_idle(server))
    connections = []
    body = json.dumps({**LONG, "stream": stream}).encode()
    for role in ("alice", "bob", "alice", "bob"):
        connections.append(send(server, role, body, times=times))
    wait_until(lambda: engine_of(server).statistics().rows > 0)
    for connection in connections:
        connection.close()
    wait_until(lambda: is_idle(server), seconds=1.5)


def test_a_stuck_reader_holds_up_nobody(base: Path, published: Path, tmp_path: Path) -> None:
    with running(base, published, tmp_path, write_deadline=0.5) as server:
        body = json.dumps({**LONG, "stream": True, "n": 8, "logprobs": True}).encode()
        stuck = send(server, "alice", body)
        wait_until(lambda: engine_of(server).statistics().rows > 0)
        assert server.ask("bob", max_tokens=4).status_code == 200
        wait_until(lambda: is_idle(server), seconds=60)
        stuck.close()
        slow = send(server, "bob", body[:-1], len(body))  # whose last byte never comes
        assert slow.recv(4096).startswith(b"HTTP/1.1 408 ")
        slow.close()


def test_overload_gives_answers_and_429_alone(base: Path, published: Path, tmp_path: Path) -> None:
    small = shutil.copytree(base, tmp_path / "small")  # another engine, with bounds of its own
    options = EngineOptions(max_rows=4)
    with running(small, published, tmp_path, engine_options=options, max_waiting=4) as server:

        def ask(_: int) -> httpx.Response:
            return server.ask("alice", max_tokens=20)

        with ThreadPoolExecutor(24) as threads:
            answers = list(threads.map(ask, range(48)))
        statuses = {answer.status_code for answer in answers}
        assert statuses == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                assert 1 <= int(answer.headers["Retry-After"]) <= 120
        wait_until(lambda: is_idle(server))
        with server.client("admin") as client:
            metrics = client.get("/metrics").text
        assert 'cope_rejected_total{reason="server_busy"}' in metrics


def test_a_signal_ends_readiness_first_and_lets_answers_finish(
    base: Path, published: Path, tmp_path: Path
) -> None:
    with running(base, published, tmp_path, drain_delay=0.5, drain=20.0) as server:
        with ThreadPoolExecutor(4) as threads, server.client(None) as probe:
            begun = num_begun(server)
            answers = [
                threads.submit(server.ask, role, max_tokens=800)
                for role in ("alice", "bob", "alice", "bob")
            ]
            wait_until(lambda: num_begun(server) == begun + 4)
            server.server.handle_exit(signal.SIGTERM, None)
            assert probe.get("/readyz").status_code == 503
            assert probe.get("/healthz").status_code == 200
            refused = server.ask("alice")
            assert refused.status_code == 503
            assert refused.headers["Retry-After"]
            assert [answer.result().status_code for answer in answers] == [200] * 4
        wait_until(lambda: not server.server.started or server.server.should_exit)


def test_a_line_of_the_log_holds_no_text_and_no_user(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    canary = "heliotrope-canary"
    with caplog.at_level(logging.DEBUG):
        server.ask("alice", text=canary, user="alice")
        server.ask("alice", text=canary, user=canary)
        server.ask("alice", text=canary, top_logprobs=canary)
        with server.client("alice") as client:
            client.post(CHAT, json={"model": canary, "messages": canary})
        wait_until(lambda: len([r for r in caplog.records if r.name == log.name]) >= 4)
    formatter = JsonLines()
    lines = [formatter.format(record) for record in caplog.records]
    assert not [line for line in lines if canary in line or "alice" in line]
    for text in server.keys.values():
        assert not [line for line in lines if text[20:40] in line]
    entry = next(json.loads(line) for line in lines if '"status": 200' in line)
    assert entry["route"] == CHAT
    assert entry["key"] == server.records["alice"].id
    assert entry["prompt_tokens"] > 0
    assert entry["finish_reason"] in ("stop", "length")


def test_metrics_hold_no_ids_and_grow_with_nobody(server: Running) -> None:
    def series() -> set[str]:
        with server.client("admin") as client:
            text = client.get("/metrics").text
        assert "alice" not in text
        assert server.records["alice"].id not in text
        return {line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith("#")}

    server.ask("alice")
    server.ask("app", user="bob")
    with server.client("alice") as client:
        client.get("/junk")
    series()  # so that its own route is among them
    before = series()
    for number in range(5):
        server.ask("app", user=f"alf{number}", max_tokens=1)
        server.ask("app", user=f"nobody{number}")
        with server.client("alice") as client:
            client.get(f"/junk/{number}")
    assert series() == before
    for name in (
        "cope_time_to_first_token_seconds_count",
        "cope_request_queue_time_seconds_count",
        "cope_kv_cache_usage_ratio",
        "cope_prefix_cache_hits_total",
        "cope_num_requests_waiting",
    ):
        assert any(line.startswith(name) for line in before), name


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"x" * (1 << 20) + b"y" * 100_000, 413),
        (b'{"model": "tiny", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "top_p": NaN}', 400),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "seed": 1e999}', 400),
        (
            b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "n": 1000000000}',
            400,
        ),
        (b'{"model": "tiny", "messages": [{"content": "a"}]}', 400),
        (b'{"model": "tiny", "messages": []}', 400),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "\\ud800": 1}', 400),
        (b"{", 400),
        (b"", 400),
        (b"[]", 400),
    ],
)
def test_hostile_bodies_are_refused_quickly(content: bytes, status: int, server: Running) -> None:
    with server.client("alice", headers={"Content-Type": "application/json"}) as client:
        started = time.monotonic()
        answer = client.post(CHAT, content=content)
        whole = answer.status_code, client.post(CHAT, content=iter([content])).status_code
    assert whole == (status, status)
    assert time.monotonic() - started < 2
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("declared", [b"10", b"9" * 5000, b"ten"])
async def test_a_body_is_bounded_whatever_its_head_says(declared: bytes, server: Running) -> None:
    """As servers may let it through that do not hold a body to its Content-Length."""
    sent: list[Any] = []
    messages = iter([{"type": "http.request", "body": b"x" * 700_000, "more_body": True}] * 9)
    num_read = 0

    async def receive() -> Any:
        nonlocal num_read
        num_read += 1
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message)

    key = f"Bearer {server.keys['alice']}".encode()
    headers = [(b"content-length", declared), (b"authorization", key)]
    headers.append((b"content-type", b"application/json"))
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": CHAT, "headers": headers}
    scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "server": ("a", 1)}
    await create_app(server.state)(scope, receive, send)
    assert sent[0]["status"] == 413
    assert num_read <= 2


def test_an_endless_head_and_one_that_never_ends_are_cut_off(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "HEAD_SECONDS", 0.5)
    with connect(server) as slow, connect(server) as endless:
        for piece in (b"GET /healthz HTTP/1.1\r\n", b"Host: 127.0.0.1\r\n", b"X-Slow: "):
            slow.sendall(piece)
        endless.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Endless: ")
        with pytest.raises(OSError, match=r"reset|[Bb]roken"):  # noqa: PT012 - it may send some
            for _ in range(100):
                endless.sendall(b"a" * 65_536)
                time.sleep(0.01)
        assert slow.recv(100) == b""
    with connect(server) as patient:
        for _ in range(3):  # a head in pieces is none that is late
            for piece in (b"GET /healthz HTTP/1.1\r\n", b"Host: 127.0.0.1\r\n\r\n"):
                patient.sendall(piece)
                time.sleep(0.2)
            assert patient.recv(4096).startswith(b"HTTP/1.1 200 ")


def connect(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=10)


def test_a_request_keeps_its_own_id_or_gets_one(server: Running) -> None:
    with server.client("alice") as client:
        given = client.get("/v1/models", headers={"X-Request-Id": "trace-1.a_b"})
        odd = client.get("/v1/models", headers={"X-Request-Id": "no spaces, please"})
    assert given.headers["X-Request-Id"] == "trace-1.a_b"
    assert odd.headers["X-Request-Id"].startswith("req_")
