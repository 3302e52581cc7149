"""`cope-lc personalize-fleet` and `cope-lc fleet migrate` as people run them."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import pytest

from adapter_store import AdapterStore
from langchain_cope.fleet import SerialRunner


@pytest.fixture
def histories(tmp_path: Path) -> Path:
    """A JSONL of three users, one of them with too little."""
    file = tmp_path / "users.jsonl"
    lines = []
    for user, num_items in (("alice", 12), ("<b>bob</b>", 12), ("carol", 3)):
        items = [
            {"prompt": f"Story {n}?", "completion": f"The fox says {user}, dog {n}"}
            for n in range(num_items)
        ]
        lines.append(json.dumps({"user_id": user, "history": items}))
    file.write_text("\n".join(lines))
    return file


def test_a_stopped_fleet_goes_on_to_a_report_of_everybody(
    process: Callable[..., Popen[str]],
    cope_lc: Callable,
    histories: Path,
    tmp_path: Path,
    store_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("personalize-fleet", histories, "--model", "starter", "--work", tmp_path / "work")
    store = AdapterStore(store_folder)
    run = process(*words)
    ledger = tmp_path / "work" / "ledger.jsonl"
    until = time.monotonic() + 100
    while not (ledger.exists() and "begun" in ledger.read_text()):
        assert time.monotonic() < until
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=200)
    assert run.returncode == 1
    assert "nothing was published; the same command goes on" in said
    assert store.versions("alice") == []

    # From here on in this process, which has its libraries loaded.
    monkeypatch.setattr("langchain_cope.fleet.ProcessRunner", lambda workers: SerialRunner())
    page = tmp_path / "report.html"
    whole = cope_lc(*words, "--json", "--report", page)
    assert whole.code == 0, whole.stderr
    facts = whole.json
    states = {user["user_id"]: user["state"] for user in facts["users"]}
    assert states == {"alice": "published", "<b>bob</b>": "published", "carol": "unfit"}
    assert facts["counts"] == {"published": 2, "unfit": 1}
    assert facts["gain"]["num_users"] == 2
    assert facts["phases"]["sft"] > 0
    assert "3 of 3 users" in whole.stderr
    assert [len(store.versions(user)) for user in states] == [1, 1, 0]
    html = page.read_text()
    assert "&lt;b&gt;bob" in html
    assert "<b>bob" not in html

    new_base = ("fleet", "migrate", histories, "--base", "starter", "--work", tmp_path / "moved")
    moved = cope_lc(*new_base, "--device", "cpu")
    assert moved.code == 0, moved.stderr
    assert "2 users: 2 unchanged" in moved.stdout  # carol has no version to migrate
    assert [len(store.versions(user)) for user in states] == [1, 1, 0]


def test_names_that_are_no_text_are_told_on_page_and_screen(
    cope_lc: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "histories"
    folder.mkdir()
    item = '{"prompt": "Where?", "completion": "There"}'
    for name, text in ((b"caf\xe9.jsonl", "{broken"), (b"\xe9mile.jsonl", item)):
        try:
            (folder / os.fsdecode(name)).write_text(text)
        except OSError:
            pytest.skip("this system's file names are text")
    page = tmp_path / "report.html"
    words = ("personalize-fleet", folder, "--model", "starter", "--work", tmp_path / "work")
    outcome = cope_lc(*words, "--report", page)
    assert outcome.code == 1
    assert "caf\\udce9.jsonl:1: broken JSON" in outcome.stdout
    assert "user id '\\udce9mile' holds half a surrogate pair" in outcome.stdout
    assert f"report: {page}" in outcome.stderr
    assert "caf\\udce9.jsonl" in page.read_text()


def test_a_source_that_is_missing_is_a_wrong_call(cope_lc: Callable, tmp_path: Path) -> None:
    outcome = cope_lc("personalize-fleet", tmp_path / "missing")
    assert outcome.code == 2
    assert "no such file or folder" in outcome.error
    page = tmp_path / "missing" / "page.html"
    outcome = cope_lc("personalize-fleet", tmp_path, "--report", page)
    assert outcome.code == 2
    assert "there is no folder" in outcome.error
    (tmp_path / "alice.jsonl").write_text('{"prompt": "Where?", "completion": "There"}')
    outcome = cope_lc("personalize-fleet", tmp_path, "--work", tmp_path)
    assert outcome.code == 2
    assert "holds the histories" in outcome.error
