import re
from collections.abc import Callable
from pathlib import Path

import pytest

from adapter_store import AdapterStore, FileKeys
from adapter_store.conformance import make_adapter


def test_export_writes_a_peft_folder_once(
    cope_lc: Callable, publish: Callable, tmp_path: Path
) -> None:
    first = publish()
    publish(seed=2)
    folder = tmp_path / "exported"
    assert cope_lc("adapters", "export", "alice", folder, "--version", first.version).code == 0
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    again = cope_lc("adapters", "export", "alice", folder, "--json")
    assert again.code == 1
    assert str(folder) in again.error
    assert again.stdout == ""


def test_a_damaged_adapter_is_not_exported(
    cope_lc: Callable, publish: Callable, store: AdapterStore, tmp_path: Path
) -> None:
    weights = store.fetch_dir(publish()) / "adapter_model.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    outcome = cope_lc("adapters", "export", "alice", tmp_path / "exported")
    assert outcome.code == 1
    assert "adapter_model.safetensors" in outcome.error
    assert not (tmp_path / "exported").exists()


def test_a_user_goes_out_as_a_file_and_comes_in_elsewhere(
    cope_lc: Callable, put: Callable, store: AdapterStore, tmp_path: Path
) -> None:
    first, second = put(store), put(store, seed=2)
    file = tmp_path / "alice.tar"
    exported = cope_lc("adapters", "export", "alice", file, "--json").json
    assert exported["versions"] == [first, second]
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
    name = "adapter_model.safetensors"
    assert store.fetch(version)[name] == (folder / name).read_bytes()


def test_a_peft_folder_that_the_base_cannot_serve_is_not_imported(
    cope_lc: Callable, store: AdapterStore, tiny: Callable[..., Path], adapter: Callable[..., Path]
) -> None:
    model, wider = tiny("llama"), tiny("llama", hidden_size=48)
    other = adapter(wider, targets=["q_proj"])
    outcome = cope_lc("adapters", "import", other, "--user", "alice", "--model", model)
    assert outcome.code == 2
    assert "layer of 32 inputs and 32 outputs: it was made for another base" in outcome.stderr
    assert "nothing was imported" in outcome.stderr
    assert store.versions("alice") == []


def test_all_users_move_into_an_encrypted_store(
    cope_lc: Callable,
    put: Callable,
    store: AdapterStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number in range(3):
        put(store, f"user-{number}", seed=number)
    out, key_file, folder = tmp_path / "out", tmp_path / "keys", tmp_path / "encrypted"
    assert cope_lc("adapters", "export-all", out, "--json").json["users"] == 3
    assert cope_lc("adapters", "export-all", out, "--json").json["users"] == 0
    cope_lc("adapters", "new-key", key_file)
    monkeypatch.setenv("COPE_STORE_KEY_FILE", str(key_file))
    encrypted = ("--store", folder)
    imported = cope_lc("adapters", "import-all", out, *encrypted)
    assert imported.stdout == f"3 users imported into {folder}, which is encrypted\n"
    assert cope_lc("adapters", "import-all", tmp_path / "none", *encrypted).code == 2
    assert cope_lc("adapters", "verify", *encrypted, "--json").json["ok"] is True
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if b"user-1" in path.read_bytes()]
    reader = AdapterStore(folder, keys=FileKeys(key_file))
    assert reader.fetch(reader.resolve("user-2")) == make_adapter(2)
    # The plain store is told apart from it, and the other way round.
    outcome = cope_lc("adapters", "list")
    assert outcome.code == 1
    assert "without encryption, and keys were given" in outcome.error
    monkeypatch.delenv("COPE_STORE_KEY_FILE")
    assert "pass its keys" in cope_lc("adapters", "list", *encrypted).error


def test_users_that_an_export_skips_are_counted(
    cope_lc: Callable, put: Callable, store: AdapterStore, tmp_path: Path
) -> None:
    put(store)
    out = tmp_path / "out"
    assert cope_lc("adapters", "export-all", out, "--json").json["already_there"] == 0
    shown = cope_lc("adapters", "export-all", out).stdout
    assert "0 users written" in shown
    assert "1 was there already" in shown
    (tmp_path / "file").write_text("no folder")
    outcome = cope_lc("adapters", "export-all", tmp_path / "file")
    assert outcome.code == 1
    assert "is not a folder" in outcome.error
    assert cope_lc("adapters", "export", "alice", tmp_path / "alice.tar.gz").code == 2


def test_unreadable_users_are_named_and_the_others_go_on(
    cope_lc: Callable, put: Callable, store: AdapterStore, store_folder: Path, tmp_path: Path
) -> None:
    for number in range(3):
        put(store, f"user-{number}")
    key = store.resolve("user-1").user_key
    next(store_folder.rglob(f"{key}/log/*.json")).write_bytes(b"damaged")
    listed = cope_lc("adapters", "list")
    assert listed.code == 1
    assert "user-0" in listed.stdout
    assert "2 users" in listed.stdout
    assert re.search(rf"skipped: .*{key}", listed.stdout)
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


def test_a_folder_without_archives_is_refused(cope_lc: Callable, tmp_path: Path) -> None:
    outcome = cope_lc("adapters", "import-all", tmp_path)
    assert outcome.code == 2
    assert "holds no .tar file" in outcome.error
