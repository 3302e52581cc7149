"""Temporary folders of versions: they go with their process, and with what an erasure takes."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from adapter_store import AdapterStore, MemoryBackend, scratch


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


def test_what_a_killed_process_left_goes_with_the_next(tmp_path, peft_folder):
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
    assert list(tmp_path.glob("adapter-store-*")) == []


def test_an_erasure_takes_the_temporary_folders_of_other_processes(tmp_path, root, keys, files):
    script = """
import sys
from adapter_store import AdapterStore, FileKeys
store = AdapterStore(sys.argv[1], keys=FileKeys(sys.argv[2]))
print(store.fetch_dir(store.resolve("alice")), flush=True)
print(store.fetch_dir(store.resolve("bob")), flush=True)
input()
"""
    store = AdapterStore(root, keys=keys)
    for number, user in enumerate(("alice", "bob")):
        store.publish(user, files(number), base={})
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(root), str(tmp_path / "keys")],
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


def test_what_others_put_in_the_temporary_folder_is_not_touched(
    tmp_path, local, keys, files, monkeypatch
):
    temporary, elsewhere = tmp_path / "temporary", tmp_path / "elsewhere"
    user_key = local.publish("alice", files(1), base={}).user_key
    (elsewhere / f"{user_key}@x").mkdir(parents=True)
    (elsewhere / ".lock").touch()
    temporary.mkdir()
    (temporary / "adapter-store-link").symlink_to(elsewhere)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(scratch, "_folders", {})
    store = AdapterStore(tmp_path / "other", keys=keys)
    folder = store.fetch_dir(store.publish("alice", files(1), base={}))
    assert folder.is_relative_to(temporary)
    local.erase_user("alice")
    assert (elsewhere / f"{user_key}@x").is_dir()
    assert (elsewhere / ".lock").exists()


def test_a_cleaner_of_temporary_files_costs_nothing_but_another_folder(files):
    store = AdapterStore(MemoryBackend())
    version = store.publish("alice", files(1), base={})
    shutil.rmtree(store.fetch_dir(version).parent)
    assert (store.fetch_dir(version) / "adapter_config.json").is_file()


def test_a_forked_child_does_not_release_its_parents_folders(tmp_path):
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
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    assert run.stdout.strip() == "True"


def test_temporary_folders_stay_within_bounds(monkeypatch, files):
    monkeypatch.setattr(scratch, "MAX_BYTES", 50_000)
    store = AdapterStore(MemoryBackend())
    folders = []
    for number in range(30):
        version = store.publish(f"user {number}", files(number, num_values=2000), base={})
        folders.append(store.fetch_dir(version))
    there = [folder.is_dir() for folder in folders]
    assert not any(there[:14])
    assert all(there[14:])
