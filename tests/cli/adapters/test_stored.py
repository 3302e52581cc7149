import re
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from adapter_store import AdapterStore


def test_a_location_that_cannot_be_a_store_is_refused(cope_lc: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for url, code in [(tmp_path / "file", 1), ("ftp://host/x", 1), (tmp_path / "a\nb", 0)]:
        outcome = cope_lc("adapters", "list", "--store", url)
        assert outcome.code == code, url
        if code:
            assert outcome.error.startswith("error: ")


def test_a_mistyped_store_or_user_is_never_reported_as_well(
    cope_lc: Callable, put: Callable, store: AdapterStore, tmp_path: Path
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
        assert "is not a store: nothing was done" in outcome.error
        outcome = cope_lc("adapters", *words, "--store", "")
        assert outcome.code == 2
        assert "it is empty" in outcome.error
    assert not (tmp_path / "nowhere").exists()
    outcome = cope_lc("adapters", "verify", "bob")
    assert outcome.code == 2
    assert "user 'bob' has no adapter" in outcome.error
    erased = cope_lc("adapters", "erase", "bob", "--yes")
    assert erased.stdout == "erased bob; no adapter was there under this id\n"
    assert cope_lc("adapters", "verify", "bob").code == 0  # what is left says that he was erased


def test_a_store_url_never_prints_its_secret(cope_lc: Callable, tmp_path: Path) -> None:
    url = "s3://key:s3cr3t@bucket/prefix?endpoint=http://127.0.0.1:9&region=us-east-1"
    for words in (["list"], ["show", "alice"], ["gc"], ["verify"], ["erase", "alice", "--yes"]):
        outcome = cope_lc("adapters", *words, "--store", url)
        assert outcome.code == 1
        assert "s3cr3t" not in outcome.stdout + outcome.stderr
        assert "s3://***@bucket/prefix" in outcome.error


def test_a_store_in_object_storage_is_as_good_as_a_folder(
    cope_lc: Callable, put: Callable, tmp_path: Path
) -> None:
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
        make_bucket = urllib.request.Request(f"{endpoint}/bucket", method="PUT")
        urllib.request.urlopen(make_bucket, timeout=30).close()
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
def test_an_unusable_setting_is_named(
    cope_lc: Callable, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    outcome = cope_lc("adapters", "list")
    assert outcome.code == 1
    assert re.search(said, outcome.error)
