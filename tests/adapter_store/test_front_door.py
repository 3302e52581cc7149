"""Names, places, values and errors as a caller meets them."""

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

import adapter_store
from adapter_store import (
    AdapterStore,
    AdapterStoreError,
    BackendError,
    BaseModelMismatchError,
    FileKeys,
    Limits,
    LocalBackend,
    MemoryBackend,
    errors,
    scratch,
)


def run_python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.strip()


def test_all_names_the_public_things_and_every_error():
    for name in adapter_store.__all__:
        assert getattr(adapter_store, name) is not None
    classes = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert classes <= set(adapter_store.__all__)
    for name in classes:
        assert name in (errors.__doc__ or "")


def test_importing_brings_no_heavy_package():
    loaded = run_python("import sys, adapter_store; print(*sys.modules)").split()
    heavy = {
        "torch",
        "pydantic",
        "numpy",
        "langchain_core",
        "safetensors",
        "obstore",
        "cryptography",
        "filelock",
        "pytest",
    }
    assert not heavy & set(loaded)


def test_importing_takes_no_time():
    """The processor's time, and the best of a few: a busy machine is no slow import."""
    code = "import time; start = time.process_time(); import adapter_store; print(time.process_time() - start)"
    assert min(float(run_python(code)) for _ in range(5)) <= 0.1


def test_an_error_survives_the_way_from_another_process():
    error = BaseModelMismatchError("weights differ", {"weights": ("a", None)})
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.differences) == ("weights differ", {"weights": ("a", None)})
    assert isinstance(copy, AdapterStoreError)


def test_a_local_place_is_named_by_path_by_url_and_by_home(tmp_path, monkeypatch, files):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "my adapters #1"
    version = AdapterStore(folder).publish("alice", files(), base={})
    for place in (
        str(folder),
        "~/my adapters #1",
        folder.as_uri(),
        LocalBackend(folder),
        AdapterStore(folder).url,
    ):
        assert AdapterStore(place).resolve("alice") == version
    monkeypatch.chdir(tmp_path)
    relative = AdapterStore("my adapters #1")
    monkeypatch.chdir("/")
    assert relative.resolve("alice") == version


def test_a_memory_place_is_shared_by_name_and_only_by_name(files):
    version = AdapterStore("memory://one").publish("alice", files(), base={})
    assert AdapterStore("memory://one").resolve("alice") == version
    assert AdapterStore("memory://other").versions("alice") == []
    assert AdapterStore(MemoryBackend("one")).versions("alice") == []
    assert MemoryBackend.shared("") is MemoryBackend.shared("")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (
            "ftp://key:secret@bucket/path",
            r"ftp://\*\*\*@bucket/path has an unknown scheme: supported are a folder path",
        ),
        ("ftp://bucket?token=secret", r"ftp://bucket\?\*\*\* has an unknown scheme"),
        ("file://relative/path", "names no folder of this machine: write file:///absolute/path"),
        ("file:///path?token=secret", r"file:///path\?\*\*\* names no folder"),
        ("", "'' is not a path of a folder"),
        ("a\0b", "is not a path of a folder"),
        ("~nobody-of-this-name/x", "cannot expand the path"),
    ],
)
def test_a_place_that_cannot_be_is_refused_without_printing_a_secret(place, said):
    with pytest.raises(BackendError, match=said) as caught:
        AdapterStore(place)
    assert "secret" not in str(caught.value)


def test_another_kind_of_place_is_a_type_error():
    with pytest.raises(TypeError, match="named by a folder, a URL or a Backend, not by 7"):
        AdapterStore(7)


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:secret@bucket/prefix",
        "s3://key:sec/secret?x@bucket/prefix",
        "s3://bucket/prefix?secret=1",
        "s3://bucket/prefix#secret",
    ],
)
def test_a_url_with_a_secret_prints_without_it(url):
    store = AdapterStore(type("Remote", (MemoryBackend,), {"url": url})())
    assert "secret" not in store.url + repr(store)
    assert "***" in store.url
    assert "bucket/prefix" in store.url
    assert repr(AdapterStore(MemoryBackend())) == "AdapterStore('memory://')"


