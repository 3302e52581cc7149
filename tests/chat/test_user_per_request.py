"""The user of a call, in every form that can name one; who may ask; and what traces show."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import ModelNotFoundError
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_core.tracers import BaseTracer
from langchain_core.tracers.schemas import Run
from langgraph.graph import END, START, StateGraph

from adapter_store import AdapterStore
from langchain_cope import ChatCoPe
from langchain_cope.chat.user import PinnedUser, user_of_call, user_of_run
from langchain_cope.engine import Engine, load_base

QUESTION = "What does the fox do all day?"
USERS = ["alice", "bob", "carol"]


@pytest.fixture(scope="module")
def store(
    tiny: Callable[..., Path],
    adapter: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> AdapterStore:
    """Three users; Carol has no adapter."""
    base = tiny("llama")
    store = AdapterStore(tmp_path_factory.mktemp("users"))
    for seed, user in enumerate(USERS[:2], 1):
        store.publish(user, adapter(base, seed=seed), base=load_base(base).fingerprint())
    return store


@pytest.fixture(scope="module")
def chat(tiny: Callable[..., Path], store: AdapterStore) -> ChatCoPe:
    return ChatCoPe(model=str(tiny("llama")), store=store, max_tokens=12)


@pytest.fixture(scope="module")
def answers(chat: ChatCoPe) -> dict[str | None, str]:
    """Each user's own answer."""
    answers: dict[str | None, str] = {}
    for user in [*USERS, None]:
        answers[user] = str(chat.invoke(QUESTION, user_id=user).content)
    assert len({answers["alice"], answers["bob"], answers["carol"]}) == 3
    assert answers["carol"] == answers[None]
    return answers


def as_user(user: str) -> RunnableConfig:
    return {"configurable": {"user_id": user}}


def forms(chat: ChatCoPe) -> dict[str, Callable[[str], Any]]:
    prompt = ChatPromptTemplate.from_messages([("human", "{question}")])
    parsed = prompt | chat | StrOutputParser()
    inner = RunnableLambda(lambda question: chat.invoke(question))
    flaky = iter([RuntimeError("once")] * 100)
    seen: set[str] = set()

    def fails_once(message: AIMessage, config: RunnableConfig) -> AIMessage:
        user = config["configurable"]["user_id"]
        if user not in seen:
            seen.add(user)
            raise next(flaky)
        return message

    retried = (chat | RunnableLambda(fails_once)).with_retry(wait_exponential_jitter=False)
    fallen_back = RunnableLambda(lambda _: 1 / 0).with_fallbacks([chat])

    class State(TypedDict):
        question: str
        answer: str

    def answer(state: State, config: RunnableConfig) -> dict[str, str]:
        return {"answer": str(chat.invoke(state["question"], config).content)}

    graph: Any = (
        StateGraph(State)
        .add_node("answer", answer)
        .add_edge(START, "answer")
        .add_edge("answer", END)
        .compile()
    )
    return {
        "keyword": lambda user: chat.invoke(QUESTION, user_id=user).content,
        "configurable": lambda user: chat.invoke(QUESTION, as_user(user)).content,
        "with_config": lambda user: chat.with_config(as_user(user)).invoke(QUESTION).content,
        "bind": lambda user: chat.bind(user_id=user).invoke(QUESTION).content,
        "bind, then tools": lambda user: (
            chat.bind(user_id=user).bind_tools([]).invoke(QUESTION).content
        ),
        "with_config, then tools": lambda user: (
            chat.with_config(as_user(user)).bind_tools([]).invoke(QUESTION).content
        ),
        "bind_tools": lambda user: chat.bind_tools([]).invoke(QUESTION, as_user(user)).content,
        "a chain": lambda user: parsed.invoke({"question": QUESTION}, as_user(user)),
        "a nested call": lambda user: inner.invoke(QUESTION, as_user(user)).content,
        "with_retry": lambda user: retried.invoke(QUESTION, as_user(user)).content,
        "with_fallbacks": lambda user: fallen_back.invoke(QUESTION, as_user(user)).content,
        "stream": lambda user: "".join(
            str(chunk.content) for chunk in chat.stream(QUESTION, as_user(user))
        ),
        "LangGraph": lambda user: graph.invoke({"question": QUESTION}, as_user(user))["answer"],
        "LangGraph, streamed": lambda user: "".join(
            str(message.content)
            for message, _ in graph.stream(
                {"question": QUESTION}, as_user(user), stream_mode="messages"
            )
        ),
    }


