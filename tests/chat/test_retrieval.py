"""The user's model reads what its user wrote before; the base that is contrasted does not."""

from collections.abc import Callable
from pathlib import Path

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.messages import HumanMessage, SystemMessage
from personal import metadata_of_headlines

from adapter_store import AdapterStore
from langchain_cope import ChatCoPe
from langchain_cope.engine import Contrast, Engine, Request, Sampling, load_base
from langchain_cope.errors import InputError
from langchain_cope.history import ChromaHistory, Item, UserHistory

QUESTION = "What does the fox do?"
ITEMS = [
    Item(prompt="And the dog?", completion="Naps."),
    Item(prompt="Which fox?", completion="The red one."),
    Item(prompt="Why does it?", completion="Who knows."),
    Item(prompt=[{"role": "system", "content": "Fox."}], completion="What does the fox do"),
]


@pytest.fixture
def store(tiny: Callable[..., Path], adapter: Callable[..., Path], store_folder: Path):
    store = AdapterStore(store_folder)
    base = tiny("llama")
    store.publish("alice", adapter(base, seed=1), base=load_base(base).fingerprint(), alpha=0.5)
    return store


@pytest.fixture
def chat(tiny: Callable[..., Path], store: AdapterStore) -> ChatCoPe:
    history = UserHistory(user_id="alice", items=ITEMS)
    return ChatCoPe(
        model=str(tiny("llama")),
        store=store,
        user_id="alice",
        history=history,
        retrieve=2,
        max_tokens=16,
    )


def turns(*items: Item) -> list[dict[str, str]]:
    return [
        turn
        for item in items
        for turn in [*item.messages, {"role": "assistant", "content": item.completion}]
    ]


def expected(chat: ChatCoPe, folder: Path, shown: list[dict[str, str]]) -> str:
    """What the engine answers whose personal row reads `shown` first."""
    engine = Engine.of(load_base(chat.model))
    system, question = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTION},
    )
    request = Request(
        engine.base.prompt_ids([system, *shown, question]),
        engine.load_adapter(folder),
        Contrast(0.5, rule="adaptive"),
        Sampling(max_tokens=16),
        base_prompt=engine.base.prompt_ids([system, question]),
    )
    return engine.generate([request])[0].text


def test_items_most_alike_stand_before_the_question_of_the_users_row(
    chat: ChatCoPe, tiny: Callable[..., Path], adapter: Callable[..., Path]
) -> None:
    folder = adapter(tiny("llama"), seed=1)
    asked = [SystemMessage("Be brief."), HumanMessage(QUESTION)]
    answer = chat.invoke(asked)
    assert answer.content == expected(chat, folder, turns(ITEMS[2], ITEMS[1]))
    assert answer.response_metadata["retrieved"] == 2
    without = chat.invoke(asked, retrieve=0)
    assert without.content == expected(chat, folder, [])
    assert without.response_metadata["retrieved"] == 0
    assert without.content != answer.content


def test_on_a_question_unlike_the_history_the_base_reads_no_items(
    chat: ChatCoPe, store: AdapterStore, tiny: Callable[..., Path], adapter: Callable[..., Path]
) -> None:
    loaded = load_base(chat.model)
    store.publish(
        "alice",
        adapter(tiny("llama"), seed=1),
        base=loaded.fingerprint(),
        metadata=metadata_of_headlines(loaded),
    )
    question = [SystemMessage("Be brief."), HumanMessage(QUESTION)]
    answer = chat.invoke(question)
    assert (answer.response_metadata["relevance"], answer.response_metadata["retrieved"]) == (0, 0)
    assert answer.content == chat.invoke(question, user_id=None).content
    assert chat.invoke(question, contrast="fixed").response_metadata["retrieved"] == 2


def test_items_that_leave_no_room_for_the_answer_are_left_out(chat: ChatCoPe) -> None:
    base, question = load_base(chat.model), {"role": "user", "content": QUESTION}
    lengths = [
        len(base.prompt_ids([*turns(*shown), question])) for shown in (ITEMS[2:0:-1], ITEMS[1:2])
    ]
    room_for_two, room_for_one = (base.context - length for length in lengths)
    for max_tokens, shown in (
        (room_for_two, 2),
        (room_for_two + 1, 1),
        (room_for_one, 1),
        (room_for_one + 1, 0),
    ):
        answer = chat.invoke(QUESTION, max_tokens=max_tokens)
        assert answer.response_metadata["retrieved"] == shown, max_tokens


def test_a_chroma_history_is_read_by_user(chat: ChatCoPe) -> None:
    history = ChromaHistory(collection="retrieval")
    history.add("alice", ITEMS[:3])
    stored = chat.model_copy(update={"history": history})
    assert stored.invoke(QUESTION).content == chat.invoke(QUESTION).content
    other = stored.invoke(QUESTION, user_id="bob")
    assert other.response_metadata["retrieved"] == 0
    history.delete_user("alice")


def test_an_answer_of_another_history_is_never_taken_from_a_cache(
    chat: ChatCoPe, llm_cache: InMemoryCache
) -> None:
    first = chat.invoke(QUESTION)
    fewer = chat.model_copy(
        update={"history": UserHistory(user_id="alice", items=ITEMS[1:2])}
    ).invoke(QUESTION)
    assert (first.response_metadata["retrieved"], fewer.response_metadata["retrieved"]) == (2, 1)
    assert len(llm_cache._cache) == 2


def test_a_history_that_is_none_or_anothers_is_refused(chat: ChatCoPe) -> None:
    with pytest.raises(InputError, match="give history=ChromaHistory"):
        chat.model_copy(update={"history": None}).invoke(QUESTION)
    with pytest.raises(InputError, match="of the user 'alice', not of 'bob'"):
        chat.invoke(QUESTION, user_id="bob")
    with pytest.raises(InputError, match="retrieve must be an integer ≥ 0, not -1"):
        chat.invoke(QUESTION, retrieve=-1)
