"""Forgetting a person: all of it, nothing of others, and a receipt that is true."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chromadb
import pytest
from chromadb.config import Settings
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.chat_history import BaseChatMessageHistory
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from personal import QUICK, ROWS

from adapter_store import AdapterStore, UserErasedError
from langchain_cope import (
    ChatCoPe,
    ChromaHistory,
    PersonalizeUser,
    RecordedChatHistory,
    forget,
)
from langchain_cope.engine import Engine, load_base
from langchain_cope.errors import InputError
from langchain_cope.personalization.job_folder import resumable_job

USERS = ("alice", "bob")


class Chat(BaseChatMessageHistory):
    """A chat history of LangChain's kind."""

    def __init__(self) -> None:
        self.kept: list[BaseMessage] = []

    @property
    def messages(self) -> list[BaseMessage]:  # type: ignore[override]
        return self.kept

    def add_messages(self, messages: Any) -> None:
        self.kept.extend(messages)

    def clear(self) -> None:
        self.kept = []


@pytest.fixture(scope="module")
def base(tiny: Callable[..., Path]) -> Path:
    return tiny("llama")


@pytest.fixture
def store(base: Path, adapter: Callable[..., Path], tmp_path: Path) -> AdapterStore:
    """Has two versions of each user."""
    store = AdapterStore(tmp_path / "store")
    for user in USERS:
        for seed in (1, 2):
            store.publish(user, adapter(base, seed=seed), base=load_base(base).fingerprint())
    return store


@pytest.fixture
def history(tmp_path: Path) -> ChromaHistory:
    history = ChromaHistory(tmp_path / "chroma")
    for user in USERS:
        history.add(user, [{"prompt": f"q{n}", "completion": f"{user} {n}"} for n in range(3)])
    return history


def unfinished(jobs: Path, user: str) -> None:
    def killed() -> None:
        with resumable_job(jobs, user, "digest") as job:
            (job.folder / "negatives.json").write_text("what the user wrote")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        killed()


def test_forgetting_removes_a_user_everywhere_and_nobody_else(
    store: AdapterStore, history: ChromaHistory, tmp_path: Path
) -> None:
    jobs = tmp_path / "jobs"
    for user in USERS:
        unfinished(jobs, user)
    chats = {
        user: RecordedChatHistory(Chat(), history, user_id=user, session_id="1") for user in USERS
    }
    for chat in chats.values():
        chat.add_messages([HumanMessage("said"), AIMessage("answered")])
    receipt = forget("alice", store=store, history=[history, chats["alice"]], jobs=jobs)
    assert receipt.is_complete, receipt
    assert (store.versions("alice"), len(store.versions("bob"))) == ([], 2)
    assert (history.count("alice"), history.count("bob")) == (0, 4)
    assert (chats["alice"].messages, len(chats["bob"].messages)) == ([], 2)
    assert len(list(jobs.iterdir())) == 1
    assert len(list((tmp_path / "store").rglob("*.safetensors"))) == 2  # bob's
    removed = "\n".join(receipt.removed)
    for fact in (
        "2 versions",
        "4 items from ChromaHistory(",
        "chat: the messages of the chat '1'",
        "no items of the user 'alice'",
        "an unfinished",
    ):
        assert fact in removed
    printed = str(receipt)
    assert printed.startswith("forgetting 'alice', ")
    assert all(part in printed for part in ("removed:\n", "not reached:\n", "traces", "backups"))


def test_forgetting_again_or_a_stranger_does_no_harm(
    store: AdapterStore, history: ChromaHistory, tmp_path: Path
) -> None:
    for user, number in (("alice", 2), ("alice", 0), ("../eve", 0)):
        receipt = forget(user, store=store, history=history, jobs=tmp_path / "no jobs")
        assert receipt.is_complete, receipt
        assert receipt.removed[0].startswith(f"adapters: {number} version")
        assert "job folder: none in " in receipt.removed[2]
    assert not (tmp_path / "no jobs").exists()
    empty = forget("alice", store=tmp_path / "nowhere")
    assert empty.is_complete
    assert empty.removed[0].startswith("adapters: none, as no store is at ")
    assert {"the history: none was given", "other adapter stores"} <= set(empty.not_reached)
    assert not (tmp_path / "nowhere").exists()


