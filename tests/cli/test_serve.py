"""`cope-lc serve` and `cope-lc keys`."""

import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from cli.conftest import COMMAND


def test_keys_are_made_listed_and_revoked(cope_lc: Callable, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    made = cope_lc("keys", "new", "--keys", path, "--user", "alice", "--name", "Alice's phone")
    assert made.code == 0, made.stderr
    text = made.stdout.strip()
    assert text.startswith("cope_")
    assert len(text) == 5 + 12 + 1 + 43 + 8
    assert text[18:50] not in path.read_text() + made.stderr
    assert path.stat().st_mode & 0o777 == 0o600
    app = cope_lc("keys", "new", "--keys", path, "--user-prefix", "acme:", "--days", 30)
    admin = cope_lc("keys", "new", "--keys", path, "--admin")
    assert (app.code, admin.code) == (0, 0)
    listed = cope_lc("keys", "list", "--keys", path, "--json").json["keys"]
    assert [key["users"] for key in listed] == [["alice"], {"prefix": "acme:"}, {"prefix": ""}]
    own, apps, admins = (set(key["scopes"]) for key in listed)
    assert "logprobs" in own
    assert "metrics" not in own
    assert apps == {"chat", "adapters", "history", "personalize"}
    assert not {"chat", "logprobs"} & admins
    assert listed[1]["expires"] is not None
    revoked = cope_lc("keys", "revoke", listed[0]["id"], "--keys", path)
    assert revoked.code == 0
    assert "revoked" in cope_lc("keys", "list", "--keys", path).stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--user", "a", "--any-user"), "give one of"),
        (("--admin", "--scope", "chat"), "may not chat"),
        (("--user-prefix", ""), "not empty"),
    ],
)
def test_a_key_that_makes_no_sense_is_refused(
    words: tuple[str, ...], told: str, cope_lc: Callable, tmp_path: Path
) -> None:
    refused = cope_lc("keys", "new", "--keys", tmp_path / "keys.json", *words)
    assert refused.code == 2
    assert told in refused.error
    assert not (tmp_path / "keys.json").exists()


def test_an_unknown_key_cannot_be_revoked(cope_lc: Callable, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    cope_lc("keys", "new", "--keys", path, "--user", "alice")
    refused = cope_lc("keys", "revoke", "0123456789ab", "--keys", path)
    assert refused.code == 2
    assert "keys list" in refused.error


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--host", "0.0.0.0"), "cope-lc keys new"),
        (("--keys", "missing.json"), "cope-lc keys new"),
    ],
)
def test_a_server_that_others_could_use_does_not_start(
    words: tuple[str, ...], told: str, cope_lc: Callable, tmp_path: Path
) -> None:
    handlers = logging.getLogger("langchain_cope.serving").handlers
    refused = cope_lc("serve", "--data", tmp_path, *words)
    assert refused.code == 2
    assert told in refused.stderr
    assert logging.getLogger("langchain_cope.serving").handlers == handlers, "of a closed stream"


def test_flags_win_over_the_environment_and_that_over_the_file(
    cope_lc: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "serve.toml"
    config.write_text('port = 1\nmax-waiting = 2\nserved-name = "file"\n')
    monkeypatch.setenv("COPE_SERVE_PORT", "3")
    monkeypatch.setenv("COPE_SERVE_SERVED_NAME", "environment")
    words = ("serve", "--config", config, "--data", tmp_path, "--print-config")
    shown = cope_lc(*words, "--served-name", "flag").json
    assert (shown["max_waiting"], shown["port"], shown["served_name"]) == (2, 3, "flag")
    assert "pass" not in str(cope_lc(*words, "--store", "s3://user:pass@host/bucket").stdout)
    config.write_text("prot = 1\n")
    refused = cope_lc(*words)
    assert (refused.code, "'prot'" in refused.error) == (2, True)


def test_a_server_process_answers_and_ends_by_a_signal(tmp_path: Path) -> None:
    environment = {**os.environ, "COPE_STORE": str(tmp_path / "adapters")}
    with subprocess.Popen(
        [*COMMAND, "serve", "--model", "starter", "--port", "0", "--data", str(tmp_path)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        url = None
        for line in process.stderr:
            if "ready at" in line:
                url = json.loads(line)["message"].split()[2]
                break
        assert url is not None
        try:
            body = {"model": "starter", "messages": [{"role": "user", "content": "Hi"}]}
            answer = httpx.post(
                f"{url}/chat/completions", json={**body, "max_tokens": 3}, timeout=60
            )
            assert answer.status_code == 200
        finally:
            process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.wait(20) == 0, process.stderr.read()
        assert time.monotonic() - started < 10
