from collections.abc import Callable
from pathlib import Path

import chromadb
import pytest
from chromadb.config import Settings

from adapter_store import AdapterStore
from langchain_cope import ChromaHistory


@pytest.fixture
def chroma(tmp_path: Path) -> Path:
    folder = tmp_path / "chroma"
    rows = [{"prompt": "q", "completion": f"a{number}"} for number in range(3)]
    ChromaHistory(folder).add("alice", rows)
    return folder


def test_forget_asks_removes_all_and_prints_a_receipt(
    cope_lc: Callable, publish: Callable, store: AdapterStore, chroma: Path, tmp_path: Path
) -> None:
    publish("alice")
    publish("bob")
    (tmp_path / "jobs").mkdir()
    words = ["forget", "alice", "--history", chroma, "--job-dir", tmp_path / "jobs"]
    refused = cope_lc(*words, stdin="y\n")
    assert (refused.code, ChromaHistory(chroma).count("alice")) == (2, 3)
    assert "forgetting asks first" in refused.error
    outcome = cope_lc(*words, "--yes")
    assert outcome.code == 0, outcome.stderr
    assert "adapters: 1 version, " in outcome.stdout
    assert "history: 3 items from " in outcome.stdout
    assert "not reached:" in outcome.stdout
    assert (store.active("alice"), ChromaHistory(chroma).count("alice")) == (None, 0)
    assert store.active("bob") is not None
    facts = cope_lc(*words, "--yes", "--json").json
    assert (facts["complete"], facts["user_id"], facts["failed"]) == (True, "alice", [])


def test_a_part_that_fails_ends_with_exit_code_1(
    cope_lc: Callable, publish: Callable, store: AdapterStore, tmp_path: Path
) -> None:
    publish("alice")
    client = chromadb.PersistentClient(
        str(tmp_path / "others"), settings=Settings(anonymized_telemetry=False)
    )
    documents = client.create_collection("documents")
    documents.add(ids=["1"], documents=["x"], metadatas=[{"user_id": "alice"}], embeddings=[[1.0]])
    words = ["--history", tmp_path / "others", "--yes", "--json"]
    mistyped = cope_lc("forget", "alice", "--collection", "docs", *words).json
    assert "no collection 'docs'" in mistyped["removed"][1]
    outcome = cope_lc("forget", "alice", "--collection", "documents", *words)
    assert outcome.code == 1
    assert outcome.json["complete"] is False
    assert "was made by others and is not deleted from" in outcome.json["failed"][0]
    assert store.active("alice") is None


@pytest.mark.parametrize("option", ["--store", "--history", "--job-dir"])
def test_a_mistyped_place_is_refused_before_anything_is_removed(
    option: str, cope_lc: Callable, publish: Callable, store: AdapterStore, tmp_path: Path
) -> None:
    publish("alice")
    outcome = cope_lc("forget", "alice", option, tmp_path / "mistyped", "--yes")
    assert outcome.code == 2
    assert "mistyped" in outcome.error
    assert "nothing was done" in outcome.error
    assert not (tmp_path / "mistyped").exists()
    assert store.active("alice") is not None
