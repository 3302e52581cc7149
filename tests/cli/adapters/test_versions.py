import os
import pty
from collections.abc import Callable
from pathlib import Path

import pytest

from adapter_store import AdapterStore
from adapter_store.errors import AdapterNotFoundError

HOSTILE = [
    "../x",
    "\x1b[2J\x1b[31mred",
    "[red]markup[/red] :smile:",
    "émoji 🙂",
    " blanks ",
    "long " * 200,
    "a\nb",
    "\u202eright",
]


def test_an_empty_store_says_how_to_add_someone(cope_lc: Callable, store_folder: Path) -> None:
    outcome = cope_lc("adapters", "list")
    assert outcome.code == 0
    assert (
        outcome.stdout
        == f"no users in {store_folder}; add one with: cope-lc personalize FILE --user ID\n"
    )
    assert cope_lc("adapters", "list", "--json").json == {
        "store": store_folder.as_uri(),
        "users": [],
        "problems": [],
    }
    assert not store_folder.exists()


def test_users_are_listed_with_their_active_version(cope_lc: Callable, publish: Callable) -> None:
    first, second = publish("alice"), publish("alice", seed=2)
    publish("bob")
    shown = cope_lc("adapters", "list")
    assert shown.code == 0
    assert [line.split()[:3] for line in shown.stdout.splitlines()[1:2]] == [
        ["alice", second.version, "2"]
    ]
    users = cope_lc("adapters", "list", "--json").json["users"]
    assert [user["user_id"] for user in users] == ["alice", "bob"]
    assert users[0]["active"] == second.version
    assert users[0]["versions"] == [first.version, second.version]


def test_hostile_user_ids_are_listed_shown_and_deleted_without_touching_the_terminal(
    cope_lc: Callable, store: AdapterStore, publish: Callable
) -> None:
    for user in HOSTILE:
        publish(user)
    listed = cope_lc("adapters", "list")
    assert listed.code == 0
    assert "\x1b" not in listed.stdout
    assert "\u202e" not in listed.stdout
    assert "[red]markup[/red] :smile:" in listed.stdout
    assert "émoji 🙂" in listed.stdout
    assert "\\x1b[2J" in listed.stdout
    assert "(1000 characters)" in listed.stdout
    assert "' blanks '" in listed.stdout
    for user in HOSTILE:
        for words in (["show", user], ["delete", user, "--yes"]):
            outcome = cope_lc("adapters", *words)
            assert outcome.code == 0, outcome
            assert "\x1b" not in outcome.stdout + outcome.stderr
        assert store.versions(user) == []


@pytest.mark.parametrize("command", ["show", "activate", "export", "delete"])
def test_an_impossible_user_id_is_refused_in_one_line(
    cope_lc: Callable, publish: Callable, command: str
) -> None:
    publish("alice")
    rest = {
        "activate": ["20260131T235959Z-0123456789ab"],
        "export": ["folder"],
        "delete": ["--yes"],
    }.get(command, [])
    for user, why in [("", "is empty"), ("x" * 10_000, "is too long"), ("a\0b", "NUL")]:
        outcome = cope_lc("adapters", command, user, *rest)
        assert outcome.code == 2
        assert why in outcome.error
        assert len(outcome.error) < 300


def test_show_tells_versions_metrics_and_which_is_active(
    cope_lc: Callable, publish: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = publish(), publish(seed=2)
    cope_lc("adapters", "activate", "alice", first.version)
    monkeypatch.setenv("COLUMNS", "80")
    shown = cope_lc("adapters", "show", "alice")
    lines = shown.stdout.splitlines()
    assert shown.code == 0
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if "●" in line] == ["●"]
    assert next(line for line in lines if first.version in line).startswith("●")
    row = next(line for line in lines if second.version in line)
    assert "4.801 → 4.661" in row
    assert "0.142 → 0.160" in row
    facts = cope_lc("adapters", "show", "alice", "--json").json
    assert facts["active"] == first.version
    assert [row["version"] for row in facts["versions"]] == [first.version, second.version]
    assert [row["active"] for row in facts["versions"]] == [True, False]
    assert facts["versions"][0]["metrics"]["dpo"]["nll"] == 4.6612
    assert facts["versions"][0]["digest"] == first.digest