@pytest.mark.parametrize("form", list(forms(ChatCoPe())))
def test_every_form_answers_as_the_user_it_names(
    form: str, chat: ChatCoPe, answers: dict[str | None, str]
) -> None:
    ask = forms(chat)[form]
    assert {user: ask(user) for user in USERS} == {user: answers[user] for user in USERS}


def test_the_keyword_names_the_user_then_the_run_then_configurable() -> None:
    keyword, configurable = {"user_id": "alice"}, {"user_id": "carol"}
    assert user_of_call({}, {}, "dora") == "dora"
    assert user_of_call({}, configurable, "dora") == "carol"
    for of_run in ("bob", None):
        token = user_of_run.set((of_run,))
        assert user_of_call({}, configurable, "dora") == of_run
        assert user_of_call(keyword, configurable, "dora") == "alice"
        assert user_of_call({"user_id": None}, configurable, "dora") is None
        user_of_run.reset(token)


def test_a_call_resolves_its_engine_once(
    chat: ChatCoPe, monkeypatch: pytest.MonkeyPatch, llm_cache: InMemoryCache
) -> None:
    engines: list[Engine] = []

    def engine(self: ChatCoPe, model: str | None = None) -> Engine:
        engines.append(super(ChatCoPe, self)._engine(model))
        return engines[-1]

    monkeypatch.setattr(ChatCoPe, "_engine", engine)
    chat.invoke(QUESTION, user_id="alice", max_tokens=1)
    assert len(engines) == 1


def test_a_copy_of_what_a_call_carries_copies_no_engine(chat: ChatCoPe) -> None:
    pinned = chat._pin({"user_id": "alice"})
    assert isinstance(pinned["pinned_user"], PinnedUser)
    assert copy.deepcopy(pinned)["pinned_user"].engine is pinned["pinned_user"].engine


async def test_a_batch_with_a_configuration_each_mixes_no_users(
    chat: ChatCoPe, answers: dict[str | None, str]
) -> None:
    users = USERS * 3
    chain = ChatPromptTemplate.from_messages([("human", "{q}")]) | chat | StrOutputParser()
    inputs = [{"q": QUESTION}] * len(users)
    expected = [answers[user] for user in users]
    assert chain.batch(inputs, [as_user(user) for user in users]) == expected
    assert await chain.abatch(inputs, [as_user(user) for user in users]) == expected


async def test_the_cache_of_answers_keeps_users_and_versions_apart(
    chat: ChatCoPe,
    store: AdapterStore,
    adapter: Callable[..., Path],
    llm_cache: InMemoryCache,
    answers: dict[str | None, str],
) -> None:
    for _ in range(2):
        for user in USERS:
            assert (await chat.ainvoke(QUESTION, as_user(user))).content == answers[user]
    assert len(llm_cache._cache) == 3
    old = store.resolve("bob")
    fingerprint = load_base(chat.model).fingerprint()
    store.publish("bob", adapter(Path(chat.model), seed=9), base=fingerprint)
    changed = chat.invoke(QUESTION, as_user("bob")).content
    assert changed != answers["bob"]
    as_before = chat.invoke(QUESTION, as_user("bob"), adapter_version=old.version).content
    assert as_before == answers["bob"]
    store.activate("bob", old.version)
    assert chat.invoke(QUESTION, as_user("bob")).content == answers["bob"]


class RefusedError(Exception):
    pass


