"""What object storage adds: servers that cannot do it or are not there, forks, and secrets."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forgetful_s3 import forgetful_s3

from adapter_store import AdapterNotFoundError, AdapterStore, BackendError, LocalBackend
from adapter_store.backends.protocol import open_backend

BASE = {"weights": "w"}


def run_python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )


def url_at(endpoint, bucket="bucket"):
    return f"s3://key:s3cr3t@{bucket}/prefix?endpoint={endpoint}&region=us-east-1"


def test_a_server_that_ignores_the_condition_is_refused_before_anything_is_stored(files):
    with forgetful_s3() as (url, objects):
        store = AdapterStore(url_at(url))
        for call in (
            lambda: store.publish("alice", files(), base=BASE),
            lambda: store.prepare("alice"),
            lambda: store.erase_user("alice"),
        ):
            said = r"writes over what is there .*If-None-Match"
            with pytest.raises(BackendError, match=said) as caught:
                call()
            assert "s3cr3t" not in str(caught.value)
        assert objects == {}


def test_the_small_server_can_do_everything_else(files):
    """So that the refusal above is about the condition."""
    with forgetful_s3() as (url, objects):
        backend = open_backend(url_at(url))
        backend.put_if_absent("a/b.bin", b"content")
        assert list(objects) == ["prefix/a/b.bin"]
        assert backend.get("a/b.bin", 100) == b"content"
        assert backend.list_folder("a") == ["b.bin"]
        assert backend.stat("a/b.bin").size == 7
        backend.delete("a/b.bin")
        assert objects == {}


def test_equal_content_that_is_written_again_has_another_mark(s3_url):
    """Its ETag is the same: a warm reader would take it for what it remembers."""
    backend = open_backend(s3_url)
    marks = []
    for _ in range(2):
        backend.put_if_absent("a/b.bin", b"content")
        marks.append(backend.stat("a/b.bin").mark)
        backend.delete("a/b.bin")
        time.sleep(1.1)  # the storage's clock tells seconds
    assert marks[0] != marks[1]
    assert marks[0][0] == marks[1][0]


def test_a_backend_of_your_own_that_writes_over_things_is_refused(files, tmp_path):
    class Overwriting(LocalBackend):
        def put_if_absent(self, key, data):
            self.delete(key)
            super().put_if_absent(key, data)

    with pytest.raises(BackendError, match="writes over what is there"):
        AdapterStore(Overwriting(tmp_path / "store")).publish("alice", files(), base=BASE)
    assert not (tmp_path / "store" / "users").exists()


def test_a_server_that_is_not_there_is_an_error_without_secrets():
    store = AdapterStore(url_at("http://127.0.0.1:9"))
    with pytest.raises(BackendError, match=r"cannot read s3://\*\*\*@bucket/prefix") as caught:
        store.resolve("alice")
    assert "s3cr3t" not in str(caught.value) + repr(caught.value) + repr(store) + store.url
    assert len(str(caught.value)) < 700


def test_a_bucket_that_is_not_there_is_an_error_when_writing(s3_server, files):
    store = AdapterStore(url_at(s3_server, bucket="no-such-bucket"))
    with pytest.raises(BackendError, match=r"cannot write .*no-such-bucket"):
        store.publish("alice", files(), base=BASE)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://bucket/x?no_such_option=s3cr3t", r"cannot open s3://bucket/x\?\*\*\*"),
        ("s3:///prefix", "names no bucket"),
        (
            "s3://key:s3cr3t[x@bucket/x",
            r"s3://\*\*\*@bucket/x is not a URL: write s3://bucket/prefix",
        ),
        ("gs://user:s3cr3t@bucket/x", r"gs://\*\*\*@bucket/x holds credentials"),
        ("s3://bucket/x#s3cr3t", "names no bucket"),
    ],
)
def test_an_impossible_url_is_refused_without_its_secret(url, said):
    with pytest.raises(BackendError, match=said) as caught:
        AdapterStore(url)
    assert "s3cr3t" not in str(caught.value)


def test_the_schemes_of_the_three_clouds_open_lazily(monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    for url in ("s3://bucket/prefix", "gs://bucket/prefix", "az://container/prefix"):
        assert AdapterStore(url).url == url


def test_without_obstore_it_says_what_to_install():
    code = """
import sys
sys.modules["obstore"] = sys.modules["obstore.store"] = None
from adapter_store import AdapterStore, BackendError
try:
    AdapterStore("s3://bucket/x")
except BackendError as error:
    print(error)
"""
    run = run_python(code)
    assert run.returncode == 0
    assert "pip install 'langchain-cope[cloud]'" in run.stdout


def test_a_used_store_says_so_in_a_forked_child_instead_of_hanging(s3_url):
    code = """
import os, sys
from adapter_store import AdapterStore, AdapterNotFoundError, BackendError
store = AdapterStore(sys.argv[1])
try:
    store.resolve("alice")
except AdapterNotFoundError:
    pass
child = os.fork()
if child == 0:
    try:
        AdapterStore(sys.argv[1]).resolve("alice")
    except BackendError as error:
        os._exit(7 if "forked" in str(error) else 8)
    os._exit(9)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_python(code, s3_url).returncode == 7


def test_a_store_opened_in_the_child_only_works_there(s3_url):
    code = """
import os, sys
from adapter_store import AdapterStore
store = AdapterStore(sys.argv[1])
child = os.fork()
if child == 0:
    os._exit(0 if store.versions("alice") == [] else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_python(code, s3_url).returncode == 0


def test_a_second_process_reads_what_was_published(s3_url, files):
    version = AdapterStore(s3_url).publish("alice", files(1), base=BASE)
    code = """
import sys
from adapter_store import AdapterStore
print(AdapterStore(sys.argv[1]).active("alice"))
"""
    assert run_python(code, s3_url).stdout.strip() == version.version


def test_options_and_credentials_may_stand_in_the_environment(
    s3_url, s3_server, monkeypatch, files
):
    version = AdapterStore(s3_url).publish("alice", files(1), base=BASE)
    bucket = s3_url.partition("@")[2].partition("/")[0]
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "s3cr3t",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    assert AdapterStore(f"s3://{bucket}/some/prefix").resolve("alice") == version
    with pytest.raises(AdapterNotFoundError):
        AdapterStore(f"s3://{bucket}/some/prefi").resolve("alice")


def test_a_remote_version_is_fetched_into_a_folder_of_this_process(s3_url, files):
    store = AdapterStore(s3_url)
    folder = store.fetch_dir(store.publish("alice", files(1), base=BASE))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files(1)
    store.erase_user("alice")
    assert not folder.exists()
    assert os.sep + "adapter-store-" in str(folder)
    assert Path(folder).parent.exists()
