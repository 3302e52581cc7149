import os
import pty
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def chat(cope_lc: Callable, tiny: Callable[..., Path]) -> Callable:
    """Chats with the tiny Llama through a pipe."""
    return lambda stdin, *words: cope_lc(
        "chat", "--model", tiny(), "--max-tokens", 6, *words, stdin=stdin
    )


def test_a_piped_conversation_is_answered_line_by_line(
    chat: Callable, cope_lc: Callable, publish: Callable, tiny: Callable
) -> None:
    version = publish("alice")
    outcome = chat("Hello there.\n\nHow are you?\n", "--user", "alice")
    assert outcome.code == 0, outcome
    strength = "α 0.1, τ 0.1, adapter scale 1"
    assert f"alice on {tiny()}, version {version.version}, {strength}." in outcome.stderr
    same = ("--user", "alice", "--model", tiny(), "--max-tokens", 6)
    first = cope_lc("generate", "Hello there.", *same).stdout
    assert outcome.stdout.startswith(first)
    assert outcome.stdout != first


def test_that_the_base_answers_what_is_unlike_the_history_is_told_once(
    chat: Callable, publish: Callable, of_headlines: dict[str, Any]
) -> None:
    publish("alice", metadata=of_headlines)
    asked = "Add 12 and 7.\nAdd 2 and 2.\n"
    outcome = chat(asked, "--user", "alice")
    assert outcome.stderr.count("unlike the user's history") == 1
    outcome = chat(f"{asked}/reset\n{asked}", "--user", "alice")
    assert outcome.stderr.count("unlike the user's history") == 2
    assert "unlike" not in chat("A headline on mud\n", "--user", "alice").stderr


def test_what_was_said_before_counts_until_reset(chat: Callable) -> None:
    again = chat("Hello there.\n/reset\nHello there.\n/exit\nnever answered\n")
    first = chat("Hello there.\n").stdout
    assert again.code == 0
    assert again.stdout == first * 2
    assert chat("Hello there.\nHello there.\n").stdout != first * 2


def test_a_conversation_longer_than_the_context_forgets_its_oldest_turns(
    chat: Callable,
) -> None:
    first = "A rather long line of some words, to be said. " * 2
    second = "The second. " * 20
    outcome = chat(f"{first}\n{second}" + "\nThird.\n" * 6)
    assert outcome.code == 0, outcome
    assert "its oldest turns are forgotten" in outcome.stderr
    too_long = chat("word " * 300 + "\nHello.\n")
    assert too_long.code == 0
    assert "the model's context holds 256" in too_long.stderr
    assert too_long.stdout == chat("Hello.\n").stdout


def test_a_user_without_an_adapter_is_told_before_the_first_message(chat: Callable) -> None:
    outcome = chat("Hello\n", "--user", "bob")
    assert outcome.code == 0
    assert outcome.error.startswith("bob has no adapter yet")
    assert outcome.stdout.strip()


def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_ends(process: Callable) -> None:
    ours, theirs = pty.openpty()
    run = process("chat", "--max-tokens", 400, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    screen = _read_until(ours, r"> $")
    os.write(ours, b"Write a long report about the future of the world.\n")
    screen = _read_until(ours, r"world\.\r\n.{40}")
    run.send_signal(signal.SIGINT)
    screen = _read_until(ours, r"\n> $")
    assert len(screen) < 1500
    os.write(ours, b"\x04")
    assert run.wait(60) == 0
    greeting, stopped = run.stderr.read().splitlines()
    assert "Ctrl-C stops an answer" in greeting
    assert stopped == "stopped"
    run.stderr.close()
    os.close(ours)


def _read_until(terminal: int, pattern: str) -> str:
    screen = ""
    while not re.search(pattern, screen, re.DOTALL):
        screen += os.read(terminal, 4096).decode()
    return screen