def test_authorize_decides_who_may_ask_as_a_user(
    chat: ChatCoPe, answers: dict[str | None, str]
) -> None:
    asked: list[str | None] = []

    def only_oneself(user: str | None, config: RunnableConfig) -> None:
        asked.append(user)
        if config.get("metadata", {}).get("session") != user:
            raise RefusedError(user)

    guarded = chat.model_copy(update={"authorize": only_oneself})
    mine: RunnableConfig = {"metadata": {"session": "alice"}}
    assert guarded.invoke(QUESTION, {**as_user("alice"), **mine}).content == answers["alice"]
    for ask in (
        lambda: guarded.invoke(QUESTION, {**as_user("bob"), **mine}),
        lambda: guarded.invoke(QUESTION, mine, user_id="bob"),
        lambda: guarded.bind_tools([]).invoke(QUESTION, {**as_user("bob"), **mine}),
        lambda: list(guarded.stream(QUESTION, {**as_user("bob"), **mine})),
        lambda: guarded.generate([[HumanMessage(QUESTION)]], user_id="bob"),
    ):
        with pytest.raises(RefusedError, match="bob"):
            ask()
    assert asked == ["alice", *["bob"] * 5]


class Recorder(BaseTracer):
    """All that a tracer would write down."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def _persist_run(self, run: Run) -> None:
        traced = [run.inputs, run.outputs, run.extra, run.serialized]
        self.seen.append(json.dumps(traced, default=_as_tracers_do))


def _as_tracers_do(thing: Any) -> Any:
    for method in ("model_dump", "to_dict", "dict"):
        if hasattr(thing, method) and not isinstance(thing, type):
            return getattr(thing, method)()
    return repr(thing)


def test_a_schema_bound_to_a_binding_keeps_the_user(chat: ChatCoPe) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
    for bound in (chat.bind(user_id="bob"), chat.with_config(as_user("bob"))):
        chain = bound.with_structured_output(schema, include_raw=True)
        answer = chain.invoke(QUESTION, max_tokens=40)
        assert answer["raw"].response_metadata["user_id"] == "bob"


@pytest.mark.parametrize(
    ("how", "shown"), [("plain", "alice"), ("hashed", "2bd806c97f0e00af"), ("omitted", None)]
)
def test_traces_show_the_user_as_they_are_told(how: Any, shown: str | None, chat: ChatCoPe) -> None:
    recorder = Recorder()
    named = chat.model_copy(update={"user_id": "alice"})
    assert "alice" in str(named._serialized)
    traced = named.model_copy(update={"trace_user_id": how})
    message = traced.invoke(QUESTION, {"callbacks": [recorder]})
    list(traced.bind(user_id="alice").stream(QUESTION, {"callbacks": [recorder]}))
    assert message.response_metadata["user_id"] == shown
    written = "".join(recorder.seen)
    assert ("alice" in written) is (how == "plain")
    assert shown is None or shown in written


class Started(BaseCallbackHandler):
    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {}

    def on_chat_model_start(
        self, *_: Any, metadata: dict[str, Any] | None = None, **__: Any
    ) -> None:
        self.metadata = metadata or {}


def test_langsmith_parameters_are_those_of_the_call(chat: ChatCoPe) -> None:
    handler = Started()
    chat.invoke(QUESTION, {"callbacks": [handler]}, temperature=0.5, max_tokens=3, stop=["x"])
    expected = {
        "ls_provider": "cope",
        "ls_model_type": "chat",
        "ls_model_name": chat.model,
        "ls_temperature": 0.5,
        "ls_max_tokens": 3,
        "ls_stop": ["x"],
    }
    assert {name: handler.metadata.get(name) for name in expected} == expected


def test_a_base_that_is_not_there_is_cores_own_error() -> None:
    with pytest.raises(ModelNotFoundError, match="no model at the path"):
        ChatCoPe(model="./nowhere").invoke(QUESTION)


def test_the_profile_is_read_without_loading_the_base(chat: ChatCoPe) -> None:
    profile = chat.profile
    assert profile is not None
    assert profile["max_input_tokens"] == 255
    assert profile["tool_calling"] is profile["structured_output"] is True
    assert ChatCoPe().profile is not None
    assert ChatCoPe(model="owner/not-there").profile is None
