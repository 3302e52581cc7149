"""Whatever a chat is bound to, and however it is then called: the user that is named answers."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.load import dumps, loads
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.outputs import LLMResult
from langchain_core.prompt_values import StringPromptValue
from langchain_core.rate_limiters import BaseRateLimiter
from langchain_core.runnables import (
    ConfigurableField,
    Runnable,
    RunnableConfig,
    RunnableLambda,
    RunnableWithFallbacks,
)
from langchain_core.tracers.log_stream import RunLogPatch

from adapter_store import AdapterStore
from langchain_cope import ChatCoPe
from langchain_cope.chat.bindings import (
    BoundChat,
    ConfigurableChat,
)
from langchain_cope.engine import Engine, load_base
from langchain_cope.errors import EngineClosed

QUESTION = "What does the fox do all day?"
SCHEMA = {"title": "a", "type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
WHO = ConfigurableField(id="who")
BOB: RunnableConfig = {"configurable": {"user_id": "bob"}}
WHO_IS_BOB: RunnableConfig = {"configurable": {"who": "bob"}}
THREAD: RunnableConfig = {"configurable": {"thread_id": "1"}}
ASKED: list[str | None] = []


def add(a: int, b: int) -> int:
    """Add."""
    return a + b


@pytest.fixture(scope="module")
def store(
    tiny: Callable[..., Path],
    adapter: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> AdapterStore:
    base = tiny("llama", context=1024)
    store = AdapterStore(tmp_path_factory.mktemp("users"))
    for seed, user in enumerate(["alice", "bob"], 1):
        store.publish(user, adapter(base, seed=seed), base=load_base(base).fingerprint())
    return store


@pytest.fixture(scope="module")
def chat(tiny: Callable[..., Path], store: AdapterStore) -> ChatCoPe:
    """Alice's, who must not be the one that answers."""
    return ChatCoPe(
        model=str(tiny("llama", context=1024)),
        store=store,
        user_id="alice",
        max_tokens=2,
        authorize=lambda user, config: ASKED.append(user),
    )


def listen(run: Any) -> None:
    pass


async def alisten(run: Any) -> None:
    pass


