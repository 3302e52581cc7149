"""Forked processes: what was loaded before the fork refuses at once, what is loaded after works."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

AFTER = (
    "invoke", "invoke with a timeout", "ainvoke", "stream", "astream", "batch", "count",
    "another base", "a new chat", "train",
)  # fmt: skip
REFUSED = [
    *(f"after a chat: {name}" for name in AFTER),
    "lock held: invoke",
    "lock held: batch",
    "within a stream: the rest",
    "within a stream: invoke",
    "while another thread loads: invoke",
]


@pytest.fixture(scope="module")
def outcomes(
    tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What children of one process that forks got to hear, by case."""
    program = Path(__file__).with_name("forking.py")
    folders = [tiny("llama"), tiny("qwen2"), tmp_path_factory.mktemp("store")]
    done = subprocess.run(
        [sys.executable, str(program), *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    outcomes: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return outcomes


@pytest.mark.parametrize("case", REFUSED)
def test_a_forked_child_of_a_loaded_process_is_refused_at_once(
    case: str, outcomes: dict[str, dict[str, Any]]
) -> None:
    outcome = outcomes[case]
    assert "load after forking" in outcome.get("error", ""), outcome
    assert outcome["error"].startswith("EngineClosed: this process was forked")
    assert outcome["seconds"] < 2
    assert "hung" not in outcome


@pytest.mark.parametrize("case", ["after a chat: close", "lock held: close"])
def test_closing_in_a_forked_child_does_not_hang(
    case: str, outcomes: dict[str, dict[str, Any]]
) -> None:
    assert outcomes[case]["answer"] == "None"
    assert "hung" not in outcomes[case]


def test_a_child_that_loads_after_the_fork_answers(outcomes: dict[str, dict[str, Any]]) -> None:
    child, parent = outcomes["before: invoke"], outcomes["parent"]
    assert "hung" not in child, "neither the call nor the end of the process"
    assert f"content={parent['expected']!r}" in child["answer"]
    assert parent["answer"] == parent["expected"], "the parent goes on as before"


def test_forgetting_in_a_forked_child_says_what_it_cannot_clear(
    outcomes: dict[str, dict[str, Any]],
) -> None:
    outcome = outcomes["lock held: forget"]
    assert "hung" not in outcome
    assert "memory: this process was forked" in outcome["answer"]
