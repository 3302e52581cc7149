"""The example apps, each run as it stands, on a tiny base and with short texts to learn from."""

import io
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from personal import QUICK, ROWS
from serving.conftest import running

from langchain_cope import Recipe
from langchain_cope.training.recipe import Negatives

EXAMPLES = Path(__file__).parents[1] / "examples"
ONE_EPOCH = replace(QUICK, sft=replace(QUICK.sft, epochs=1), negatives=Negatives(candidates=1))
Run = Callable[..., str]


@pytest.fixture
def run(
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Run `run(program, *words, typed=…)`: a copy beside shortened data; return what it printed."""
    base = tiny(context=2048, likely='"]}')  # closes the JSON of its calls
    monkeypatch.setenv("COPE_MODEL", str(base))
    monkeypatch.setenv("COPE_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(Recipe, "for_model", lambda *_, **__: ONE_EPOCH)
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    robin = {"user_id": "robin", "history": ROWS[:6], "queries": ROWS[6:]}
    (data / "user.jsonl").write_text(json.dumps(robin))
    notes = (EXAMPLES / "data" / "notes.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    (data / "notes.txt").write_text("".join(notes[:6]), encoding="utf-8")

    def run_program(program: str, *words: str, typed: str = "") -> str:
        shutil.copy(EXAMPLES / program, tmp_path)
        monkeypatch.setattr(sys, "argv", [program, *words])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        runpy.run_path(str(tmp_path / program), run_name="__main__")
        return capsys.readouterr().out

    return run_program


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    names = [program.name for program in EXAMPLES.glob("*.py")]
    assert names
    assert [name for name in names if not re.search(rf'(run|start)\("{name}"', source)] == []


def test_the_chatbot_records_learns_shows_both_and_forgets(run: Run, tmp_path: Path) -> None:
    typed = """\
        /good
        Hello there.
        /alpha 0.3
        /me
        How are you?
        /good
        /fix Fine, friend.
        /personalize
        /both
        And now?
        /undo
        /alpha high
        /alpha -1
        /fix
        /nothing
        /forget
        /base
        Who am I?
        /help"""
    out = run("terminal_chatbot.py", "robin", "data/user.jsonl", typed=typed)
    assert "6 texts of robin are recorded" in out
    assert "there is no answer yet" in out
    assert out.count("noted") == 2
    assert re.search(r"(learnt|kept as it was): \d of \d newest texts", out)
    assert out.count("you wrote: ") >= 2
    assert out.count("base: ") >= 5
    assert "as in /alpha 0.3, not 'high'" in out
    assert "as in /alpha 0.3, not '-1'" in out
    assert "write the text behind /fix" in out
    assert "forgetting 'robin'" in out
    assert "/undo         Go back to what was learnt before the last time." in out
    again = run("terminal_chatbot.py", "robin")
    assert "1 texts of robin" in again or "0 texts of robin" in again


def test_the_agent_uses_the_tools_of_the_user_in_its_context(run: Run) -> None:
    out = run("agent_with_tools.py", "What", "is", "on", "Monday?")
    assert "robin: What is on Monday?" in out
    assert "alice: What is on Monday?" in out
    assert out.count("calls ") == 2
    assert out.count("tool: ") == 2


def test_notes_are_found_and_answered_in_two_voices(run: Run) -> None:
    out = run("rag_over_notes.py", "What", "pressure", "does", "the", "boiler", "need?")
    assert "learning from 6 notes" in out
    found = out.split("My notes:\n")[1]
    assert found.startswith("boiler!! needs 1.4 bar")
    assert "\nbase: " in found
    assert "\nkim: " in found
    assert "learning from" not in run("rag_over_notes.py")


def test_a_graph_learns_and_answers_each_of_two_users(run: Run) -> None:
    out = run("two_users_in_a_graph.py")
    assert "robin: sft" in out
    assert "kim: dpo" in out
    assert "\nbase: " in out
    assert "sft" not in run("two_users_in_a_graph.py")


def start(program: str, *words: str, **environment: str) -> "subprocess.Popen[bytes]":
    """Start a program that serves, as people start it."""
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / program), *words], env={**os.environ, **environment}
    )


def test_a_web_chat_answers_two_people_at_once(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny(context=2048, likely='"]}')
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = start("chat_app.py", str(port), COPE_MODEL=str(base), COPE_STORE=str(tmp_path))
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            try:
                assert "<title>Chat</title>" in httpx.get(url).text
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.2)
        assert httpx.post(f"{url}/ask", json={"question": "Hello"}).status_code == 401
        assert httpx.post(f"{url}/sign-in", json={"user": "mallory"}).status_code == 404

        def ask(user: str) -> list[dict[str, str]]:
            with httpx.Client(base_url=url, timeout=60) as client:
                assert client.post("/sign-in", json={"user": user}).status_code == 200
                question = {"question": "What is on Monday?", "user": "robin"}
                answer = client.post("/ask", json=question)
            return [json.loads(line) for line in answer.text.splitlines()]

        with ThreadPoolExecutor(2) as threads:
            robins, alices = threads.map(ask, ("robin", "alice"))
        for steps in (robins, alices):
            assert [step["kind"] for step in steps][:2] == ["call", "tool"]
    finally:
        process.terminate()
        process.wait(60)


def test_users_are_answered_over_http(run: Run, tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny(context=2048, likely='"]}')
    with running(base, tmp_path / "store", tmp_path, keys=False) as server:
        lines = run("openai_client.py", f"{server.url}/v1", "alice", "bob").splitlines()
    assert [line.split(":")[0] for line in lines if ": " in line][:2] == ["alice", "bob"]