Kind = tuple[Callable[[ChatCoPe], Any], RunnableConfig]
KINDS: dict[str, Kind] = {
    "plain": (lambda chat: chat, BOB),
    "bound": (lambda chat: chat.bind(user_id="bob"), {}),
    "bound twice": (lambda chat: chat.bind(user_id="bob").bind(top_k=5), {}),
    "with_config": (lambda chat: chat.with_config(BOB), {}),
    "with_config twice": (lambda chat: chat.with_config(BOB).with_config(THREAD), {}),
    "tools": (lambda chat: chat.bind_tools([add]), BOB),
    "bound, tools": (lambda chat: chat.bind(user_id="bob").bind_tools([add]), {}),
    "with_config twice, tools": (
        lambda chat: chat.with_config(BOB).with_config(THREAD).bind_tools([add]),
        {},
    ),
    "listeners, with_config, tools": (
        lambda chat: chat.with_listeners(on_end=listen).with_config(BOB).bind_tools([add]),
        {},
    ),
    "with_config, listeners, tools": (
        lambda chat: chat.with_config(BOB).with_alisteners(on_end=alisten).bind_tools([add]),
        {},
    ),
    "with_config, types, tools": (
        lambda chat: chat.with_config(BOB).with_types(input_type=str).bind_tools([add]),
        {},
    ),
    "with_config, retry, tools": (
        lambda chat: chat.with_config(BOB).with_retry().bind_tools([add]),
        {},
    ),
    "tools, retry": (lambda chat: chat.bind_tools([add]).with_retry(), BOB),
    "structured": (lambda chat: structured(chat), BOB),
    "structured, bound": (lambda chat: structured(chat).bind(user_id="bob"), {}),
    "with_config, structured": (lambda chat: structured(chat.with_config(BOB)), {}),
    "bound, structured": (lambda chat: structured(chat.bind(user_id="bob")), {}),
    "configured": (lambda chat: configured(chat), WHO_IS_BOB),
    "configured twice": (
        lambda chat: configured(chat).configurable_fields(top_k=ConfigurableField(id="k")),
        WHO_IS_BOB,
    ),
    "configured, bound, tools": (
        lambda chat: configured(chat).bind(top_k=5).bind_tools([add]),
        WHO_IS_BOB,
    ),
    "configured, tools": (lambda chat: configured(chat).bind_tools([add]), WHO_IS_BOB),
    "configured, with_config twice, tools": (
        lambda chat: configured(chat).with_config(WHO_IS_BOB).with_config(THREAD).bind_tools([add]),
        {},
    ),
    "configured, listeners, types, tools": (
        lambda chat: (
            configured(chat)
            .with_listeners(on_end=listen)
            .with_types(input_type=str)
            .bind_tools([add])
        ),
        WHO_IS_BOB,
    ),
    "configured, retry": (lambda chat: configured(chat).with_retry(), WHO_IS_BOB),
    "configured, structured": (lambda chat: structured(configured(chat)), WHO_IS_BOB),
    "configured, with_config, structured": (
        lambda chat: structured(configured(chat).with_config(WHO_IS_BOB)),
        {},
    ),
    "fallbacks, tools": (lambda chat: fallbacks(chat).bind_tools([add]), BOB),
    "fallbacks, with_config, tools": (
        lambda chat: fallbacks(chat).with_config(BOB).bind_tools([add]),
        {},
    ),
    "fallbacks, bound, structured": (
        lambda chat: structured(fallbacks(chat).bind(user_id="bob")),
        {},
    ),
    "configured, fallbacks, with_config, tools": (
        lambda chat: fallbacks(configured(chat)).with_config(WHO_IS_BOB).bind_tools([add]),
        {},
    ),
    "alternatives": (lambda chat: alternatives(chat), {"configurable": {"llm": "bobs"}}),
    "alternatives, tools": (
        lambda chat: alternatives(chat).bind_tools([add]),
        {"configurable": {"llm": "bobs"}},
    ),
    "alternatives made late, with_config, tools": (
        lambda chat: alternatives(chat).with_config(configurable={"llm": "late"}).bind_tools([add]),
        {},
    ),
    "alternatives, with_config, structured": (
        lambda chat: structured(alternatives(chat).with_config(configurable={"llm": "bobs"})),
        {},
    ),
    "configured, alternatives, with_config, tools": (
        lambda chat: alternatives(configured(chat)).with_config(WHO_IS_BOB).bind_tools([add]),
        {},
    ),
    "with_config, alternatives, tools": (
        lambda chat: alternatives(chat.with_config(BOB)).bind_tools([add]),
        {},
    ),
    "fallbacks, alternatives, tools": (
        lambda chat: alternatives(fallbacks(chat.with_config(BOB))).bind_tools([add]),
        {},
    ),
}


def structured(chat: Any) -> Any:
    return chat.with_structured_output(SCHEMA, include_raw=True)


def configured(chat: ChatCoPe) -> Any:
    return chat.configurable_fields(user_id=WHO)


def fallbacks(chat: Any) -> Any:
    return chat.with_fallbacks([ChatCoPe(model="./nowhere")])


def alternatives(chat: Any) -> Any:
    bobs = chat.bind(user_id="bob")
    which = ConfigurableField(id="llm")
    return chat.configurable_alternatives(which, bobs=bobs, late=lambda: bobs)


async def once(text: str = QUESTION) -> AsyncIterator[str]:
    yield text


async def joined(pieces: AsyncIterator[Any]) -> Any:
    total = None
    async for piece in pieces:
        total = piece if total is None else total + piece
    return total


async def last_output(events: AsyncIterator[Any]) -> Any:
    return [event async for event in events][-1]["data"]["output"]


async def final_output(patches: AsyncIterator[RunLogPatch]) -> Any:
    total = None
    async for patch in patches:
        total = patch if total is None else total + patch
    return total.state["final_output"]  # type: ignore[union-attr]


def summed(pieces: Iterator[Any]) -> Any:
    total = next(pieces)
    for piece in pieces:
        total += piece
    return total


async def items(pairs: AsyncIterator[Any]) -> list[Any]:
    return [answer async for _, answer in pairs]