def test_a_version_without_metrics_is_shown_too(cope_lc: Callable, publish: Callable) -> None:
    publish(metrics={}, alpha=None, tau=None)
    assert "– → –" in cope_lc("adapters", "show", "alice").stdout


def test_activate_and_its_mistakes(
    cope_lc: Callable, store: AdapterStore, publish: Callable
) -> None:
    first, second = publish(), publish(seed=2)
    outcome = cope_lc("adapters", "activate", "alice", first.version)
    assert outcome.code == 0
    assert outcome.stdout == f"alice: {first.version} is active (before: {second.version})\n"
    assert store.active("alice") == first.version
    for words in (
        ["alice", "20260131T235959Z-0123456789ab"],
        ["alice", "../x"],
        ["bob", first.version],
    ):
        wrong = cope_lc("adapters", "activate", *words)
        assert wrong.code == 2
        assert wrong.error.startswith("error: ")


def test_export_writes_a_peft_folder_once(
    cope_lc: Callable, publish: Callable, tmp_path: Path
) -> None:
    first = publish()
    publish(seed=2)
    folder = tmp_path / "exported"
    assert cope_lc("adapters", "export", "alice", folder, "--version", first.version).code == 0
    assert {path.name for path in folder.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    again = cope_lc("adapters", "export", "alice", folder, "--json")
    assert again.code == 1
    assert str(folder) in again.error
    assert again.stdout == ""


def test_a_damaged_adapter_is_refused_by_name(
    cope_lc: Callable, publish: Callable, store: AdapterStore, tmp_path: Path
) -> None:
    weights = store.fetch_dir(publish()) / "adapter_model.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    outcome = cope_lc("adapters", "export", "alice", tmp_path / "exported")
    assert outcome.code == 1
    assert "adapter_model.safetensors" in outcome.error
    assert not (tmp_path / "exported").exists()


def test_delete_asks_and_without_a_terminal_refuses(
    cope_lc: Callable, store: AdapterStore, publish: Callable
) -> None:
    version = publish()
    outcome = cope_lc("adapters", "delete", "alice", version.version, stdin="y\n")
    assert outcome.code == 2
    assert "--yes" in outcome.error
    assert store.active("alice") == version.version


@pytest.mark.parametrize(("answer", "code"), [("n\n", 1), ("\n", 1), ("y\n", 0)])
def test_delete_on_a_terminal_does_what_is_answered(
    process: Callable, store: AdapterStore, publish: Callable, answer: str, code: int
) -> None:
    publish()
    ours, theirs = pty.openpty()
    run = process("adapters", "delete", "alice", stdin=theirs)
    os.write(ours, answer.encode())
    _, said = run.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    assert run.returncode == code
    assert said.startswith("delete 1 version of alice from ")
    assert bool(store.versions("alice")) is (code != 0)


def test_delete_of_the_active_version_leaves_none_active(
    cope_lc: Callable, store: AdapterStore, publish: Callable
) -> None:
    first, second = publish(), publish(seed=2)
    outcome = cope_lc("adapters", "delete", "alice", second.version, "--yes", "--json")
    assert outcome.json == {"user_id": "alice", "deleted": [second.version], "active": None}
    assert [version.version for version in store.versions("alice")] == [first.version]
    assert "none is active" in cope_lc("adapters", "show", "alice").stdout
    assert cope_lc("adapters", "delete", "alice", "--yes").code == 0
    with pytest.raises(AdapterNotFoundError):
        store.resolve("alice")


def test_a_store_that_is_none_is_told_apart(cope_lc: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for url, code in [(tmp_path / "file", 1), ("ftp://host/x", 1), (tmp_path / "a\nb", 0)]:
        outcome = cope_lc("adapters", "list", "--store", url)
        assert outcome.code == code, url
        if code:
            assert outcome.error.startswith("error: ")
