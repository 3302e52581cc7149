from collections.abc import Callable
from pathlib import Path

import pytest

from adapter_store import AdapterNotFoundError, AdapterStore

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


def test_an_empty_store_says_how_to_add_a_user(cope_lc: Callable, store_folder: Path) -> None:
    outcome = cope_lc("adapters", "list")
    assert outcome.code == 0
    hint = "add one with: cope-lc personalize FILE --user ID"
    assert outcome.stdout == f"no users in {store_folder}; {hint}\n"
    facts = cope_lc("adapters", "list", "--json").json
    assert facts == {"store": store_folder.as_uri(), "users": [], "problems": []}
    assert not store_folder.exists()


def test_users_are_listed_with_their_active_version(cope_lc: Callable, publish: Callable) -> None:
    first, second = publish("alice"), publish("alice", seed=2)
    publish("bob")
    shown = cope_lc("adapters", "list")
    assert shown.code == 0
    assert shown.stdout.splitlines()[1].split()[:3] == ["alice", second.version, "2"]
    users = cope_lc("adapters", "list", "--json").json["users"]
    assert [user["user_id"] for user in users] == ["alice", "bob"]
    assert users[0]["active"] == second.version
    assert users[0]["versions"] == [first.version, second.version]


def test_users_are_listed_page_by_page(
    cope_lc: Callable, put: Callable, store: AdapterStore
) -> None:
    for number in range(5):
        put(store, f"user-{number}")
    first = cope_lc("adapters", "list", "--limit", 3, "--json").json
    assert len(first["users"]) == 3
    rest = cope_lc("adapters", "list", "--limit", 3, "--cursor", first["next"], "--json").json
    assert "next" not in rest
    assert len({user["user_id"] for user in first["users"] + rest["users"]}) == 5
    shown = cope_lc("adapters", "list", "--limit", 3).stdout
    assert f"more: the same command with --cursor {first['next']}" in shown
    assert cope_lc("adapters", "list", "--cursor", "../x").code == 2
    assert cope_lc("adapters", "list", "--limit", 0).code == 2


def test_hostile_user_ids_never_reach_the_terminal_as_they_are(
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


def test_show_draws_history_and_a_chart(
    cope_lc: Callable, put: Callable, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = [put(store, seed=number, nll=nll) for number, nll in enumerate([4.7, 4.9, 4.5])]
    reason = "worse [red]answers[/red]"
    assert cope_lc("adapters", "rollback", "alice", "--reason", reason).code == 0
    monkeypatch.setenv("COLUMNS", "100")
    shown = cope_lc("adapters", "show", "alice").stdout
    chart = [line for line in shown.splitlines() if "█" in line]
    assert [line.split()[0] for line in chart] == versions
    assert [line.split()[-2] for line in chart] == ["-2.08", "+2.08", "-6.25"]
    lengths = [line.count("█") for line in chart]
    assert lengths[0] == lengths[1] == 10
    assert lengths[2] == 30
    newest = shown.split("\nhistory\n")[1].splitlines()[1]
    assert versions[1] in newest
    assert "rollback" in newest
    assert reason in newest
    assert "4.900" in newest
    history = cope_lc("adapters", "show", "alice", "--json").json["history"]
    assert [change["operation"] for change in history] == ["publish"] * 3 + ["rollback"]
    assert history[-1]["reason"] == reason
    assert history[-1]["active"] == versions[1]
    assert history[-1]["metrics"]["dpo"]["nll"] == 4.9
    assert len(cope_lc("adapters", "show", "alice", "--limit", 1, "--json").json["history"]) == 1


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


def test_an_activation_that_changes_nothing_says_so(
    cope_lc: Callable, put: Callable, store: AdapterStore
) -> None:
    version = put(store)
    outcome = cope_lc("adapters", "activate", "alice", version)
    assert outcome.stdout == f"alice: {version} was active already\n"


def test_rollback_goes_back_and_says_when_it_cannot(
    cope_lc: Callable, put: Callable, store: AdapterStore
) -> None:
    first, second = put(store), put(store, seed=2)
    outcome = cope_lc("adapters", "rollback", "alice")
    assert outcome.stdout == f"alice: {first} is active (before: {second})\n"
    outcome = cope_lc("adapters", "rollback", "alice")
    assert outcome.code == 2
    assert "no earlier active version" in outcome.error
    assert cope_lc("adapters", "rollback", "bob").code == 2
    outcome = cope_lc("adapters", "activate", "alice", second, "--reason", "x" * 2000)
    assert outcome.code == 2
    assert "1000 characters" in outcome.error


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
    on_terminal: Callable, store: AdapterStore, publish: Callable, answer: str, code: int
) -> None:
    publish()
    exit_code, said = on_terminal("adapters", "delete", "alice", answer=answer)
    assert exit_code == code
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


def test_erase_asks_and_leaves_nothing(
    cope_lc: Callable, put: Callable, on_terminal: Callable, store: AdapterStore, store_folder: Path
) -> None:
    put(store)
    refused = cope_lc("adapters", "erase", "alice", stdin="y\n")
    assert refused.code == 2
    assert "--yes" in refused.error
    for answer, expected in (("n\n", 1), ("y\n", 0)):
        code, said = on_terminal("adapters", "erase", "alice", answer=answer)
        assert code == expected
        assert said.startswith(f"erase alice (1 version) from {store_folder} for good?")
    with pytest.raises(AdapterNotFoundError):
        store.resolve("alice")
    assert not list(store_folder.rglob("*.safetensors"))
    again = cope_lc("adapters", "erase", "alice", "--yes", "--json").json
    assert again == {"user_id": "alice", "erased": True, "versions": 0}
    assert cope_lc("adapters", "list", "--json").json["users"] == []


def test_a_damaged_user_is_erased_too(
    cope_lc: Callable, put: Callable, on_terminal: Callable, store: AdapterStore, store_folder: Path
) -> None:
    put(store)
    for damaged in ('{"format": 99}', "{"):
        newest = max(store_folder.glob("users/*/*/*/log/*.json"))
        newest.write_text(damaged)
        assert cope_lc("adapters", "show", "alice").code == 1
    _, said = on_terminal("adapters", "erase", "alice", answer="n\n")
    assert said.startswith(
        f"erase alice (what is there cannot be read) from {store_folder} for good?"
    )
    erased = cope_lc("adapters", "erase", "alice", "--yes", "--json").json
    assert erased == {"user_id": "alice", "erased": True, "versions": None}
    assert not list(store_folder.rglob("*.safetensors"))
    assert AdapterStore(store_folder).verify().ok


def test_erase_makes_no_store_where_none_exists(cope_lc: Callable, tmp_path: Path) -> None:
    outcome = cope_lc("adapters", "erase", "alice", "--yes", "--store", tmp_path / "mistyped")
    assert outcome.code == 2
    assert "mistyped is not a store: nothing was done" in outcome.error
    assert not (tmp_path / "mistyped").exists()


def test_the_history_of_a_deleted_or_erased_user_is_shown(
    cope_lc: Callable, put: Callable, store: AdapterStore
) -> None:
    put(store)
    deleted = cope_lc("adapters", "delete", "alice", "--reason", "left us", "--yes")
    assert "none is active now" in deleted.stdout
    shown = cope_lc("adapters", "show", "alice")
    assert shown.code == 0
    assert "left us" in shown.stdout
    assert "no version is left" in shown.stdout
    cope_lc("adapters", "erase", "alice", "--yes")
    history = cope_lc("adapters", "show", "alice", "--json").json["history"]
    assert [change["operation"] for change in history] == ["erase"]
    assert cope_lc("adapters", "show", "bob").code == 2