Q2 = [QUESTION, QUESTION]
METHODS: dict[str, Callable[[Any, RunnableConfig], Any]] = {
    "invoke": lambda chat, config: chat.invoke(QUESTION, config),
    "ainvoke": lambda chat, config: chat.ainvoke(QUESTION, config),
    "stream": lambda chat, config: summed(chat.stream(QUESTION, config)),
    "astream": lambda chat, config: joined(chat.astream(QUESTION, config)),
    "batch": lambda chat, config: chat.batch(Q2, config),
    "abatch": lambda chat, config: chat.abatch(Q2, [config, config]),
    "batch_as_completed": lambda chat, config: [
        answer for _, answer in chat.batch_as_completed(Q2, config)
    ],
    "abatch_as_completed": lambda chat, config: items(chat.abatch_as_completed(Q2, config)),
    "transform": lambda chat, config: summed(chat.transform(iter([QUESTION]), config)),
    "atransform": lambda chat, config: joined(chat.atransform(once(), config)),
    "astream_events": lambda chat, config: last_output(
        chat.astream_events(QUESTION, config, version="v2")
    ),
    "astream_log": lambda chat, config: final_output(chat.astream_log(QUESTION, config)),
    "bind": lambda chat, config: chat.bind(top_p=1.0).invoke(QUESTION, config),
    "with_config": lambda chat, config: chat.with_config(config).invoke(QUESTION),
    "with_listeners": lambda chat, config: chat.with_listeners(on_end=listen).invoke(
        QUESTION, config
    ),
    "with_alisteners": lambda chat, config: chat.with_alisteners(on_end=alisten).ainvoke(
        QUESTION, config
    ),
    "with_types": lambda chat, config: chat.with_types(input_type=str).invoke(QUESTION, config),
    "with_retry": lambda chat, config: chat.with_retry().invoke(QUESTION, config),
    "with_fallbacks": lambda chat, config: chat.with_fallbacks([]).invoke(QUESTION, config),
    "map": lambda chat, config: chat.map().invoke(Q2, config),
    "pipe": lambda chat, config: chat.pipe(RunnableLambda(lambda x: x)).invoke(QUESTION, config),
    "as_tool": lambda chat, config: (
        (RunnableLambda(lambda given: given["q"]) | chat)
        .as_tool(name="ask", description="Ask.", arg_types={"q": str})
        .invoke({"q": QUESTION}, config)
    ),
    "generate": lambda chat, config: chat.with_config(config).generate(TWICE),
    "agenerate": lambda chat, config: chat.with_config(config).agenerate(TWICE),
    "generate_prompt": lambda chat, config: chat.with_config(config).generate_prompt([PROMPT]),
    "agenerate_prompt": lambda chat, config: chat.with_config(config).agenerate_prompt([PROMPT]),
}
TWICE, PROMPT = [[HumanMessage(QUESTION)]] * 2, StringPromptValue(text=QUESTION)
# They answer nothing, take no chat's output, or are one of the above over events of version 3.
NO_ANSWER = {"assign", "config_schema", "get_name", "pick", "stream_events"}


def test_the_table_has_every_method_of_cores_runnables() -> None:
    public = {name for name, value in vars(Runnable).items() if callable(value)}
    answering = {name for name in public if name[0] != "_" and not name.startswith("get_")}
    assert answering - NO_ANSWER <= METHODS.keys()


def messages_in(result: Any) -> list[AIMessage]:
    if isinstance(result, LLMResult):
        return [generation.message for [generation] in result.generations]  # type: ignore[union-attr, misc]
    if isinstance(result, list):
        return [message for each in result for message in messages_in(each)]
    return [result["raw"] if isinstance(result, dict) else result]


ANSWERING = ("ainvoke", "batch", "generate")
THOROUGH = (
    "plain",
    "with_config twice, tools",
    "structured, bound",
    "configured",
    "alternatives, tools",
)
TABLE = [
    (kind, method)
    for kind in KINDS
    for method in (METHODS if kind in THOROUGH else ANSWERING)
    if not ("structured" in kind and "generate" in method)  # a chain has none
    if not ("retry" in kind.split(", ")[-1] and "generate" in method)  # nor has a retry
]


@pytest.mark.filterwarnings("ignore:astream_log is deprecated", "ignore:This API is in beta")
@pytest.mark.parametrize(("kind", "method"), TABLE)
async def test_every_kind_of_chat_answers_as_the_right_user(
    kind: str, method: str, chat: ChatCoPe, store: AdapterStore
) -> None:
    make, config = KINDS[kind]
    made = make(chat)
    ASKED.clear()
    result = METHODS[method](made, config)
    answers = messages_in(await result if hasattr(result, "__await__") else result)
    assert {answer.response_metadata["user_id"] for answer in answers} == {"bob"}
    digests = {answer.response_metadata["adapter_digest"] for answer in answers}
    assert digests == {store.resolve("bob").digest}
    assert set(ASKED) == {"bob"}