@pytest.mark.parametrize("pepper", [b"", b"short", "text of at least 16 characters"])
def test_a_pepper_that_is_none_is_refused(tmp_path, pepper):
    with pytest.raises(ValueError, match="at least 16 random bytes"):
        AdapterStore(tmp_path, pepper=pepper)


def test_impossible_limits_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"Limits.live_versions is 0, expected a whole number of at least 1"
    ):
        Limits(live_versions=0)
    with pytest.raises(ValueError, match=r"Limits.weights_bytes is 1.5"):
        Limits(weights_bytes=1.5)


def test_a_version_can_be_a_key_and_cannot_lead_out_of_the_store(files):
    store = AdapterStore(MemoryBackend())
    version = store.publish("alice", files(), base={}, metrics={"nll": [1.0]})
    assert {version: 1}[store.resolve("alice")] == 1
    for change in (
        {"version": "../../x"},
        {"user_key": "../x"},
        {"files": {}},
        {"version": version.version + "\n"},
    ):
        with pytest.raises(ValueError, match="expected"):
            replace(version, **change)


def test_a_memory_store_leaves_nothing_on_disk_after_the_process(tmp_path, peft_folder):
    code = """
import os, sys
from adapter_store import AdapterStore
store = AdapterStore("memory://")
version = store.publish("alice", sys.argv[1], base={})
assert os.listdir(os.environ["TMPDIR"]) == []
folder = store.fetch_dir(version)
if os.fork() == 0:
    sys.exit()  # a child's exit takes nothing away from its parent
os.wait()
assert folder.is_dir() and str(folder).startswith(os.environ["TMPDIR"])
print(oct(folder.stat().st_mode & 0o777), oct(folder.parent.stat().st_mode & 0o777))
"""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", code, str(peft_folder)],
        env=os.environ | {"TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stdout.strip()) == (0, "0o700 0o700"), result.stderr
    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_left_in_the_temporary_folder_goes_with_the_next(
    tmp_path, peft_folder
):
    code = """
import os, sys
from adapter_store import AdapterStore
store = AdapterStore("memory://")
print(store.fetch_dir(store.publish("alice", sys.argv[1], base={})), flush=True)
sys.stdin.readline()
"""

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(peft_folder)],
            env=os.environ | {"TMPDIR": str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return process, Path(process.stdout.readline().strip())

    killed, its_folder = start()
    living, other_folder = start()
    assert its_folder.is_dir()
    killed.kill()
    killed.communicate()
    assert its_folder.is_dir()
    third, _ = start()
    assert not its_folder.parent.exists()
    assert other_folder.is_dir()
    for process in (living, third):
        process.communicate("\n")
    assert [
        path.name for path in tmp_path.iterdir() if path.name.startswith("adapter-store-")
    ] == []


def test_an_erasure_takes_the_temporary_folders_of_other_processes_too(tmp_path, files):
    script = """
import sys
from adapter_store import AdapterStore, FileKeys
store = AdapterStore(sys.argv[1], keys=FileKeys(sys.argv[2]))
print(store.fetch_dir(store.resolve("alice")), flush=True)
print(store.fetch_dir(store.resolve("bob")), flush=True)
input()
"""
    keys = FileKeys.create(tmp_path / "keys")
    store = AdapterStore(tmp_path / "store", keys=keys)
    for number, user in enumerate(("alice", "bob")):
        store.publish(user, files(number), base={})
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "store"), str(tmp_path / "keys")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    alice, bob = (Path(process.stdout.readline().strip()) for _ in range(2))
    assert alice.is_dir()
    store.erase_user("alice")
    assert not alice.exists()
    assert bob.is_dir()
    process.communicate("\n")


