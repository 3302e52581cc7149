"""Names, locations, values and errors as a caller meets them."""

import pickle
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta

import pytest

import adapter_store
from adapter_store import (
    AdapterStore,
    AdapterStoreError,
    BackendError,
    BaseModelMismatchError,
    Limits,
    LocalBackend,
    MemoryBackend,
    errors,
)


def run_python(code):
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return run.stdout.strip()


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
    """The processor's time, and the best of a few: a busy machine is not a slow import."""
    code = """
import time
start = time.process_time()
import adapter_store
print(time.process_time() - start)
"""
    assert min(float(run_python(code)) for _ in range(5)) <= 0.2


def test_an_error_survives_the_way_from_another_process():
    error = BaseModelMismatchError("weights differ", {"weights": ("a", None)})
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.differences) == ("weights differ", {"weights": ("a", None)})
    assert isinstance(copy, AdapterStoreError)


def test_a_local_store_is_named_by_path_by_url_and_by_home(tmp_path, monkeypatch, files):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "my adapters #1"
    version = AdapterStore(folder).publish("alice", files(), base={})
    for location in (
        str(folder),
        "~/my adapters #1",
        folder.as_uri(),
        LocalBackend(folder),
        AdapterStore(folder).url,
    ):
        assert AdapterStore(location).resolve("alice") == version
    monkeypatch.chdir(tmp_path)
    relative = AdapterStore("my adapters #1")
    monkeypatch.chdir("/")
    assert relative.resolve("alice") == version


def test_a_memory_store_is_shared_by_name_and_only_by_name(files):
    version = AdapterStore("memory://one").publish("alice", files(), base={})
    assert AdapterStore("memory://one").resolve("alice") == version
    assert AdapterStore("memory://other").versions("alice") == []
    assert AdapterStore(MemoryBackend("one")).versions("alice") == []
    assert MemoryBackend.shared("") is MemoryBackend.shared("")


@pytest.mark.parametrize(
    ("location", "said"),
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
def test_an_impossible_location_is_refused_without_printing_a_secret(location, said):
    with pytest.raises(BackendError, match=said) as caught:
        AdapterStore(location)
    assert "secret" not in str(caught.value)


def test_another_kind_of_location_is_a_type_error():
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
def test_an_impossible_pepper_is_refused(tmp_path, pepper):
    with pytest.raises(ValueError, match="at least 16 random bytes"):
        AdapterStore(tmp_path, pepper=pepper)


def test_impossible_limits_are_refused_by_name():
    said = r"Limits.live_versions is 0, expected a whole number of at least 1"
    with pytest.raises(ValueError, match=said):
        Limits(live_versions=0)
    with pytest.raises(ValueError, match=r"Limits.weights_bytes is 1.5"):
        Limits(weights_bytes=1.5)


def test_a_version_is_hashable_and_cannot_lead_out_of_the_store(files):
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


@pytest.mark.parametrize(
    "name", ["users", "users/{0}", "users/{0}/{1}/{2}/versions", "probes", "keys"]
)
def test_files_that_others_leave_in_a_store_are_ignored(root, keys, files, name):
    store = AdapterStore(root, keys=keys)
    key = store.publish("alice", files(1), base={}).user_key
    folder = root / name.format(key[:2], key[2:4], key)
    folder.mkdir(exist_ok=True)
    (folder / ".DS_Store").write_bytes(b"from elsewhere")
    assert len(store.list_users()[0]) == 1
    assert store.verify().ok
    assert store.gc(grace=timedelta(0)).problems == []
    assert store.rotate_keys() == 0
    store.erase_user("alice")
    assert store.versions("alice") == []
    assert (folder / ".DS_Store").exists()


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
    loaded = run_python("import sys, adapter_store.conformance; print(*sys.modules)").split()
    assert "pytest" not in loaded