@pytest.mark.filterwarnings("ignore:This API is in beta")
@pytest.mark.parametrize("kind", ["plain", "configured", "configured, tools", "alternatives"])
async def test_events_of_version_3_are_of_the_right_user(kind: str, chat: ChatCoPe) -> None:
    make, config = KINDS[kind]
    ASKED.clear()
    assert make(chat).stream_events(QUESTION, config, version="v3").output
    assert await (await make(chat).astream_events(QUESTION, config, version="v3")).output
    assert ASKED == ["bob", "bob"]


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("alpha", 0.7, ("alpha", 0.7)),
        ("tau", 0.5, ("tau", 0.5)),
        ("max_tokens", 1, ("finish_reason", "length")),
        ("adapter_version", "first", ("adapter_version", "first")),
        ("model", "other", ("model_name", "other")),
    ],
)
def test_every_field_can_be_configured_and_stays_once_tools_are_bound(
    field: str,
    value: Any,
    shown: tuple[str, Any],
    chat: ChatCoPe,
    store: AdapterStore,
    tiny: Callable[..., Path],
) -> None:
    known = {"first": store.active("alice"), "other": str(tiny("llama", context=1024, seed=5))}
    value, expected = known.get(value, value), known.get(shown[1], shown[1])
    user = None if field == "model" else "alice"
    made = chat.configurable_fields(**{field: WHO}).with_config(THREAD).bind_tools([add])
    answer = made.invoke(QUESTION, {"configurable": {"who": value, "user_id": user}})
    assert answer.response_metadata[shown[0]] == expected


def test_options_of_a_binding_reach_generate(chat: ChatCoPe) -> None:
    started: list[Any] = []

    class Watch(BaseCallbackHandler):
        def on_chat_model_start(self, *given: Any, tags: Any = None, **others: Any) -> None:
            started.append(tags)

    bound = chat.bind(max_tokens=1).with_config(BOB).with_config(tags=["mine"])
    result = bound.generate(TWICE, callbacks=[Watch()])
    assert [g.message.usage_metadata["output_tokens"] for [g] in result.generations] == [1, 1]  # type: ignore[union-attr, index]
    assert started == [["mine"], ["mine"]]
    assert result.run is not None
    assert len({run.run_id for run in result.run}) == 2


def test_a_chat_with_tools_counts_their_tokens(chat: ChatCoPe) -> None:
    messages = [HumanMessage(QUESTION)]
    tools = chat.bind_tools([add])
    counted = tools.get_num_tokens_from_messages(messages)  # type: ignore[attr-defined]
    assert counted == tools.invoke(messages).usage_metadata["input_tokens"]  # type: ignore[index]
    assert counted > chat.get_num_tokens_from_messages(messages)


def test_a_fallback_answers_with_tools_of_its_own(chat: ChatCoPe) -> None:
    broken = ChatCoPe(model="./nowhere").with_fallbacks([chat])
    assert isinstance(broken, RunnableWithFallbacks)
    answer = broken.with_config(BOB).bind_tools([add]).invoke(QUESTION)
    assert answer.response_metadata["user_id"] == "bob"


def test_tools_are_refused_where_they_cannot_be_kept(chat: ChatCoPe) -> None:
    with pytest.raises(AttributeError, match="bind_tools"):
        chat.with_retry().bind_tools([add])  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="user_id not found"):
        chat.bind(user_id="bob").configurable_fields(user_id=WHO)


@pytest.mark.filterwarnings("ignore:The function `loads` is in beta")
@pytest.mark.parametrize("kind", ["bound", "with_config", "configured", "configured, tools"])
def test_a_binding_that_is_read_back_keeps_its_user_with_tools(
    kind: str, chat: ChatCoPe, store: AdapterStore
) -> None:
    make, config = KINDS[kind]
    written = dumps(make(chat.model_copy(update={"store": store.url})))
    classes = [ChatCoPe, BoundChat, ConfigurableChat]
    again = loads(written, allowed_objects=classes, valid_namespaces=["langchain_cope"])
    answer = again.bind_tools([add]).invoke(QUESTION, config)
    assert answer.response_metadata["user_id"] == "bob"


