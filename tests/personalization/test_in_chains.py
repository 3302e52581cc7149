"""PersonalizeUser in chains, as a tool, in graphs and in batches, and what traces show of it."""

import asyncio
import threading
import time
from typing import Any, TypedDict

import pytest
from langchain.agents import create_agent
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.tracers.langchain import LangChainTracer
from langgraph.graph import START, StateGraph
from personal import ROWS, Recorder
from pydantic import BaseModel

from adapter_store import AdapterStore, BackendError
from langchain_cope import PersonalizeResult, PersonalizeUser
from langchain_cope.errors import Cancelled, HistoryError, InputError
from langchain_cope.history import UserHistory, as_history
from langchain_cope.personalization.run import reserved_device
from langchain_cope.tracing import TracedError, TraceUserId, traced_user
from langchain_cope.training.progress import Monitor

REQUEST = {"user_id": "alice", "history": ROWS}
HASHED = traced_user("alice", "hashed")


class InMemory:
    """A history store in memory, of which the first calls may fail."""

    def __init__(self, num_failures: int = 0) -> None:
        self.users: list[str] = []
        self.num_failures = num_failures

    def history(self, user_id: str) -> UserHistory:
        self.users.append(user_id)
        if len(self.users) <= self.num_failures:
            raise BackendError("the database is restarting")
        return as_history(ROWS, user_id=user_id)


def test_it_stands_in_a_chain(personalize: PersonalizeUser) -> None:
    def ask(user: str) -> dict[str, Any]:
        return {"user_id": user, "history": ROWS}

    chain = (
        RunnableLambda(ask)
        | personalize.with_config(run_name="learn")
        | (lambda result: result.version)
    )
    recorder = Recorder()
    version = chain.invoke("alice", {"callbacks": [recorder], "metadata": {"tenant": "blue"}})
    assert AdapterStore(personalize.store).active("alice") == version
    names = {run: name for name, run, _ in recorder.started}
    parents = {name: names.get(parent) for name, _, parent in recorder.started}
    assert parents["learn"] == "RunnableSequence"
    assert parents["sft"] == parents["publish"] == "learn"
    names_in_order = [name for name, _, _ in recorder.started]
    metadata = dict(zip(names_in_order, recorder.metadata, strict=True))
    ours = {"base_model": personalize.model, "gate": "improve", "user_id": "alice"}
    assert {"tenant": "blue", **ours}.items() <= metadata["dpo"].items()


async def test_it_is_mapped_over_users_in_an_asynchronous_chain(
    personalize: PersonalizeUser,
) -> None:
    chain: Runnable[list[str], list[PersonalizeResult]] = (
        RunnableLambda(lambda users: [{"user_id": user, "history": ROWS} for user in users])
        | personalize.map()
    )
    results = await chain.ainvoke(["alice", "bob"])
    assert [(result.user_id, result.published) for result in results] == [
        ("alice", True),
        ("bob", True),
    ]
    assert [result.user_id for result in chain.invoke(["carol", "dave"])] == ["carol", "dave"]


def test_a_retry_starts_again_after_a_passing_failure(personalize: PersonalizeUser) -> None:
    histories = InMemory(num_failures=1)
    retried = personalize.model_copy(update={"history": histories}).with_retry(
        retry_if_exception_type=(BackendError,), wait_exponential_jitter=False
    )
    assert retried.invoke({"user_id": "alice"}).published
    assert histories.users == ["alice", "alice"]
    with pytest.raises(HistoryError):  # for good, and not tried again
        retried.invoke({"user_id": "alice", "history": ROWS[:2]})


def test_an_option_that_does_not_exist_is_refused(personalize: PersonalizeUser) -> None:
    with pytest.raises(TypeError, match="stop"):
        personalize.invoke(REQUEST, stop=threading.Event())


