import os
from collections.abc import Callable
from pathlib import Path

import pytest

from adapter_store import AdapterStore, FileKeys
from adapter_store.conformance import make_adapter


def test_verify_names_damage_and_exits_with_1(
    cope_lc: Callable, put: Callable, store: AdapterStore, store_folder: Path
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


def test_gc_removes_what_is_not_listed(
    cope_lc: Callable, put: Callable, store: AdapterStore, store_folder: Path
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


def test_a_dry_run_of_gc_writes_nothing(
    cope_lc: Callable, put: Callable, store: AdapterStore, store_folder: Path
) -> None:
    put(store)
    before = {path: path.stat().st_mtime_ns for path in store_folder.rglob("*")}
    assert cope_lc("adapters", "gc", "--dry-run").code == 0
    assert {path: path.stat().st_mtime_ns for path in store_folder.rglob("*")} == before


def test_a_new_key_is_named_after_the_highest(cope_lc: Callable, tmp_path: Path) -> None:
    key_file = tmp_path / "keys"
    for _ in range(3):
        cope_lc("adapters", "new-key", key_file)
    newest = key_file.read_text().splitlines()[0]
    key_file.write_text(f"{newest}\n")  # the older ones destroyed
    named = cope_lc("adapters", "new-key", key_file, "--name", "2027", "--json").json
    assert named["keys"] == ["2027", "key-3"]
    unnamed = cope_lc("adapters", "new-key", key_file, "--json").json
    assert unnamed["keys"] == ["key-4", "2027", "key-3"]


def test_a_key_name_that_is_taken_is_refused(cope_lc: Callable, tmp_path: Path) -> None:
    assert cope_lc("adapters", "new-key", tmp_path / "keys", "--json").json["key"] == "key-1"
    outcome = cope_lc("adapters", "new-key", tmp_path / "keys", "--name", "key-1")
    assert outcome.code == 2
    assert "--name" in outcome.error


def test_rotate_keys_wraps_every_key_with_the_newest(
    cope_lc: Callable, put: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_file, folder = tmp_path / "keys", tmp_path / "encrypted"
    first = cope_lc("adapters", "new-key", key_file).stdout
    assert first == (
        f"key-1 wraps what is new; keep {key_file} safe: without it an encrypted store is lost\n"
    )
    monkeypatch.setenv("COPE_STORE_KEY_FILE", str(key_file))
    for number in range(3):
        put(AdapterStore(folder, keys=FileKeys(key_file)), f"user-{number}", seed=number)
    second = cope_lc("adapters", "new-key", key_file).stdout.splitlines()
    assert second[1] == "then, for each store encrypted with it: cope-lc adapters rotate-keys"
    rotated = cope_lc("adapters", "rotate-keys", "--store", folder, "--json")
    assert rotated.json == {"store": folder.as_uri(), "rewrapped": 4}  # 3 users, the pepper
    key_file.write_text(f"{key_file.read_text().splitlines()[0]}\n")  # the older one destroyed
    reader = AdapterStore(folder, keys=FileKeys(key_file))
    assert reader.fetch(reader.resolve("user-2")) == make_adapter(2)


def test_an_impossible_key_name_is_refused(cope_lc: Callable, tmp_path: Path) -> None:
    outcome = cope_lc("adapters", "new-key", tmp_path / "keys", "--name", "b ad")
    assert outcome.code == 2
    assert "'b ad' is not a key name" in outcome.error
    assert not (tmp_path / "keys").exists()
