"""Whatever a chat is bound to, and however it is then called: the user that is named answers."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.load import dumps, load
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
from langchain_cope.engine import Engine, load_base

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
        max_tokens=3,
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
        lambda chat: (
            alternatives(chat).with_config(configurable={"llm": "late"}).bind_tools([add])
        ),
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


@pytest.mark.filterwarnings("ignore:astream_log is deprecated")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
async def test_every_method_of_every_kind_answers_as_the_right_user(
    kind: str, method: str, chat: ChatCoPe, store: AdapterStore
) -> None:
    make, config = KINDS[kind]
    made = make(chat)
    if "generate" in method and not hasattr(made, "generate"):
        pytest.skip("chains have no generate")
    ASKED.clear()
    result = METHODS[method](made, config)
    answers = messages_in(await result if hasattr(result, "__await__") else result)
    assert {answer.response_metadata["user_id"] for answer in answers} == {"bob"}
    digests = {answer.response_metadata["adapter_digest"] for answer in answers}
    assert digests == {store.resolve("bob").digest}
    assert set(ASKED) == {"bob"}