def test_the_user_comes_from_the_config_where_the_request_names_none(
    personalize: PersonalizeUser,
) -> None:
    config: RunnableConfig = {"configurable": {"user_id": "alice"}}
    assert personalize.invoke({"history": ROWS}, config).user_id == "alice"
    with pytest.raises(InputError, match="names the user 'bob', but the config the user 'alice'"):
        personalize.invoke({"user_id": "bob", "history": ROWS}, config)
    with pytest.raises(InputError, match="user_id is 3, expected a string"):
        personalize.invoke({"history": ROWS}, {"configurable": {"user_id": 3}})
    with pytest.raises(InputError, match="no user was named"):
        personalize.invoke({"history": ROWS})


def test_an_unauthorized_caller_is_refused_before_anything_is_read(
    personalize: PersonalizeUser,
) -> None:
    def only_oneself(user: str, config: RunnableConfig) -> None:
        if user != config["configurable"].get("session_user"):
            raise PermissionError(f"not for {user}")

    histories, recorder = InMemory(), Recorder()
    guarded = personalize.model_copy(update={"authorize": only_oneself, "history": histories})
    config: RunnableConfig = {"configurable": {"session_user": "alice"}, "callbacks": [recorder]}
    with pytest.raises(PermissionError, match="not for bob"):
        guarded.invoke({"user_id": "bob"}, config)
    assert (histories.users, recorder.started) == ([], [])
    assert guarded.invoke({"user_id": "alice"}, config).published


def test_a_tool_takes_a_request_and_tells_without_quoting(personalize: PersonalizeUser) -> None:
    tool = personalize.as_tool()
    assert tool.name == "personalize_user"
    assert set(tool.args) == {"user_id", "history", "instruction"}
    message = tool.invoke({"name": tool.name, "args": REQUEST, "id": "1", "type": "tool_call"})
    assert isinstance(message, ToolMessage)
    version = AdapterStore(personalize.store).active("alice")
    assert str(message.content).startswith(
        f"published version {version} for 'alice': 2 of 2 newest texts are likelier"
    )
    assert "fox" not in str(message.content)
    assert personalize.as_tool(name="learn", description="Learns.").description == "Learns."


async def test_a_tool_works_asynchronously_and_its_result_holds_no_text(
    personalize: PersonalizeUser,
) -> None:
    result = await personalize.as_tool().ainvoke(REQUEST)
    assert result.published
    assert result.samples == []


class Nothing(BaseModel):
    """Takes no arguments: the user and the texts are known."""


class Scripted(GenericFakeChatModel):
    """A model that says what the test wrote."""

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self


def calling(tool: str, **arguments: Any) -> Scripted:
    call = {"name": tool, "args": arguments, "id": "1"}
    return Scripted(messages=iter([AIMessage("", tool_calls=[call]), AIMessage("Done.")]))


def test_an_agent_personalizes_the_user_of_the_config(personalize: PersonalizeUser) -> None:
    tool = personalize.model_copy(update={"history": InMemory()}).as_tool(Nothing)
    agent = create_agent(calling(tool.name), [tool])
    config: RunnableConfig = {"configurable": {"user_id": "alice"}}
    chunks = list(agent.stream({"messages": "learn"}, config, stream_mode=["custom", "values"]))
    (reply,) = [m for m in chunks[-1][1]["messages"] if isinstance(m, ToolMessage)]
    assert reply.content.startswith("published version")
    assert {chunk["user_id"] for mode, chunk in chunks if mode == "custom"} == {"alice"}
    assert AdapterStore(personalize.store).active("alice") is not None


def test_a_model_cannot_name_another_user_than_the_config(personalize: PersonalizeUser) -> None:
    tool = personalize.as_tool()
    agent = create_agent(calling(tool.name, user_id="bob", history=ROWS), [tool])
    with pytest.raises(InputError, match="'bob'"):
        agent.invoke({"messages": "learn"}, {"configurable": {"user_id": "alice"}})
    assert AdapterStore(personalize.store).active("bob") is None


class State(TypedDict, total=False):
    user_id: str
    history: list[Any]
    published: bool
    reason: str


