"""ChromaHistory on a real embedded Chroma and a real server, without reaching another machine."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import chromadb
import pytest
from chromadb.config import Settings
from chromadb.utils.embedding_functions import DefaultEmbeddingFunction
from langchain_core.messages import AIMessage, HumanMessage

from langchain_cope.errors import HistoryError, HistoryUnreachable
from langchain_cope.history import Item, as_history
from langchain_cope.history.chroma import ChromaHistory
from langchain_cope.history.reader import TEXT_INSTRUCTION

HOSTILE = ["$ne", '{"$ne": ""}', "🙂", "user-1", "user-10", "../x", "a\0b", " ", "x" * 10_000]
LOOPBACK = ("127.0.0.1", "::1", "localhost")
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test on an embedding by Chroma's default model or a connection elsewhere."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        is_local = self.family == socket.AF_UNIX or address[0] in LOOPBACK
        assert is_local, address
        connect(self, address)

    def embed(self: object, input: object) -> None:
        raise AssertionError("Chroma's default embedding function was called")

    monkeypatch.setattr(socket.socket, "connect", connect_here)
    monkeypatch.setattr(DefaultEmbeddingFunction, "__call__", embed)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Chroma server of our own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    chroma = Path(sys.executable).with_name("chroma")
    address = ["--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [chroma, "run", "--path", folder, *address],
            stdout=log,
            stderr=log,
            env={**os.environ, "ANONYMIZED_TELEMETRY": "False"},
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_for(f"{url}/api/v2/heartbeat", process, folder / "log")
            yield url
        finally:
            process.terminate()
            process.wait(timeout=20)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(
        f"the Chroma server did not start: {log.read_text(errors='replace')[-2000:]}"
    )


@pytest.fixture(params=["folder", "server", "memory", "client"])
def history(request: pytest.FixtureRequest, tmp_path: Path) -> ChromaHistory:
    """An empty history on each kind of Chroma."""
    collection = f"history-{tmp_path.name}"[:60]
    sources: dict[str, Callable[[], Any]] = {
        "folder": lambda: tmp_path / "chroma",
        "server": lambda: request.getfixturevalue("server"),
        "memory": lambda: None,
        "client": lambda: embedded(tmp_path / "chroma"),
    }
    return ChromaHistory(sources[request.param](), collection)


def embedded(folder: Path) -> Any:
    return chromadb.PersistentClient(str(folder), settings=Settings(anonymized_telemetry=False))


def item(number: int, **more: Any) -> Item:
    return Item(prompt=f"question {number}", completion=f"answer {number}", **more)


def vectors(texts: list[str]) -> list[list[float]]:
    return [[float(len(text)), 1.0] for text in texts]


def test_items_come_back_as_they_were_added_and_in_order(history: ChromaHistory) -> None:
    items = [
        item(2, conversation="c1"),
        Item(prompt=CHAT, completion="hi 🙂"),
        item(1, created_at=datetime(2024, 5, 31, 8, tzinfo=UTC)),
    ]
    history.add("ann", items[:2])
    history.add("ann", items[2:])
    assert history.fetch("ann") == items


def test_dated_items_come_back_oldest_first(history: ChromaHistory) -> None:
    history.add(
        "ann",
        [item(year, created_at=datetime(year, 1, 1, tzinfo=UTC)) for year in (2022, 2020, 2021)],
    )
    assert [item.prompt for item in history.fetch("ann")] == [
        "question 2020",
        "question 2021",
        "question 2022",
    ]


def test_an_item_added_again_is_kept_once_and_where_it_was(history: ChromaHistory) -> None:
    history.add("ann", [item(1), item(2), item(1)])
    history.add("ann", [item(3), item(1)])
    assert history.fetch("ann") == [item(1), item(2), item(3)]
    assert history.count("ann") == 3


def test_users_never_see_or_delete_each_other(history: ChromaHistory) -> None:
    for number, user_id in enumerate(HOSTILE):
        history.add(user_id, [item(number), item(99)])
    for number, user_id in enumerate(HOSTILE):
        assert history.fetch(user_id) == [item(number), item(99)]
    assert history.delete_user("$ne") == 2
    assert history.fetch("$ne") == []
    assert [history.count(user_id) for user_id in HOSTILE[1:]] == [2] * (len(HOSTILE) - 1)


def test_a_user_without_items_is_empty(history: ChromaHistory) -> None:
    assert (history.fetch("ann"), history.count("ann"), history.delete_user("ann")) == ([], 0, 0)
    history.add("bob", [item(1)])
    assert (history.fetch("ann"), history.count("ann"), history.delete_user("ann")) == ([], 0, 0)


@pytest.mark.parametrize("user_id", ["", None, "\ud800"])
def test_an_unusable_user_id_is_refused(history: ChromaHistory, user_id: Any) -> None:
    for call in (
        history.fetch,
        history.count,
        history.delete_user,
        lambda user: history.add(user, [item(1)]),
    ):
        with pytest.raises(HistoryError, match="the user id"):
            call(user_id)


def test_more_than_a_page_is_added_fetched_counted_and_deleted(server: str) -> None:
    history = ChromaHistory(server, "many-pages")
    items = [item(number) for number in range(2_345)]
    history.add("ann", items)
    history.add("bob", items[:1_000])  # exactly one page
    assert history.fetch("ann") == items
    assert (history.count("ann"), history.count("bob")) == (2_345, 1_000)
    assert history.delete_user("ann") == 2_345
    assert (history.count("ann"), history.count("bob")) == (0, 1_000)


def test_rows_are_added_like_items_and_a_bad_one_adds_nothing(tmp_path: Path) -> None:
    history = ChromaHistory(tmp_path)
    rows = [
        {"prompt": "p", "completion": "c"},
        {"messages": [*CHAT, {"role": "assistant", "content": "hi"}]},
    ]
    history.add("ann", rows)
    assert history.fetch("ann") == as_history(rows).items
    for bad in (
        {"prompt": "p", "completion": " "},
        {"prompt": "p", "completion": "c", "user_id": "bob"},
    ):
        with pytest.raises(HistoryError, match=r"history\[1\]"):
            history.add("ann", [item(7), bad])
    assert history.count("ann") == 2


def test_a_folder_is_read_again_by_another_history(tmp_path: Path) -> None:
    ChromaHistory(tmp_path / "new" / "chroma").add("ann", [item(1)])
    assert ChromaHistory(str(tmp_path / "new" / "chroma")).fetch("ann") == [item(1)]


def test_a_folder_that_is_open_already_is_given_as_its_client(tmp_path: Path) -> None:
    client = chromadb.PersistentClient(
        str(tmp_path), settings=Settings(anonymized_telemetry=False, allow_reset=True)
    )  # other settings than ours, as LangChain's are
    with pytest.raises(HistoryError, match=r"already exists .* with different settings"):
        ChromaHistory(tmp_path).add("ann", [item(1)])
    history = ChromaHistory(client)
    history.add("ann", [item(1)])
    assert history.fetch("ann") == [item(1)]


def test_our_collections_hold_one_constant_vector_and_no_embedding_function(tmp_path: Path) -> None:
    ChromaHistory(tmp_path).add("ann", [item(1), item(2)])
    collection = embedded(tmp_path).get_collection("cope-history", embedding_function=None)
    assert collection.get(include=["embeddings"])["embeddings"].tolist() == [[0.0], [0.0]]
    assert collection.configuration["embedding_function"] is None


def test_records_have_the_ids_and_metadata_of_earlier_releases(tmp_path: Path) -> None:
    day = datetime(2024, 1, 1, tzinfo=UTC)
    history = ChromaHistory(tmp_path)
    history.add("alice", [Item(prompt="q1", completion="a1", created_at=day, conversation="c1")])
    history.add("alice", [{"prompt": CHAT, "chosen": "better", "rejected": "worse"}])
    history.add("alice", [{"prompt": "q", "answer": "bad", "score": 0}])
    collection = embedded(tmp_path).get_collection("cope-history", embedding_function=None)
    assert collection.metadata == {"made_by": "langchain-cope history"}
    records = collection.get(include=["documents", "metadatas"])
    for metadata in records["metadatas"]:
        assert metadata.pop("added") > 1.7e18
    assert dict(zip(records["ids"], records["metadatas"], strict=True)) == {
        "7c4ed45c0a87cb7a1f3d354f4681596ae7d73bc99b06d0f4827c22c51009a5e1": {
            "user_id": "alice",
            "prompt": "q1",
            "prompt_is_messages": False,
            "created_at": "2024-01-01T00:00:00+00:00",
            "conversation": "c1",
        },
        "da8e79740235ca51a53e8b8a6a8d12a703c05ba8e44e0804611fbe4cb870530b": {
            "user_id": "alice",
            "prompt": json.dumps(CHAT),
            "prompt_is_messages": True,
            "cope_rejected": '["worse"]',
        },
        "02e9be88ea6f28f016fc0af5c885452523a74cc12f309e5478e9fb24747d9b18": {
            "user_id": "alice",
            "prompt": "q",
            "prompt_is_messages": False,
            "cope_disliked": True,
        },
    }


def test_history_tells_what_was_decided(tmp_path: Path) -> None:
    history = ChromaHistory(tmp_path)
    history.add("ann", [item(1), item(2)])
    read = history.history("ann")
    assert (read.user_id, read.items, read.instruction) == ("ann", [item(1), item(2)], None)
    assert read.notes == ["the items have no created_at: their order is taken as oldest first"]


@pytest.fixture
def foreign(tmp_path: Path) -> ChromaHistory:
    """A collection as others make them: real vectors and metadata of their own."""
    collection = embedded(tmp_path).create_collection("documents", metadata={"made_by": "others"})
    metadatas: list[dict[str, Any]] = [
        {"owner": "ann", "question": "what?", "when": 1717142400, "source": "web"},
        {"owner": "ann", "when": "2020-01-01"},
        {"owner": "bob", "question": "who?", "when": "2021-01-01"},
        {"owner": "ann", "question": "blank", "when": "2019-01-01"},
    ]
    texts = ["newest", "oldest", "bob's", " "]
    collection.add(
        ids=list("abcd"), documents=texts, metadatas=metadatas, embeddings=vectors(texts)
    )
    keys = {"user_key": "owner", "prompt_key": "question", "created_at_key": "when"}
    return ChromaHistory(tmp_path, "documents", **keys)  # type: ignore[arg-type]


def test_a_collection_made_by_others_is_read_by_its_own_keys(foreign: ChromaHistory) -> None:
    read = foreign.history("ann")
    assert [(item.prompt, item.completion) for item in read.items] == [
        (TEXT_INSTRUCTION, "oldest"),
        ("what?", "newest"),
    ]
    assert read.instruction == TEXT_INSTRUCTION
    assert foreign.fetch("ann") == read.items


def test_a_collection_made_by_others_is_not_written_without_an_embedding_function(
    foreign: ChromaHistory,
) -> None:
    with pytest.raises(
        HistoryError, match=r"'documents' in Chroma at .* was made by others and is not written"
    ):
        foreign.add("ann", [item(1)])
    with pytest.raises(HistoryError, match="made by others and is not deleted from"):
        foreign.delete_user("ann")
    assert foreign.count("ann") == 3


def test_a_collection_made_by_others_is_written_with_an_embedding_function(
    foreign: ChromaHistory, tmp_path: Path
) -> None:
    foreign.embedding_function = vectors
    foreign.add("ann", [item(1, created_at=datetime(2025, 1, 1, tzinfo=UTC))])
    assert foreign.fetch("ann")[-1].completion == "answer 1"
    stored = embedded(tmp_path).get_collection("documents", embedding_function=None)
    records = stored.get(where={"question": "question 1"}, include=["embeddings", "metadatas"])
    assert records["embeddings"].tolist() == vectors(["answer 1"])
    assert records["metadatas"][0]["when"] == "2025-01-01T00:00:00+00:00"
    assert foreign.delete_user("ann") == 4
    assert foreign.count("bob") == 1


def test_an_unreadable_time_that_others_wrote_is_named(tmp_path: Path) -> None:
    collection = embedded(tmp_path).create_collection("documents")
    metadata = {"user_id": "ann", "created_at": "last week"}
    collection.add(ids=["x1"], documents=["text"], metadatas=[metadata], embeddings=[[1.0]])
    with pytest.raises(HistoryError, match="Chroma documents x1: the time is 'last week'"):
        ChromaHistory(tmp_path, "documents").fetch("ann")


def test_a_missing_collection_is_empty_and_the_existing_ones_are_named(
    foreign: ChromaHistory, tmp_path: Path
) -> None:
    history = ChromaHistory(tmp_path, "documnets")
    assert (history.fetch("ann"), history.count("ann")) == ([], 0)
    (note,) = history.history("ann").notes
    assert note == f"no collection 'documnets' in Chroma at {tmp_path}; there are: documents"
    assert (
        foreign.history("eve").notes[0].startswith("no items of the user 'eve' in ChromaHistory(")
    )


def test_a_silent_server_is_named_without_the_secrets_in_its_url() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://ann:secret@127.0.0.1:{closed.getsockname()[1]}"
        history = ChromaHistory(url)
        with pytest.raises(
            HistoryUnreachable, match=r"Chroma at http://127\.0\.0\.1:\d+: Could not connect"
        ) as caught:
            history.fetch("ann")
    assert "secret" not in f"{caught.value} {history!r}"


def test_a_path_to_a_file_and_a_bad_collection_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(HistoryError, match=r"Chroma at .*file: "):
        ChromaHistory(tmp_path / "file").count("ann")
    with pytest.raises(HistoryError, match="Expected a name containing 3-512 characters"):
        ChromaHistory(tmp_path / "new", "a b").add("ann", [item(1)])


def test_the_module_is_imported_without_chromadb() -> None:
    code = (
        "import sys, langchain_cope.history.chroma; "
        "sys.exit(any(name in sys.modules for name in ('chromadb', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_many_threads_that_connect_at_once_lose_nothing(
    history: ChromaHistory,
) -> None:
    with ThreadPoolExecutor(16) as threads:
        list(
            threads.map(lambda number: history.add(f"user {number % 4}", [item(number)]), range(32))
        )
    for user in range(4):
        prompts = {item.prompt for item in history.fetch(f"user {user}")}
        assert prompts == {f"question {number}" for number in range(user, 32, 4)}


def test_pairs_come_back_with_what_was_rejected(history: ChromaHistory) -> None:
    rows = [{"prompt": CHAT, "chosen": "better", "rejected": text} for text in ("worse", "worst")]
    history.add("ann", [*rows, {"prompt": "q", "completion": "a"}])
    history.add("ann", rows[:1])
    read = history.history("ann")
    assert read.items == [
        Item(prompt=CHAT, completion="better", rejected=("worse", "worst")),
        Item(prompt="q", completion="a"),
    ]
    assert read.num_pairs == 2


def test_a_later_rejected_answer_is_added_to_the_item(history: ChromaHistory) -> None:
    history.add("ann", [{"prompt": "q", "completion": "a"}])
    history.add("ann", [{"prompt": "q", "answer": "b", "correction": "a"}])
    assert history.history("ann").items == [Item(prompt="q", completion="a", rejected=("b",))]


def test_a_disliked_answer_waits_for_a_liked_one(history: ChromaHistory) -> None:
    history.add("ann", [{"prompt": CHAT, "answer": "bad", "score": 0}])
    assert (history.fetch("ann"), history.count("ann")) == ([], 1)
    history.add("ann", [{"prompt": CHAT, "answer": "good", "score": 1}])
    history.add("bob", [{"prompt": CHAT, "answer": "bad", "score": 1}])
    assert history.fetch("ann") == [Item(prompt=CHAT, completion="good", rejected=("bad",))]
    assert history.fetch("bob") == [Item(prompt=CHAT, completion="bad")]
    assert history.delete_user("ann") == 2
    assert history.count("ann") == 0


def test_the_last_word_on_an_answer_counts_however_often_it_changes(history: ChromaHistory) -> None:
    for score, expected in [(1, ["a"]), (0, []), (1, ["a"]), (1, ["a"]), (0, []), (0, [])]:
        history.add("ann", [{"prompt": "q", "answer": "a", "score": score}])
        assert [item.completion for item in history.fetch("ann")] == expected
        assert history.count("ann") == 1


def test_disliked_answers_without_a_liked_one_are_noted(
    history: ChromaHistory,
) -> None:
    history.add(
        "ann", [{"prompt": "q", "answer": "bad", "score": 0}, {"prompt": "p", "completion": "c"}]
    )
    assert (
        "disliked answers left out, as no liked one has the same prompt: 1"
        in history.history("ann").notes
    )


def test_langchain_messages_are_added_as_the_users_turns_or_the_assistants(
    history: ChromaHistory,
) -> None:
    messages = [HumanMessage("hello"), AIMessage("hi"), HumanMessage("bye"), AIMessage("see you")]
    history.add("ann", messages)
    assert [item.completion for item in history.fetch("ann")] == ["hello", "bye"]
    history.add("bob", [{"messages": messages}], target="assistant")
    assert [item.completion for item in history.fetch("bob")] == ["hi", "see you"]
    with pytest.raises(HistoryError, match="target is 'me'"):
        history.add("ann", messages, target="me")  # type: ignore[arg-type]


@pytest.fixture
def guarded():
    """A server that asks for ann's password below a path, and what it was asked."""
    asked = []

    class Guarded(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Authorization"]))
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self):
            self.do_GET()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Guarded)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1], asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("userinfo", "credentials"),
    [("ann:p%40ss@", "ann:p@ss"), ("eve:s3cr3t@", "eve:s3cr3t"), ("t0ken@", "t0ken:"), ("", None)],
)
@pytest.mark.parametrize("path", ["", "/", "/team/chroma"])
def test_a_servers_credentials_and_path_are_used(guarded, userinfo, credentials, path):
    port, asked = guarded
    history = ChromaHistory(f"http://{userinfo}127.0.0.1:{port}{path}")
    with pytest.raises(HistoryError) as caught:
        history.fetch("alice")
    said = str(caught.value) + repr(history)
    assert f"http://127.0.0.1:{port}{path.rstrip('/')}" in said
    expected = credentials and f"Basic {b64encode(credentials.encode()).decode()}"
    assert {authorization for _, authorization in asked} == {expected}
    assert all(asked_path.startswith(f"{path.rstrip('/')}/api/v2/") for asked_path, _ in asked)
    for secret in ("p%40ss", "p@ss", "s3cr3t", "t0ken", "Basic"):
        assert secret not in said


@pytest.mark.parametrize("rest", ["?token=s3cr3t", "#s3cr3t", "/path?s3cr3t"])
def test_what_chroma_cannot_use_of_a_url_is_refused_by_name(rest):
    with pytest.raises(HistoryError, match="has a query or a fragment") as caught:
        ChromaHistory(f"http://ann:s3cr3t@127.0.0.1:9{rest}").fetch("alice")
    assert "s3cr3t" not in str(caught.value)