def test_an_agent_on_a_configured_chat_answers_as_its_user(chat: ChatCoPe) -> None:
    agent: Any = create_agent(configured(chat), [add])
    ASKED.clear()
    state = agent.invoke({"messages": [("user", QUESTION)]}, WHO_IS_BOB)
    assert state["messages"][1].response_metadata["user_id"] == "bob"
    assert set(ASKED) == {"bob"}


def test_a_closed_chat_is_closed_however_it_is_configured(chat: ChatCoPe) -> None:
    closed = chat.model_copy()
    made = configured(closed).bind_tools([add])
    closed.close()
    with pytest.raises(EngineClosed):
        made.invoke(QUESTION, WHO_IS_BOB)
    closed.load()
    assert made.invoke(QUESTION, WHO_IS_BOB).response_metadata["user_id"] == "bob"
    assert configured(chat).invoke(QUESTION).content


class AllTogether(BaseRateLimiter):
    """Lets calls through when so many have come; fewer at a time break it."""

    def __init__(self, number: int) -> None:
        self._threads = threading.Barrier(number)
        self._tasks = asyncio.Barrier(number)

    def acquire(self, *, blocking: bool = True) -> bool:
        self._threads.wait(timeout=20)
        return True

    async def aacquire(self, *, blocking: bool = True) -> bool:
        async with asyncio.timeout(20):
            await self._tasks.wait()
        return True


NUMBER = 24
MANY = [f"{number}?" for number in range(NUMBER)]
TURNS = [[HumanMessage(text)] for text in MANY]
TOGETHER: dict[str, Callable[[Any], Any]] = {
    "batch": lambda chat: chat.batch(MANY),
    "batch_as_completed": lambda chat: list(chat.batch_as_completed(MANY)),
    "abatch": lambda chat: chat.abatch(MANY),
    "generate": lambda chat: chat.generate(TURNS),
    "agenerate": lambda chat: chat.agenerate(TURNS),
    "bound, batch": lambda chat: chat.bind(user_id="bob").batch(MANY),
    "bound, generate": lambda chat: chat.bind(user_id="bob").generate(TURNS),
    "configured, batch": lambda chat: configured(chat).with_config(WHO_IS_BOB).batch(MANY),
    "alternatives, batch": lambda chat: alternatives(chat).batch(MANY),
    "fallbacks, batch": lambda chat: fallbacks(chat).batch(MANY),
    "structured, batch": lambda chat: structured(chat).batch(MANY),
    "a chain, batch": lambda chat: (RunnableLambda(lambda text: text) | chat).batch(MANY),
    "map": lambda chat: chat.map().invoke(MANY),
}


@pytest.mark.parametrize("form", TOGETHER)
async def test_all_calls_of_a_batch_reach_the_engine_together(form: str, chat: ChatCoPe) -> None:
    many = chat.model_copy(update={"rate_limiter": AllTogether(NUMBER), "max_tokens": 24})
    engine = Engine.of(load_base(chat.model))
    before = engine.statistics()
    answers = await asyncio.to_thread(TOGETHER[form], many)
    if hasattr(answers, "__await__"):
        answers = await answers
    assert len(getattr(answers, "generations", answers)) == NUMBER
    after = engine.statistics()
    assert after.steps - before.steps < (after.tokens - before.tokens) / 4


class MostAtOnce(BaseCallbackHandler):
    def __init__(self) -> None:
        self.running, self.most, self._lock = 0, 0, threading.Lock()

    def on_chat_model_start(self, *given: Any, **others: Any) -> None:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)

    def on_llm_end(self, *given: Any, **others: Any) -> None:
        with self._lock:
            self.running -= 1


@pytest.mark.parametrize("kind", ["plain", "bound", "configured"])
def test_a_given_max_concurrency_holds(kind: str, chat: ChatCoPe) -> None:
    make, _ = KINDS[kind]
    limited = make(chat.model_copy(update={"rate_limiter": AllTogether(3)}))
    counter = MostAtOnce()
    limited.with_config(max_concurrency=3).batch(MANY[:6], {"callbacks": [counter]})
    assert counter.most == 3
