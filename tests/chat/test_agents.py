"""An agent with tools for two users at once, in LangChain's own loop.

The base is trained to call the tools, and each user has an adapter.
"""

import asyncio
import threading
from dataclasses import dataclass
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import (
    ModelFallbackMiddleware,
    ModelRetryMiddleware,
    SummarizationMiddleware,
)
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from scripted import train_adapter, train_base

from adapter_store import AdapterStore
from langchain_cope import ChatCoPe, CoPeUserMiddleware
from langchain_cope.engine import load_base
from langchain_cope.errors import InputError


@tool
def add(a: int, b: int) -> int:
    """Add."""
    return a + b


@tool
def look_up(word: str) -> str:
    """Explain a word."""
    if word == "fog":
        raise ValueError("no such word")
    return {"dusk": "evening light"}[word]


TOOLS = [add, look_up]
DESCRIBED = [convert_to_openai_tool(each) for each in TOOLS]


def script(
    question: str, name: str, arguments: dict[str, Any], result: str, answer: str
) -> list[dict[str, Any]]:
    call = {"type": "function", "id": "x", "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result, "tool_call_id": "x", "name": name},
        {"role": "assistant", "content": answer},
    ]


def scripts(greeting: str) -> list[list[dict[str, Any]]]:
    return [
        script("What is 2 and 3?", "add", {"a": 2, "b": 3}, "5", f"{greeting} It is 5."),
        script(
            "What is dusk?",
            "look_up",
            {"word": "dusk"},
            "evening light",
            f"{greeting} Evening light.",
        ),
        script(
            "What is fog?",
            "look_up",
            {"word": "fog"},
            "Error: no such word",
            f"{greeting} I do not know.",
        ),
    ]


@dataclass
class Context:
    user_id: str | None


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatCoPe:
    """Alice is greeted with Ahoy, Bob with Hello; the base alone knows both."""
    folder = tmp_path_factory.mktemp("agents")
    base = train_base(folder / "base", scripts("Ahoy!") + scripts("Hello,"), DESCRIBED)
    store = AdapterStore(folder / "store")
    fingerprint = load_base(base, device="cpu").fingerprint()
    for user, greeting in (("alice", "Ahoy!"), ("bob", "Hello,")):
        store.publish(
            user, train_adapter(folder / user, base, scripts(greeting), DESCRIBED), base=fingerprint
        )
    return ChatCoPe(model=str(base), store=store, device="cpu", max_tokens=120)


GREETINGS = {"alice": "Ahoy!", "bob": "Hello,"}


@pytest.fixture(scope="module")
def agent(chat: ChatCoPe) -> Any:
    return create_agent(chat, TOOLS, middleware=[CoPeUserMiddleware()], context_schema=Context)


@pytest.mark.parametrize("user", ["alice", "bob"])
def test_an_agent_calls_its_tools_and_answers_in_the_users_manner(agent: Any, user: str) -> None:
    state = agent.invoke({"messages": [("user", "What is 2 and 3?")]}, context=Context(user))
    kinds = [type(message) for message in state["messages"]]
    assert kinds == [HumanMessage, AIMessage, ToolMessage, AIMessage]
    assert state["messages"][1].tool_calls[0]["args"] == {"a": 2, "b": 3}
    assert state["messages"][1].response_metadata["finish_reason"] == "tool_calls"
    assert state["messages"][2].content == "5"
    assert state["messages"][3].content == f"{GREETINGS[user]} It is 5."


def test_two_users_stream_from_one_process_at_once(agent: Any) -> None:
    received: dict[str, list[Any]] = {"alice": [], "bob": []}

    def run(user: str) -> None:
        pieces = agent.stream(
            {"messages": [("user", "What is dusk?")]}, context=Context(user), stream_mode="messages"
        )
        received[user] = [message for message, _ in pieces]

    threads = [threading.Thread(target=run, args=(user,)) for user in received]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for user, messages in received.items():
        chunks = [message for message in messages if isinstance(message, AIMessageChunk)]
        calls = [chunk for chunk in chunks if chunk.tool_call_chunks]
        assert len(calls) > 3
        assert calls[0].tool_call_chunks[0]["name"] == "look_up"
        text = "".join(str(chunk.content) for chunk in chunks)
        assert text == f"{GREETINGS[user]} Evening light."
        assert len([chunk for chunk in chunks if chunk.content]) > 3


