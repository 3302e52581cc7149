import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest

COMMANDS = [["personalize"], ["chat"], ["generate"], ["evaluate"], ["serve"], ["doctor"]]
KEYS = ["new", "list", "revoke"]
ADAPTERS = ["list", "show", "activate", "rollback", "delete", "erase", "export", "export-all"]
ADAPTERS += ["import", "import-all", "verify", "gc", "new-key", "rotate-keys"]
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "langchain_core", "langchain_cope"}
HEAVY |= {"adapter_store", "pydantic", "chromadb", "rich", "numpy"}
SHOW_MODULES = """
import sys
sys.argv = ["cope-lc", "--help"]
from cope_lc.main import app
try:
    app()
finally:
    print(*sys.modules)
"""
BARE = """
import typer
app = typer.Typer()
@app.command()
def one(): "One."
@app.command()
def two(): "Two."
app(["--help"])
"""


def test_every_command_has_an_example_and_explains_every_option(cope_lc: Callable) -> None:
    groups = [["adapters", name] for name in ADAPTERS] + [["keys", name] for name in KEYS]
    for words in COMMANDS + groups:
        shown = cope_lc(*words, "--help")
        assert shown.code == 0
        assert f"Example: cope-lc {' '.join(words)}" in shown.stdout
        options = shown.stdout.partition("\nOptions:\n")[2].splitlines()
        options = [line for line in options if line.startswith("  --")]
        assert all(len(line.split("  ", 2)) == 3 or len(line) < 32 for line in options), options


def test_help_names_every_command(cope_lc: Callable) -> None:
    shown = cope_lc("--help").stdout
    assert all(f"  {name} " in shown for [name] in [*COMMANDS, ["adapters"], ["keys"]])
    for group, names in {"adapters": ADAPTERS, "keys": KEYS}.items():
        shown = cope_lc(group, "--help").stdout
        assert all(f"  {name} " in shown for name in names)


def test_a_call_without_a_command_is_wrong_and_shows_the_help(cope_lc: Callable) -> None:
    shown = cope_lc()
    assert shown.code == 2
    assert "Usage: " in shown.stderr
    assert shown.stdout == ""


def test_version_is_that_of_the_package(cope_lc: Callable) -> None:
    from importlib.metadata import version

    assert cope_lc("--version").stdout == f"cope-lc {version('langchain-cope')}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["persnalize"], "No such command 'persnalize'"),
        (["generate"], "Missing argument 'PROMPT'"),
        (["generate", "x", "--alpah", "1"], "No such option"),
        (["adapters", "shw"], "Did you mean 'show'?"),
        (["personalize", "x", "--target", "bot"], "--target"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(
    cope_lc: Callable, words: list[str], said: str
) -> None:
    outcome = cope_lc(*words)
    assert outcome.code == 2
    assert said in outcome.error
    assert "--help" in outcome.error
    assert outcome.stdout == ""


def test_the_class_of_wrong_calls_is_typer_s_usage_error() -> None:
    from cope_lc.failures import UsageError

    assert UsageError.__name__ == "UsageError"


def test_after_two_dashes_debug_is_text(cope_lc: Callable) -> None:
    outcome = cope_lc("personalize", "--", "--debug")
    assert outcome.error == "error: --debug: no such file"


def test_debug_shows_the_traceback_wherever_it_stands(cope_lc: Callable) -> None:
    for words in (
        ["--debug", "personalize", "nowhere.jsonl"],
        ["personalize", "nowhere.jsonl", "--debug"],
    ):
        outcome = cope_lc(*words)
        assert outcome.code == 2
        assert "Traceback" in outcome.stderr
        assert outcome.stderr.splitlines()[-1] == "error: nowhere.jsonl: no such file"


def test_help_imports_nothing_heavy() -> None:
    command = [sys.executable, "-c", SHOW_MODULES]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = {name.partition(".")[0] for name in shown.stdout.splitlines()[-1].split()}
    assert "typer" in modules
    assert not modules & HEAVY


def test_help_is_within_150_ms_of_a_bare_typer_app(tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text(BARE)
    ours = [sys.executable, "-c", "from cope_lc.main import app; app()", "--help"]
    bare = [sys.executable, str(tmp_path / "bare.py")]
    pairs = [(_seconds(ours), _seconds(bare)) for _ in range(5)]
    assert median(mine - theirs for mine, theirs in pairs) < 0.15


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def test_a_reader_that_goes_away_causes_no_message(
    process: Callable, history: Callable[..., Path]
) -> None:
    rows = [{"prompt": "x", "completion": f"{number} {'long ' * 30}"} for number in range(6)]
    run = process("personalize", history(rows), "--user", "alice", "--dry-run")
    run.stdout.close()
    assert run.stderr.read() == ""
    assert run.wait(30) == 1
    run.stderr.close()
