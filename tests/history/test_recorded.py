"""RecordedChatHistory: a chat of LangChain's, kept in a real Chroma as what its user wrote."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from langchain_core.chat_history import BaseChatMessageHistory, InMemoryChatMessageHistory
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.runnables.history import RunnableWithMessageHistory

from langchain_cope import ChromaHistory, RecordedChatHistory
from langchain_cope.errors import HistoryError
from langchain_cope.history import as_history
from langchain_cope.history.reader import MESSAGE_INSTRUCTION

# LangChain prefers its checkpointers by now; apps that have chat histories keep them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The class `InMemoryChatMessageHistory`"),
    pytest.mark.filterwarnings("ignore:RunnableWithMessageHistory is deprecated"),
]
TURNS: list[BaseMessage] = [
    HumanMessage("hello"),
    AIMessage("hi"),
    HumanMessage("bye"),
    AIMessage("see you"),
]


@pytest.fixture
def history(tmp_path: Path) -> ChromaHistory:
    return ChromaHistory(tmp_path / "chroma")


def recorded(history: ChromaHistory, **settings: Any) -> RecordedChatHistory:
    settings = {"user_id": "ann", "session_id": "1", **settings}
    return RecordedChatHistory(InMemoryChatMessageHistory(), history, **settings)


def written(history: ChromaHistory, user_id: str = "ann") -> list[str]:
    return [item.completion for item in history.fetch(user_id)]


def test_a_chat_history_also_writes_to_chroma(history: ChromaHistory) -> None:
    chat = recorded(history)
    assert isinstance(chat, BaseChatMessageHistory)
    chat.add_messages(TURNS[:2])
    chat.add_messages(TURNS[2:])
    assert chat.messages == TURNS
    items = history.fetch("ann")
    assert [(item.messages, item.completion) for item in items] == [
        (item.messages, item.completion) for item in as_history(TURNS).items
    ]
    assert {item.conversation for item in items} == {"1"}
    assert all(item.created_at for item in items)
    assert history.history("ann").notes == []


def test_a_turn_is_recorded_once_the_other_side_has_answered(history: ChromaHistory) -> None:
    chat = recorded(history)
    for number, message in enumerate(
        [*TURNS, HumanMessage("still there?"), HumanMessage("hm"), AIMessage("yes")]
    ):
        chat.add_message(message)
        expected = ["hello", "bye", "still there?\n\nhm"]
        assert written(history) == expected[: [0, 1, 1, 2, 2, 2, 3][number]]
    assert history.count("ann") == 3


def test_the_assistants_turns_are_recorded_where_they_are_the_target(
    history: ChromaHistory,
) -> None:
    chat = recorded(history, target="assistant")
    chat.add_messages([SystemMessage("Be kind."), *TURNS])
    assert written(history) == ["hi"]
    chat.add_user_message("bye again")
    assert written(history) == ["hi", "see you"]


def test_tool_calls_images_and_blank_turns_do_no_harm(history: ChromaHistory) -> None:
    chat = recorded(history)
    chat.add_messages(
        [HumanMessage([{"type": "image_url", "image_url": {"url": "x"}}]), AIMessage("a cat")]
    )
    assert written(history) == []
    call = AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "1"}])
    chat.add_messages(
        [HumanMessage("weather?"), call, ToolMessage("18", tool_call_id="1"), AIMessage("mild")]
    )
    assert written(history) == ["weather?"]


def test_an_earlier_chat_is_recorded_at_once_and_only_once(
    history: ChromaHistory,
) -> None:
    kept = InMemoryChatMessageHistory(messages=list(TURNS))
    chat = RecordedChatHistory(kept, history, user_id="ann", session_id="1")
    chat.record()
    before = history.fetch("ann")
    chat.record()
    assert history.fetch("ann") == before
    assert written(history) == ["hello", "bye"]


SUMMARIES: dict[str, BaseMessage] = {
    "system": SystemMessage("Summary: they talked."),
    "human": HumanMessage("Summary: they talked."),
    "ai": AIMessage("Summary: they talked."),
    "marked": HumanMessage("So far", additional_kwargs={"lc_source": "summarization"}),
}


class ShortChat(BaseChatMessageHistory):
    """A chat that shows its newest messages only, perhaps a summary of the others in front."""

    def __init__(self, window: int | None, summary: str | None = None) -> None:
        self.window, self.summary = window, summary
        self.all: list[BaseMessage] = []

    @property
    def messages(self) -> list[BaseMessage]:  # type: ignore[override]
        shown = self.all[-self.window :] if self.window else self.all
        if self.summary is None or len(shown) == len(self.all):
            return list(shown)
        summary = SUMMARIES[self.summary]
        text = f"{summary.content} {len(self.all)} messages."
        return [summary.model_copy(update={"content": text}), *shown]

    def add_messages(self, messages: Sequence[BaseMessage]) -> None:
        self.all.extend(messages)

    def clear(self) -> None:
        self.all = []


def different(turn: int) -> tuple[str, str]:
    return f"text {turn}", f"answer {turn}"


def two_by_two(turn: int) -> tuple[str, str]:
    return ("yes", "ok") if turn % 2 else ("no\n\nnever", "why?")


CHATS = [
    *[(window, None, is_kept) for window in (2, 7, None) for is_kept in (True, False)],
    (3, None, False),
    *[(7, summary, False) for summary in SUMMARIES],
]


@pytest.mark.parametrize(("texts", "step"), [(different, 1), (two_by_two, 1), (two_by_two, 2)])
@pytest.mark.parametrize(("window", "summary", "is_kept"), CHATS)
def test_ten_turns_are_ten_items_with_their_first_times(
    window: int | None,
    summary: str | None,
    is_kept: bool,
    step: int,
    texts: Callable[[int], tuple[str, str]],
) -> None:
    history = ChromaHistory(None, f"chat-{uuid4().hex}")
    chat = ShortChat(window, summary)
    settings: dict[str, Any] = {"user_id": "ann", "session_id": "1"}
    kept = RecordedChatHistory(chat, history, **settings)
    told: list[BaseMessage] = []
    before: list[Any] = []
    for turn in range(10):
        said, answer = texts(turn)
        pair = [HumanMessage(said), AIMessage(answer)]
        told += pair
        for start in range(0, 2, step):
            talk = kept if is_kept else RecordedChatHistory(chat, history, **settings)
            talk.add_messages(pair[start : start + step])
        items = history.fetch("ann")
        assert [(item.completion, item.created_at) for item in items[:-1]] == before
        before = [(item.completion, item.created_at) for item in items]
    assert [item.completion for item in items] == [texts(turn)[0] for turn in range(10)]
    if summary is None and (is_kept or window != 2):
        assert [item.messages for item in items] == [
            item.messages for item in as_history(told).items
        ]


def test_turns_that_could_not_be_written_outlive_the_window(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    chat = RecordedChatHistory(
        ShortChat(2), ChromaHistory(tmp_path / "file"), user_id="ann", session_id="1"
    )
    for turn in range(3):
        with pytest.raises(HistoryError, match="Chroma at"):
            chat.add_messages([HumanMessage(f"text {turn}"), AIMessage("ok")])
    chat.history = ChromaHistory(tmp_path / "chroma")
    chat.add_messages([HumanMessage("text 3"), AIMessage("ok")])
    assert written(chat.history) == ["text 0", "text 1", "text 2", "text 3"]


def test_a_cleared_chat_begins_anew_in_the_same_session(history: ChromaHistory) -> None:
    chat = recorded(history)
    chat.add_messages(TURNS)
    chat.clear()
    chat.add_messages([HumanMessage("bye"), AIMessage("already?")])
    chat.add_messages([HumanMessage("yes"), AIMessage("ok")])
    assert written(history) == ["hello", "bye", "bye", "yes"]
    assert len(history.fetch("ann")[3].messages) == 3


def test_clearing_the_chat_keeps_what_was_recorded(history: ChromaHistory) -> None:
    chat = recorded(history)
    chat.add_messages(TURNS)
    chat.clear()
    assert (chat.messages, written(history)) == ([], ["hello", "bye"])


async def test_it_works_asynchronously_and_users_are_kept_apart(history: ChromaHistory) -> None:
    chats = {user: recorded(history, user_id=user) for user in ("ann", "bob", "$ne")}
    own = {user: [HumanMessage(f"I am {user}"), AIMessage("hi")] for user in chats}
    await asyncio.gather(*[chat.aadd_messages(own[user]) for user, chat in chats.items()])
    for user, chat in chats.items():
        assert await chat.aget_messages() == own[user]
        assert written(history, user) == [f"I am {user}"]
        await chat.aclear()
        assert chat.messages == []


def test_an_app_with_message_history_feeds_the_store_by_use(history: ChromaHistory) -> None:
    model = GenericFakeChatModel(messages=iter(["hi", "see you", "hello bob"]))
    chats: dict[tuple[str, str], RecordedChatHistory] = {}

    def get_chat(session_id: str) -> BaseChatMessageHistory:
        user, session = session_id.split("/")
        key = (user, session)
        return chats.setdefault(key, recorded(history, user_id=user, session_id=session))

    app = RunnableWithMessageHistory(model, get_chat)  # type: ignore[arg-type]
    for session, text in [("ann/1", "hello"), ("ann/1", "bye"), ("bob/1", "I am Bob")]:
        app.invoke([HumanMessage(text)], {"configurable": {"session_id": session}})
    assert (written(history), written(history, "bob")) == (["hello", "bye"], ["I am Bob"])
    assert history.fetch("ann")[1].messages == [
        {"role": "user", "content": MESSAGE_INSTRUCTION},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "hi"},
    ]


def test_a_chroma_that_is_gone_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    chat = recorded(ChromaHistory(tmp_path / "file"))
    with pytest.raises(HistoryError, match=r"Chroma at .*file"):
        chat.add_messages(TURNS[:2])
    assert chat.messages == TURNS[:2]
    chat.history = ChromaHistory(tmp_path / "chroma")
    chat.add_messages(TURNS[2:])
    assert written(chat.history) == ["hello", "bye"]


@pytest.mark.parametrize("wrong", [{"user_id": ""}, {"session_id": ""}, {"session_id": None}])
def test_a_user_or_session_without_a_name_is_refused(
    history: ChromaHistory, wrong: dict[str, Any]
) -> None:
    with pytest.raises(HistoryError, match=r"the (user|session) id"):
        recorded(history, **wrong)
