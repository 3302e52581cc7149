"""The commands that look after a store: history, rollback, erasure, transfer, verification, garbage, keys."""

import os
import pty
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from adapter_store import AdapterNotFoundError, AdapterStore, FileKeys
from adapter_store.conformance import make_adapter

BASE = {"weights": "w", "model": "starter"}


def put(store: AdapterStore, user: str = "alice", seed: int = 1, nll: float = 4.6) -> str:
    metrics = {"base": {"nll": 4.8}, "dpo": {"nll": nll}}
    return store.publish(user, make_adapter(seed), base=BASE, metrics=metrics).version


def test_users_are_listed_page_by_page(cope_lc: Callable, store: AdapterStore) -> None:
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


def test_show_draws_history_and_a_chart(
    cope_lc: Callable, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = [put(store, seed=number, nll=nll) for number, nll in enumerate([4.7, 4.9, 4.5])]
    assert (
        cope_lc("adapters", "rollback", "alice", "--reason", "worse [red]answers[/red]").code == 0
    )
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
    assert "worse [red]answers[/red]" in newest
    assert "4.900" in newest
    history = cope_lc("adapters", "show", "alice", "--json").json["history"]
    assert [change["operation"] for change in history] == [
        "publish",
        "publish",
        "publish",
        "rollback",
    ]
    assert history[-1]["reason"] == "worse [red]answers[/red]"
    assert history[-1]["active"] == versions[1]
    assert history[-1]["metrics"]["dpo"]["nll"] == 4.9
    assert len(cope_lc("adapters", "show", "alice", "--limit", 1, "--json").json["history"]) == 1


def test_rollback_goes_back_and_says_where_there_is_nothing(
    cope_lc: Callable, store: AdapterStore
) -> None:
    first, second = put(store), put(store, seed=2)
    assert (
        cope_lc("adapters", "rollback", "alice").stdout
        == f"alice: {first} is active (before: {second})\n"
    )
    outcome = cope_lc("adapters", "rollback", "alice")
    assert outcome.code == 2
    assert "no earlier active version" in outcome.error
    assert cope_lc("adapters", "rollback", "bob").code == 2
    outcome = cope_lc("adapters", "activate", "alice", second, "--reason", "x" * 2000)
    assert outcome.code == 2
    assert "1000 characters" in outcome.error


def test_erase_asks_and_leaves_nothing(
    cope_lc: Callable, process: Callable, store: AdapterStore, store_folder: Path
) -> None:
    put(store)
    refused = cope_lc("adapters", "erase", "alice", stdin="y\n")
    assert refused.code == 2
    assert "--yes" in refused.error
    for answer, code in ((b"n\n", 1), (b"y\n", 0)):
        ours, theirs = pty.openpty()
        run = process("adapters", "erase", "alice", stdin=theirs)
        os.write(ours, answer)
        _, said = run.communicate(timeout=60)
        os.close(ours)
        os.close(theirs)
        assert run.returncode == code
        assert said.startswith(f"erase alice (1 version) from {store_folder} for good?")
    with pytest.raises(AdapterNotFoundError):
        store.resolve("alice")
    assert not list(store_folder.rglob("*.safetensors"))
    again = cope_lc("adapters", "erase", "alice", "--yes", "--json").json
    assert again == {"user_id": "alice", "erased": True, "versions": 0}
    assert cope_lc("adapters", "list", "--json").json["users"] == []


def test_a_damaged_user_is_erased_too(
    cope_lc: Callable, process: Callable, store: AdapterStore, store_folder: Path
) -> None:
    put(store)
    for damaged in ('{"format": 99}', "{"):
        newest = max(store_folder.glob("users/*/*/*/log/*.json"))
        newest.write_text(damaged)
        assert cope_lc("adapters", "show", "alice").code == 1
    ours, theirs = pty.openpty()
    run = process("adapters", "erase", "alice", stdin=theirs)
    os.write(ours, b"n\n")
    _, said = run.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    assert said.startswith(
        f"erase alice (what is there cannot be read) from {store_folder} for good?"
    )
    erased = cope_lc("adapters", "erase", "alice", "--yes", "--json").json
    assert erased == {"user_id": "alice", "erased": True, "versions": None}
    assert not list(store_folder.rglob("*.safetensors"))
    assert AdapterStore(store_folder).verify().ok


def test_erase_makes_no_store_where_there_is_none(cope_lc: Callable, tmp_path: Path) -> None:
    outcome = cope_lc("adapters", "erase", "alice", "--yes", "--store", tmp_path / "mistyped")
    assert outcome.code == 2
    assert "mistyped is no store: nothing was done" in outcome.error
    assert not (tmp_path / "mistyped").exists()


def test_a_user_goes_out_as_a_file_and_comes_in_elsewhere(
    cope_lc: Callable, store: AdapterStore, tmp_path: Path
) -> None:
    first, second = put(store), put(store, seed=2)
    file = tmp_path / "alice.tar"
    assert cope_lc("adapters", "export", "alice", file, "--json").json["versions"] == [
        first,
        second,
    ]
    assert cope_lc("adapters", "export", "alice", file).code == 1  # never written over
    assert cope_lc("adapters", "export", "alice", tmp_path / "b.tar", "--version", first).code == 2
    other = ("--store", tmp_path / "other")
    said = cope_lc("adapters", "import", file, *other)
    moved = [version.version for version in AdapterStore(tmp_path / "other").versions("alice")]
    assert said.stdout == f"alice has 2 versions; active is {moved[1]}\n"
    assert cope_lc("adapters", "import", file, *other, "--json").json["versions"] == moved
    assert cope_lc("adapters", "import", file, "--user", "bob", *other).code == 2
    assert cope_lc("adapters", "import", tmp_path / "none.tar", *other).code == 2
    file.write_bytes(b"no tar" * 1000)
    broken = cope_lc("adapters", "import", file, *other)
    assert broken.code == 2
    assert "is not a tar file that export_user wrote" in broken.error


def test_all_users_move_into_an_encrypted_store(
    cope_lc: Callable, store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        put(store, f"user-{number}", seed=number)
    assert cope_lc("adapters", "export-all", tmp_path / "out", "--json").json["users"] == 3
    assert cope_lc("adapters", "export-all", tmp_path / "out", "--json").json["users"] == 0
    key_file = tmp_path / "keys"
    assert cope_lc("adapters", "new-key", key_file, "--json").json["key"] == "key-1"
    monkeypatch.setenv("COPE_STORE_KEY_FILE", str(key_file))
    encrypted = ("--store", tmp_path / "encrypted")
    assert cope_lc("adapters", "import-all", tmp_path / "out", *encrypted).stdout == (
        f"3 users imported into {tmp_path / 'encrypted'}, which is encrypted\n"
    )
    assert cope_lc("adapters", "import-all", tmp_path / "none", *encrypted).code == 2
    assert b"user-1" not in b"".join(
        p.read_bytes() for p in (tmp_path / "encrypted").rglob("*") if p.is_file()
    )
    assert cope_lc("adapters", "new-key", key_file, "--json").json["keys"] == ["key-2", "key-1"]
    assert cope_lc("adapters", "new-key", key_file, "--name", "key-1").code == 2
    assert cope_lc("adapters", "rotate-keys", *encrypted, "--json").json["rewrapped"] == 4
    assert cope_lc("adapters", "verify", *encrypted, "--json").json["ok"] is True
    reader = AdapterStore(tmp_path / "encrypted", keys=FileKeys(key_file))
    assert reader.fetch(reader.resolve("user-2")) == make_adapter(2)
    # The plain store is told apart from it, and the other way round.
    outcome = cope_lc("adapters", "list")
    assert outcome.code == 1
    assert "without encryption, and keys were given" in outcome.error
    monkeypatch.delenv("COPE_STORE_KEY_FILE")
    assert "pass its keys" in cope_lc("adapters", "list", *encrypted).error


def test_a_new_key_is_named_after_the_highest(cope_lc: Callable, tmp_path: Path) -> None:
    key_file = tmp_path / "keys"
    for _ in range(3):
        cope_lc("adapters", "new-key", key_file)
    newest = key_file.read_text().splitlines()[0]
    key_file.write_text(f"{newest}\n")  # the older ones destroyed
    assert cope_lc("adapters", "new-key", key_file, "--name", "2027", "--json").json["keys"] == [
        "2027",
        "key-3",
    ]
    assert cope_lc("adapters", "new-key", key_file, "--json").json["keys"] == [
        "key-4",
        "2027",
        "key-3",
    ]


def test_a_peft_folder_becomes_a_users_version(
    cope_lc: Callable, store: AdapterStore, tiny: Callable[..., Path], adapter: Callable[..., Path]
) -> None:
    from langchain_cope.engine import load_base

    folder, model = adapter(tiny("llama")), tiny("llama")
    assert "--user" in cope_lc("adapters", "import", folder, "--model", model).error
    outcome = cope_lc("adapters", "import", folder, "--user", "alice", "--model", model, "--json")
    assert outcome.code == 0, outcome
    version = store.resolve("alice", base=load_base(model).fingerprint())
    assert outcome.json["active"] == version.version
    assert (
        store.fetch(version)["adapter_model.safetensors"]
        == (folder / "adapter_model.safetensors").read_bytes()
    )


def test_verify_names_damage_and_ends_with_one(
    cope_lc: Callable, store: AdapterStore, store_folder: Path
) -> None:
    put(store)
    put(store, "bob")
    assert cope_lc("adapters", "verify").stdout.splitlines()[-1] == "all is what was published"
    weights = next(store_folder.rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    outcome = cope_lc("adapters", "verify", "--json")
    assert outcome.code == 1
    assert (outcome.json["ok"], outcome.json["users"], outcome.json["versions"]) == (False, 2, 2)
    assert "sha256 differs" in outcome.json["damaged"][0]["problems"][0]
    shown = cope_lc("adapters", "verify")
    assert shown.stdout.splitlines()[-1] == "1 of them with damage"
    assert str(weights) in shown.stdout.replace("\n", "")
    damaged = outcome.json["damaged"][0]["user_id"]
    whole = {"alice": "bob", "bob": "alice"}[damaged]
    assert cope_lc("adapters", "verify", whole).code == 0
    assert cope_lc("adapters", "verify", damaged).code == 1


def test_users_who_cannot_be_read_are_named_and_stop_nobody_else(
    cope_lc: Callable, store: AdapterStore, store_folder: Path, tmp_path: Path
) -> None:
    for number in range(3):
        put(store, f"user-{number}")
    key = store.resolve("user-1").user_key
    next(store_folder.rglob(f"{key}/log/*.json")).write_bytes(b"damaged")
    listed = cope_lc("adapters", "list")
    assert listed.code == 1
    assert "user-0" in listed.stdout
    assert "2 users" in listed.stdout
    assert re.search(rf"passed over: .*{key}", listed.stdout)
    as_json = cope_lc("adapters", "list", "--json")
    assert as_json.code == 1
    assert [key in problem for problem in as_json.json["problems"]] == [True]
    exported = cope_lc("adapters", "export-all", tmp_path / "out")
    assert exported.code == 1
    assert "2 users written" in exported.stdout
    assert key in exported.stdout
    (tmp_path / "out" / "bad.tar").write_bytes(b"no archive")
    other = ("--store", tmp_path / "other")
    imported = cope_lc("adapters", "import-all", tmp_path / "out", *other)
    assert imported.code == 1
    assert "2 users imported" in imported.stdout
    assert "bad.tar" in imported.stdout
    (tmp_path / "out" / "bad.tar").unlink()
    again = cope_lc("adapters", "import-all", tmp_path / "out", *other, "--json")
    assert (again.code, again.json["users"], again.json["problems"]) == (0, 2, [])


def test_gc_takes_what_is_not_listed(
    cope_lc: Callable, store: AdapterStore, store_folder: Path
) -> None:
    version = put(store)
    orphan = next(store_folder.rglob(version)).with_name("20200101T000000Z-000000000000")
    orphan.mkdir()
    (orphan / "adapter_config.json").write_bytes(b"{}")
    os.utime(orphan / "adapter_config.json", (0, 0))
    assert cope_lc("adapters", "verify", "--json").json["orphans"] == 1
    assert cope_lc("adapters", "gc", "--dry-run", "--json").json["versions"] == 1
    assert orphan.exists()
    assert cope_lc("adapters", "gc").stdout.startswith("removed 1 unlisted versions")
    assert not orphan.exists()
    assert store.active("alice") == version
    assert cope_lc("adapters", "gc", "--grace-hours", "-1").code == 2


def test_who_mistypes_a_store_or_a_user_is_not_told_that_all_is_well(
    cope_lc: Callable, store: AdapterStore, tmp_path: Path
) -> None:
    put(store)
    for words in (
        ["verify"],
        ["gc"],
        ["rotate-keys"],
        ["export-all", tmp_path / "out"],
        ["erase", "alice", "--yes"],
    ):
        outcome = cope_lc("adapters", *words, "--store", tmp_path / "nowhere")
        assert outcome.code == 2
        assert "is no store: nothing was done" in outcome.error
        outcome = cope_lc("adapters", *words, "--store", "")
        assert outcome.code == 2
        assert "it is empty" in outcome.error
    assert not (tmp_path / "nowhere").exists()
    outcome = cope_lc("adapters", "verify", "bob")
    assert outcome.code == 2
    assert "user 'bob' has no adapter" in outcome.error
    assert (
        cope_lc("adapters", "erase", "bob", "--yes").stdout
        == "erased bob; no adapter was there under this id\n"
    )
    assert cope_lc("adapters", "verify", "bob").code == 0  # what is left says that he was erased


def test_the_history_of_who_was_deleted_or_erased_is_shown(
    cope_lc: Callable, store: AdapterStore
) -> None:
    put(store)
    assert (
        "none is active now"
        in cope_lc("adapters", "delete", "alice", "--reason", "left us", "--yes").stdout
    )
    shown = cope_lc("adapters", "show", "alice")
    assert shown.code == 0
    assert "left us" in shown.stdout
    assert "no version is left" in shown.stdout
    cope_lc("adapters", "erase", "alice", "--yes")
    assert [
        change["operation"]
        for change in cope_lc("adapters", "show", "alice", "--json").json["history"]
    ] == ["erase"]
    assert cope_lc("adapters", "show", "bob").code == 2


def test_an_activation_that_changes_nothing_says_so(cope_lc: Callable, store: AdapterStore) -> None:
    version = put(store)
    assert (
        cope_lc("adapters", "activate", "alice", version).stdout
        == f"alice: {version} was active already\n"
    )


def test_a_dry_run_writes_nothing(
    cope_lc: Callable, store: AdapterStore, store_folder: Path
) -> None:
    put(store)
    before = {path: path.stat().st_mtime_ns for path in store_folder.rglob("*")}
    assert cope_lc("adapters", "gc", "--dry-run").code == 0
    assert {path: path.stat().st_mtime_ns for path in store_folder.rglob("*")} == before


def test_a_folder_without_archives_and_a_name_that_is_none_are_refused(
    cope_lc: Callable, tmp_path: Path
) -> None:
    outcome = cope_lc("adapters", "import-all", tmp_path)
    assert outcome.code == 2
    assert "holds no .tar file" in outcome.error
    outcome = cope_lc("adapters", "new-key", tmp_path / "keys", "--name", "b ad")
    assert outcome.code == 2
    assert "'b ad' is no name" in outcome.error
    assert not (tmp_path / "keys").exists()


def test_what_an_export_passes_over_is_said(
    cope_lc: Callable, store: AdapterStore, tmp_path: Path
) -> None:
    put(store)
    assert cope_lc("adapters", "export-all", tmp_path / "out", "--json").json["already_there"] == 0
    shown = cope_lc("adapters", "export-all", tmp_path / "out").stdout
    assert "0 users written" in shown
    assert "1 was there already" in shown
    (tmp_path / "file").write_text("no folder")
    outcome = cope_lc("adapters", "export-all", tmp_path / "file")
    assert outcome.code == 1
    assert "is not a folder" in outcome.error
    assert cope_lc("adapters", "export", "alice", tmp_path / "alice.tar.gz").code == 2


def test_a_store_url_never_prints_its_secret(cope_lc: Callable, tmp_path: Path) -> None:
    url = "s3://key:s3cr3t@bucket/prefix?endpoint=http://127.0.0.1:9&region=us-east-1"
    for words in (["list"], ["show", "alice"], ["gc"], ["verify"], ["erase", "alice", "--yes"]):
        outcome = cope_lc("adapters", *words, "--store", url)
        assert outcome.code == 1
        assert "s3cr3t" not in outcome.stdout + outcome.stderr
        assert "s3://***@bucket/prefix" in outcome.error


def test_a_store_in_object_storage_is_as_good_as_a_folder(
    cope_lc: Callable, tmp_path: Path
) -> None:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    server.start()
    try:
        endpoint = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
        urllib.request.urlopen(
            urllib.request.Request(f"{endpoint}/bucket", method="PUT"), timeout=30
        ).close()
        url = f"s3://key:s3cr3t@bucket/prefix?endpoint={endpoint}&region=us-east-1"
        version = put(AdapterStore(url))
        listed = cope_lc("adapters", "list", "--store", url, "--json")
        assert listed.json["store"] == "s3://***@bucket/prefix?***"
        assert listed.json["users"][0]["active"] == version
        assert cope_lc("adapters", "export", "alice", tmp_path / "out", "--store", url).code == 0
        assert cope_lc("adapters", "erase", "alice", "--yes", "--store", url).code == 0
        assert AdapterStore(url).versions("alice") == []
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("COPE_STORE_PEPPER", "no hex", "COPE_STORE_PEPPER cannot be used"),
        ("COPE_STORE_PEPPER", "ab", "COPE_STORE_PEPPER cannot be used.*16 random bytes"),
        ("COPE_STORE_KEYS", "s3cr3t", "COPE_STORE_KEYS"),
        ("COPE_STORE_KEYS", "", "COPE_STORE_KEYS is set and empty"),
        ("COPE_STORE_KEY_FILE", "/nowhere", "cannot read the key file /nowhere"),
    ],
)
def test_a_setting_that_cannot_be_is_named(
    cope_lc: Callable, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    outcome = cope_lc("adapters", "list")
    assert outcome.code == 1
    assert re.search(said, outcome.error)
