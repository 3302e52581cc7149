"""The example apps, each run as it stands, on a tiny base and with short texts to learn from."""

import io
import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

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
    assert [name for name in names if f'run("{name}"' not in source] == []


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


def test_users_are_answered_over_http(run: Run, tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny(context=2048, likely='"]}')
    with running(base, tmp_path / "store", tmp_path, keys=False) as server:
        lines = run("openai_client.py", f"{server.url}/v1", "alice", "bob").splitlines()
    assert [line.split(":")[0] for line in lines if ": " in line][:2] == ["alice", "bob"]