def test_it_is_a_node_and_its_progress_a_custom_stream(personalize: PersonalizeUser) -> None:
    builder = StateGraph(State)
    builder.add_node("learn", personalize)
    builder.add_edge(START, "learn")
    chunks = list(builder.compile().stream(REQUEST, stream_mode=["custom", "values"]))
    events = [chunk for mode, chunk in chunks if mode == "custom"]
    stages = list(dict.fromkeys(chunk["stage"] for chunk in events))
    assert stages == ["sft", "negatives", "dpo", "evaluate"]
    assert {(chunk["event"], chunk["user_id"]) for chunk in events} == {("cope.progress", "alice")}
    assert [chunk["step"] for chunk in events if chunk["stage"] == "sft"][-1] == 6
    assert chunks[-1][1]["published"]
    assert "likelier with it than with the base" in chunks[-1][1]["reason"]


async def test_progress_of_a_node_function_is_streamed_asynchronously(
    personalize: PersonalizeUser,
) -> None:
    async def learn(state: State) -> State:
        result = await personalize.ainvoke(
            {"user_id": state["user_id"], "history": state["history"]}
        )
        return {"published": result.published}

    builder = StateGraph(State)
    builder.add_node("learn", learn)
    builder.add_edge(START, "learn")
    stages = [
        chunk["stage"] async for chunk in builder.compile().astream(REQUEST, stream_mode="custom")
    ]
    assert list(dict.fromkeys(stages)) == ["sft", "negatives", "dpo", "evaluate"]


def test_a_batch_is_one_after_another_and_says_who_failed(personalize: PersonalizeUser) -> None:
    under_way: list[int] = []

    class Watch(Recorder):
        def on_chain_start(self, serialized: Any, inputs: Any, **kwargs: Any) -> None:
            super().on_chain_start(serialized, inputs, **kwargs)
            if kwargs.get("name") == "sft":
                under_way.append(len(self.started) - len(self.outputs) - len(self.errors))

    requests: list[Any] = [
        REQUEST,
        {"user_id": "bob", "history": ROWS[:3]},
        {"user_id": "carol", "history": ROWS},
    ]
    config: RunnableConfig = {"callbacks": [Watch()], "max_concurrency": 3}
    alice, bob, carol = personalize.batch(requests, config, return_exceptions=True)
    assert (alice.published, carol.published) == (True, True)
    assert isinstance(bob, HistoryError)
    assert under_way == [2, 2]  # a run and its stage: never two users' at once
    assert personalize.batch([]) == []


def test_a_failure_ends_a_batch_before_the_next_user(personalize: PersonalizeUser) -> None:
    requests: list[Any] = [{"user_id": "bob", "history": ROWS[:3]}, REQUEST]
    with pytest.raises(HistoryError):
        personalize.batch(requests)
    assert AdapterStore(personalize.store).active("alice") is None


def test_results_of_a_batch_come_one_by_one_with_a_config_each(
    personalize: PersonalizeUser,
) -> None:
    configs: list[RunnableConfig] = [
        {"configurable": {"user_id": user}} for user in ("alice", "bob")
    ]
    done: list[str] = []
    for index, result in personalize.batch_as_completed([{"history": ROWS}] * 2, configs):
        bob_waits = AdapterStore(personalize.store).active("bob") is None
        done.append(f"{index} {result.user_id} {bob_waits}")
    assert done == ["0 alice True", "1 bob False"]


async def test_a_cancelled_abatch_stops_the_training_and_starts_no_other(
    personalize: PersonalizeUser,
) -> None:
    requests: list[Any] = [{"user_id": user, "history": ROWS} for user in ("alice", "bob", "carol")]
    at_bob = asyncio.Event()
    loop = asyncio.get_running_loop()

    class Listener(Recorder):
        def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
            if data["user_id"] == "bob":
                loop.call_soon_threadsafe(at_bob.set)

    task = asyncio.create_task(personalize.abatch(requests, {"callbacks": [Listener()]}))
    await asyncio.wait_for(at_bob.wait(), 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    store = AdapterStore(personalize.store)
    assert store.active("alice") is not None
    assert (store.active("bob"), store.active("carol")) == (None, None)
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("cope-personalize")]