def test_folders_that_others_put_in_the_temporary_folder_are_not_touched(
    tmp_path, files, monkeypatch
):
    temporary, elsewhere = tmp_path / "temporary", tmp_path / "elsewhere"
    user_key = AdapterStore(tmp_path / "store").publish("alice", files(1), base={}).user_key
    (elsewhere / f"{user_key}@x").mkdir(parents=True)
    (elsewhere / ".lock").touch()
    temporary.mkdir()
    (temporary / "adapter-store-link").symlink_to(elsewhere)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(scratch, "_folders", {})
    store = AdapterStore(tmp_path / "other", keys=FileKeys.create(tmp_path / "keys"))
    folder = store.fetch_dir(store.publish("alice", files(1), base={}))
    assert folder.is_relative_to(temporary)
    AdapterStore(tmp_path / "store").erase_user("alice")
    assert (elsewhere / f"{user_key}@x").is_dir()
    assert (elsewhere / ".lock").exists()


def test_a_cleaner_of_temporary_files_costs_nothing_but_another_folder(files):
    store = AdapterStore(MemoryBackend())
    version = store.publish("alice", files(1), base={})
    shutil.rmtree(store.fetch_dir(version).parent)
    assert (store.fetch_dir(version) / "adapter_config.json").is_file()


def test_a_forked_child_does_not_let_go_of_its_parents_folders(tmp_path):
    code = """
import os, subprocess, sys
from adapter_store import scratch
folder = scratch.write_scratch("a", {"file": b"1"})
if (child := os.fork()) == 0:
    sys.exit()
os.waitpid(child, 0)
other = "from adapter_store import scratch; scratch.write_scratch('b', {'file': b'1'})"
subprocess.run([sys.executable, "-c", other], check=True)
print(folder.is_dir())
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    assert found.stdout.strip() == "True"


@pytest.mark.parametrize(
    "place", ["users", "users/{0}", "users/{0}/{1}/{2}/versions", "probes", "keys"]
)
def test_files_that_others_leave_in_a_store_are_in_nobodys_way(tmp_path, files, place):
    store = AdapterStore(tmp_path / "store", keys=FileKeys.create(tmp_path / "keys"))
    key = store.publish("alice", files(1), base={}).user_key
    folder = tmp_path / "store" / place.format(key[:2], key[2:4], key)
    folder.mkdir(exist_ok=True)
    (folder / ".DS_Store").write_bytes(b"from elsewhere")
    assert len(store.list_users()[0]) == 1
    assert store.verify().ok
    assert store.gc(grace=timedelta(0)).problems == []
    assert store.rotate_keys() == 0
    store.erase_user("alice")
    assert store.versions("alice") == []
    assert (folder / ".DS_Store").exists()


def test_temporary_folders_stay_within_bounds(monkeypatch, files):
    monkeypatch.setattr(scratch, "MAX_BYTES", 50_000)
    store = AdapterStore(MemoryBackend())
    folders = [
        store.fetch_dir(store.publish(f"user {number}", files(number, num_values=2000), base={}))
        for number in range(30)
    ]
    there = [folder.is_dir() for folder in folders]
    assert not any(there[:14])
    assert all(there[14:])


def test_a_store_goes_to_another_process(tmp_path, files):
    store = AdapterStore(
        tmp_path / "store", pepper=b"a pepper of sixteen bytes", cache=tmp_path / "cache"
    )
    version = store.publish("alice", files(1), base={})
    copy = pickle.loads(pickle.dumps(store))
    assert copy.resolve("alice") == version
    assert copy.fetch(version) == files(1)
    copy.publish("alice", files(2), base={})


def test_reading_the_conformance_suite_needs_no_pytest():
    assert (
        "pytest"
        not in run_python("import sys, adapter_store.conformance; print(*sys.modules)").split()
    )
