import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

AsNobody = Callable[..., contextlib.AbstractContextManager[Path]]


def test_a_sound_installation_passes(cope_lc: Callable, store_folder: Path) -> None:
    outcome = cope_lc("doctor")
    assert outcome.code == 0, outcome
    assert "all that is needed works" in outcome.stdout
    assert outcome.stderr == ""
    assert not store_folder.exists()
    facts = cope_lc("doctor", "--json").json
    found = {finding["what"]: finding for finding in facts["findings"]}
    assert facts["ok"] is True
    assert {"python", "langchain-cope", "torch", "trl"} <= found.keys()
    assert {"cpu", "smollm2", "starter", "store", "disk"} <= found.keys()
    assert str(store_folder) in found["store"]["found"]
    assert "COPE_STORE" in found["store"]["found"]


FACTS = {
    "Features\t: fp asimd bf16 i8mm": "bfloat16 in hardware (bf16)",
    "flags\t: fpu avx512_bf16 amx_bf16": "bfloat16 in hardware (amx_bf16, avx512_bf16)",
    "flags\t: fpu avx2": "no bfloat16 in hardware",
}


@pytest.mark.parametrize("facts", FACTS)
def test_bfloat16_is_found_on_every_kind_of_cpu(
    facts: str, cope_lc: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name\t: a CPU\n{facts}\n")
    monkeypatch.setattr("cope_lc.doctor._CPU_FACTS", tmp_path / "cpuinfo")
    findings = cope_lc("doctor", "--json").json["findings"]
    assert FACTS[facts] in next(each["found"] for each in findings if each["what"] == "cpu")


def test_the_users_of_the_store_are_counted(cope_lc: Callable, publish: Callable) -> None:
    publish("alice")
    publish("bob")
    assert ", 2 users" in cope_lc("doctor").stdout


def test_a_store_that_cannot_be_written_is_a_finding(
    cope_lc: Callable, read_only: AsNobody
) -> None:
    with read_only() as folder:
        outcome = cope_lc("doctor", "--store", folder)
    assert outcome.code == 1
    assert "Permission denied" in outcome.stdout
    assert "1 thing to fix, see ✗" in outcome.stdout


def test_a_cache_that_cannot_be_written_is_a_finding(
    cope_lc: Callable, store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("COPE_STORE_CACHE", str(tmp_path / "file" / "cache"))
    outcome = cope_lc("doctor")
    assert outcome.code == 1
    assert "cache writable" in outcome.stdout
    assert "choose another cache with COPE_STORE_CACHE" in " ".join(outcome.stdout.split())


def test_a_damaged_store_is_a_finding(
    cope_lc: Callable, publish: Callable, store_folder: Path
) -> None:
    publish()
    (store_folder / "adapter_store.json").write_text("{}")
    outcome = cope_lc("doctor", "--json")
    assert outcome.code == 1
    broken = [finding for finding in outcome.json["findings"] if not finding["ok"]]
    assert [finding["what"] for finding in broken] == ["store"]
    assert "adapter_store.json" in broken[0]["advice"]
