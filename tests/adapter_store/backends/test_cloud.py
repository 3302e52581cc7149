"""What object storage adds: servers that cannot do it or are not there, forks, and secrets."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from forgetful_s3 import forgetful_s3

from adapter_store import AdapterNotFoundError, AdapterStore, BackendError, LocalBackend
from adapter_store.backends.cloud import ObjectBackend
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


ENDPOINTS = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"]
OPTIONS = ["endpoint", "endpoint_url", "aws_endpoint", "aws_endpoint_url", "aws_endpoint_url_s3"]


@pytest.fixture
def without_aws(monkeypatch, tmp_path):
    """Neither variables nor files of AWS."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize("name", ENDPOINTS)
def test_an_endpoint_in_plain_http_may_stand_in_the_environment(
    s3_url, s3_server, monkeypatch, without_aws, name
):
    bucket = s3_url.partition("@")[2].partition("/")[0]
    for weaker in ENDPOINTS[ENDPOINTS.index(name) + 1 :]:
        monkeypatch.setenv(weaker, "http://127.0.0.1:9")
    monkeypatch.setenv(name, s3_server)
    assert AdapterStore(f"s3://key:s3cr3t@{bucket}/x").versions("alice") == []


@pytest.mark.parametrize("option", OPTIONS)
def test_an_endpoint_in_plain_http_may_be_an_option_of_the_url(
    s3_url, s3_server, monkeypatch, without_aws, option
):
    bucket = s3_url.partition("@")[2].partition("/")[0]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    assert AdapterStore(f"s3://k:s@{bucket}/x?{option}={s3_server}").versions("alice") == []


def test_threads_that_open_at_once_all_find_the_endpoint(monkeypatch, without_aws):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")

    def endpoint(_):
        return ObjectBackend.from_url("s3://bucket/x")._store.config.get("endpoint")

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(endpoint, range(16))) == {"http://127.0.0.1:9"}
    assert os.environ["AWS_ENDPOINT_URL_S3"] == "http://127.0.0.1:9"


PROFILES = """[default]
aws_access_key_id = of-default
aws_secret_access_key = s3cr3t%/=

[work]
aws_access_key_id = of-work
aws_secret_access_key = s3cr3t
aws_session_token = t0ken
"""
CONFIG = """[default]
region = eu-west-1
[profile work]
region = eu-central-1
endpoint_url = http://127.0.0.1:9
[profile sso]
sso_start_url = https://ours.example
"""


@pytest.fixture
def profiles(without_aws, monkeypatch, tmp_path):
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(PROFILES)
    (tmp_path / ".aws/config").write_text(CONFIG)
    return tmp_path / ".aws"


def config_of(url="s3://bucket/x"):
    backend = open_backend(url)
    return {key: value for key, value in backend._store.config.items() if key != "bucket"}


@pytest.mark.parametrize(
    ("environment", "url", "config"),
    [
        ({}, "s3://b/x", ("of-default", "s3cr3t%/=", None, "eu-west-1", None)),
        (
            {"AWS_PROFILE": "work"},
            "s3://b/x",
            ("of-work", "s3cr3t", "t0ken", "eu-central-1", "http://127.0.0.1:9"),
        ),
        (
            {"AWS_PROFILE": "work"},
            "s3://k:s@b/x?region=r&endpoint=http://h",
            ("k", "s", None, "r", "http://h"),
        ),
        (  # the environment's own are obstore's to read: nothing is added beside them
            {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "r"},
            "s3://b/x",
            (None, None, None, None, None),
        ),
        ({"AWS_WEB_IDENTITY_TOKEN_FILE": "/t"}, "s3://b/x", (None, None, None, "eu-west-1", None)),
        ({"AWS_PROFILE": "sso"}, "s3://k:s@b/x", ("k", "s", None, None, None)),
    ],
)
def test_credentials_come_from_the_profile_unless_given_nearer(
    profiles, monkeypatch, environment, url, config
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = config_of(url)
    names = ("access_key_id", "secret_access_key", "session_token", "region", "endpoint")
    assert tuple(found.get(name) or found.get(f"aws_{name}") for name in names) == config


def test_a_store_works_with_a_profile_alone(s3_url, s3_server, monkeypatch, without_aws, tmp_path):
    bucket = s3_url.partition("@")[2].partition("/")[0]
    file = tmp_path / "elsewhere"
    file.write_text(
        f"[work]\naws_access_key_id=k\naws_secret_access_key=s\nendpoint_url={s3_server}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert AdapterStore(f"s3://{bucket}/x").versions("alice") == []


@pytest.mark.parametrize(
    ("profile", "file", "said"),
    [
        ("gone", PROFILES, "AWS_PROFILE names 'gone', which is not in .*credentials and .*config"),
        ("sso", PROFILES, "'sso' has sso_start_url instead of keys.*export-credentials"),
        ("work", "s3cr3t without a section", r"cannot read AWS's file .*MissingSection"),
        ("work", "[work]\ns3cr3t", r"cannot read AWS's file .*ParsingError"),
    ],
)
def test_a_profile_that_cannot_be_used_is_refused_by_name(
    profiles, monkeypatch, profile, file, said
):
    (profiles / "credentials").write_text(file)
    monkeypatch.setenv("AWS_PROFILE", profile)
    with pytest.raises(BackendError, match=said) as caught:
        AdapterStore("s3://bucket/x")
    assert "s3cr3t" not in str(caught.value)


def test_a_remote_version_is_fetched_into_a_folder_of_this_process(s3_url, files):
    store = AdapterStore(s3_url)
    folder = store.fetch_dir(store.publish("alice", files(1), base=BASE))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files(1)
    store.erase_user("alice")
    assert not folder.exists()
    assert os.sep + "adapter-store-" in str(folder)
    assert Path(folder).parent.exists()