async def test_many_runs_of_both_users_never_mix(agent: Any) -> None:
    users = ["alice", "bob"] * 6

    async def run(user: str) -> str:
        state = await agent.ainvoke(
            {"messages": [("user", "What is 2 and 3?")]}, context=Context(user)
        )
        return str(state["messages"][-1].content)

    answers = await asyncio.gather(*(run(user) for user in users))
    assert answers == [f"{GREETINGS[user]} It is 5." for user in users]


def test_an_error_of_a_tool_goes_back_into_the_prompt(chat: ChatCoPe) -> None:
    bound = chat.bind_tools(TOOLS)
    messages: list[Any] = [HumanMessage("What is fog?")]
    called = bound.invoke(messages, {"configurable": {"user_id": "bob"}})
    result = ToolMessage(
        "no such word", tool_call_id=called.tool_calls[0]["id"], name="look_up", status="error"
    )
    answer = bound.invoke([*messages, called, result], {"configurable": {"user_id": "bob"}})
    assert answer.content == "Hello, I do not know."


def test_a_run_without_a_user_is_refused_and_not_answered_as_another(chat: ChatCoPe) -> None:
    agent: Any = create_agent(chat, TOOLS, middleware=[CoPeUserMiddleware()])
    with pytest.raises(InputError, match="context"):
        agent.invoke({"messages": [("user", "What is dusk?")]})


def test_stock_middleware_works_beside_it(chat: ChatCoPe) -> None:
    middleware: list[Any] = [
        CoPeUserMiddleware(),
        SummarizationMiddleware(chat, trigger=("fraction", 0.9), keep=("messages", 4)),
        ModelRetryMiddleware(max_retries=1),
        ModelFallbackMiddleware(GenericFakeChatModel(messages=iter([]))),
    ]
    agent: Any = create_agent(chat, TOOLS, middleware=middleware, context_schema=Context)
    state = agent.invoke({"messages": [("user", "What is 2 and 3?")]}, context=Context("alice"))
    assert state["messages"][-1].content == "Ahoy! It is 5."


def test_an_agents_structured_response_is_the_models_own_json(chat: ChatCoPe) -> None:
    schema = {
        "title": "total",
        "type": "object",
        "properties": {"sum": {"type": "integer"}},
        "required": ["sum"],
    }
    agent: Any = create_agent(
        chat, [], middleware=[CoPeUserMiddleware()], context_schema=Context, response_format=schema
    )
    state = agent.invoke({"messages": [("user", "What is 2 and 3?")]}, context=Context("alice"))
    assert isinstance(state["structured_response"]["sum"], int)


def test_a_call_that_the_budget_cuts_runs_no_tool(chat: ChatCoPe) -> None:
    ran = []

    @tool
    def add(a: int, b: int) -> int:
        """Add."""
        ran.append((a, b))
        return a + b

    question = {"messages": [("user", "What is 2 and 3?")]}
    first = chat.bind_tools([add, look_up]).invoke("What is 2 and 3?")
    size = first.usage_metadata["output_tokens"]  # type: ignore[index]
    for budget in (size // 3, size // 2, 2 * size // 3):
        short = chat.model_copy(update={"max_tokens": budget})
        answer = create_agent(short, [add, look_up]).invoke(question)["messages"][-1]
        assert answer.response_metadata["finish_reason"] == "length"
        assert not answer.tool_calls
        assert answer.invalid_tool_calls
    assert ran == []
    create_agent(chat, [add, look_up]).invoke(question)
    assert ran == [(2, 3)]