def test_a_part_that_fails_is_told_and_hides_no_other(
    store: AdapterStore, history: ChromaHistory, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    jobs = tmp_path / "jobs"
    unfinished(jobs, "alice")
    broken = ChromaHistory(tmp_path / "file")
    receipt = forget("alice", store=store, history=[broken, history], jobs=[jobs])
    assert not receipt.is_complete
    (failure,) = receipt.failed
    assert failure.startswith("history: Chroma at ")
    assert "failed:\n  - history: Chroma at " in str(receipt)
    assert (store.versions("alice"), history.count("alice"), [*jobs.iterdir()]) == ([], 0, [])
    client = chromadb.PersistentClient(
        str(tmp_path / "others"), settings=Settings(anonymized_telemetry=False)
    )
    others = client.create_collection("cope-history", metadata={"made_by": "others"})
    others.add(ids=["1"], documents=["x"], metadatas=[{"user_id": "bob"}], embeddings=[[1.0]])
    unreadable = AdapterStore(tmp_path / "file")
    receipt = forget("bob", store=unreadable, history=[ChromaHistory(client), history])
    assert [failure.partition(":")[0] for failure in receipt.failed] == ["adapters", "history"]
    assert history.count("bob") == 0


def test_a_wrong_call_removes_nothing(store: AdapterStore, history: ChromaHistory) -> None:
    bobs = RecordedChatHistory(Chat(), history, user_id="bob", session_id="1")
    for user, wrong, message in [
        ("", history, "the user id is empty"),
        ("alice", "chroma", "expected a ChromaHistory or a RecordedChatHistory"),
        ("alice", [history, bobs], "the recorded chat is of the user 'bob', not of 'alice'"),
    ]:
        with pytest.raises(InputError, match=message):
            forget(user, store=store, history=wrong)
    assert len(store.versions("alice")) == 2
    assert history.count("alice") == 3


def test_a_running_engine_keeps_nothing_of_the_user(base: Path, store: AdapterStore) -> None:
    chat = ChatCoPe(model=str(base), store=store, user_id="alice", max_tokens=4)
    question = "What does the fox do all day? " * 8
    assert chat.invoke(question).response_metadata["adapter_version"] is not None
    engine = Engine.of(load_base(base))
    assert engine._batch.prefixes.num_bytes > 0
    assert len(engine._slots._slots) == 1
    receipt = forget("alice", store=store)
    assert receipt.is_complete, receipt
    assert engine._batch.prefixes.num_bytes == 0
    assert len(engine._slots._slots) == 0
    assert chat.invoke(question).response_metadata["adapter_version"] is None


class ForgetAt(BaseCallbackHandler):
    """Forgets alice as a stage of her training begins."""

    run_inline = True

    def __init__(self, stage: str, **places: Any) -> None:
        self.at, self.places = stage, places
        self.receipt: Any = None

    def on_chain_start(self, *_: object, name: str = "", **__: object) -> None:
        if name == self.at:
            self.receipt = forget("alice", **self.places)


def test_a_training_under_way_publishes_nothing_and_leaves_nothing(
    base: Path, store: AdapterStore, tmp_path: Path
) -> None:
    jobs = tmp_path / "jobs"
    learner = PersonalizeUser(
        model=str(base), store=store, recipe=QUICK, gate="always", job_dir=jobs
    )
    handler = ForgetAt("dpo", store=store, jobs=jobs)
    with pytest.raises(UserErasedError):
        learner.invoke({"user_id": "alice", "history": ROWS}, {"callbacks": [handler]})
    (failure,) = handler.receipt.failed
    assert "another process works on" in failure
    assert store.active("alice") is None
    assert list(jobs.iterdir()) == []
    assert forget("alice", store=store, jobs=jobs).is_complete


def test_forgetting_loads_no_model() -> None:
    code = (
        "import sys; from langchain_cope import forget; "
        "forget('alice', store='memory://x'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