async def test_trainings_on_one_device_wait_for_each_other(
    personalize: PersonalizeUser,
) -> None:
    spans: dict[str, list[float]] = {}

    class Spans(Recorder):
        def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
            spans.setdefault(data["user_id"], []).append(time.monotonic())

    requests = [{"user_id": user, "history": ROWS} for user in ("alice", "bob")]
    await asyncio.gather(
        *[personalize.ainvoke(request, {"callbacks": [Spans()]}) for request in requests]
    )
    first, second = sorted(spans.values())
    assert max(first) < min(second)


def test_a_stop_event_is_heard_before_and_while_training(personalize: PersonalizeUser) -> None:
    stop = threading.Event()

    class Stop(Recorder):
        def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
            super().on_custom_event(name, data)
            stop.set()

    recorder = Stop()
    with pytest.raises(Cancelled, match="'sft'"):
        personalize.bind(stop_event=stop).invoke(REQUEST, {"callbacks": [recorder]})
    assert len(recorder.progress) == 1
    with pytest.raises(Cancelled, match="before 'history'"):
        personalize.invoke(REQUEST, stop_event=stop)
    assert AdapterStore(personalize.store).active("alice") is None


def test_a_stop_event_is_heard_while_waiting_for_another_training(
    personalize: PersonalizeUser,
) -> None:
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    waiting = pytest.raises(Cancelled, match="waiting for another training")
    with reserved_device("cpu", Monitor()), waiting:
        personalize.invoke(REQUEST, stop_event=stop)


class Client:
    """Where a LangSmith tracer sends its runs: kept here."""

    def __init__(self) -> None:
        self.runs: list[Any] = []

    def create_run(self, *arguments: Any, **run: Any) -> None:
        self.runs.append(run)

    update_run = create_run


def trace_of(chain: PersonalizeUser, config: RunnableConfig | None) -> str:
    """All that a callback handler and a LangSmith tracer are told, as text."""
    recorder, client = Recorder(), Client()
    tracer = LangChainTracer(client=client)  # type: ignore[arg-type]
    callbacks: RunnableConfig = {"callbacks": [recorder, tracer]}
    chain.invoke(REQUEST, {**(config or {}), **callbacks})
    assert recorder.started
    assert client.runs
    return f"{vars(recorder)} {client.runs}"


@pytest.mark.parametrize(
    "config", [None, {"configurable": {"user_id": "alice"}}, {"metadata": {"user_id": "alice"}}]
)
def test_a_trace_holds_no_text_and_the_user_as_asked(
    personalize: PersonalizeUser, config: RunnableConfig | None
) -> None:
    plain, hashed, omitted = (
        trace_of(personalize.model_copy(update={"trace_user_id": how}), config)
        for how in ("plain", "hashed", "omitted")
    )
    assert not [
        trace for trace in (plain, hashed, omitted) if "fox" in trace or "Headline" in trace
    ]
    assert "alice" in plain
    assert "alice" not in hashed
    assert str(HASHED) in hashed
    assert "alice" not in omitted
    assert str(HASHED) not in omitted
    assert "'num_history_rows': 10" in omitted


@pytest.mark.parametrize("how", ["hashed", "omitted"])
def test_an_error_that_names_the_user_is_traced_by_its_class(
    personalize: PersonalizeUser, how: TraceUserId
) -> None:
    cause = ValueError("a cause")

    class Broken:
        def history(self, user_id: str) -> UserHistory:
            raise HistoryError(f"the history of {user_id} is unreadable") from cause

    recorder = Recorder()
    chain = personalize.model_copy(update={"trace_user_id": how, "history": Broken()})
    with pytest.raises(HistoryError, match="history of alice is unreadable") as raised:
        chain.invoke({"user_id": "alice"}, {"callbacks": [recorder]})
    assert raised.value.__cause__ is cause
    assert len(recorder.errors) == 2  # the stage, and the whole
    for error in recorder.errors:
        assert isinstance(error, TracedError)
        assert "HistoryError" in str(error)
        assert "alice" not in str(error)


def test_samples_can_be_left_out_of_the_result(personalize: PersonalizeUser) -> None:
    result = personalize.model_copy(update={"samples": False}).invoke(REQUEST)
    assert result.published
    assert "fox" not in result.model_dump_json()
