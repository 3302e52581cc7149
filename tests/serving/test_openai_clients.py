"""The clients that people have: OpenAI's own, and LangChain's on top of it."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI
from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel
from serving.conftest import Running

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bonn", "Rome"]}},
            "required": ["city"],
        },
    },
}


class City(BaseModel):
    """A city."""

    city: bool


@pytest.fixture
def client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key=server.keys["alice"], max_retries=0) as client:
        yield client


def chat_openai(server: Running, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{server.url}/v1",
        api_key=server.keys["alice"],  # type: ignore[arg-type]
        model="tiny",
        max_retries=0,
        max_completion_tokens=options.pop("max_completion_tokens", 8),
        **options,
    )


def test_an_answer_parses_strictly_with_openais_models(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=HELLO, max_tokens=6, logprobs=True, n=2, seed=3, temperature=1
    )
    answer = ChatCompletion.model_validate(json.loads(raw.text), strict=False)
    assert ChatCompletion.model_validate_json(raw.text, strict=True) == answer
    assert raw.headers["x-request-id"] == raw.request_id
    assert [choice.index for choice in answer.choices] == [0, 1]
    one, other = answer.choices
    assert one.message.content != other.message.content
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert one.logprobs is not None
    assert one.logprobs.content is not None
    tokens = one.logprobs.content
    assert all(token.logprob <= 0 and token.bytes is not None for token in tokens)
    text = b"".join(bytes(token.bytes or []) for token in tokens).decode(errors="replace")
    assert text.startswith((one.message.content or "").rstrip("�"))
    assert answer.system_fingerprint is not None
    assert answer.system_fingerprint.startswith("fp_")


def test_a_stream_joins_to_the_whole_answer(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "logprobs": True}
    whole = client.chat.completions.create(**asked)
    chunks: list[ChatCompletionChunk] = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    for chunk in chunks:
        ChatCompletionChunk.model_validate_json(chunk.model_dump_json(), strict=True)
    *body, usage = chunks
    assert usage.choices == []
    assert usage.usage == whole.usage
    assert body[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in body)
    assert text == whole.choices[0].message.content
    last = body[-1]
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.model_extra is not None
    assert last.model_extra["cope"] == (whole.model_extra or {})["cope"]
    logprobs = [chunk.choices[0].logprobs for chunk in body]
    streamed = [token for each in logprobs if each for token in each.content or []]
    assert whole.choices[0].logprobs is not None
    expected = whole.choices[0].logprobs.content or []
    assert [token.bytes for token in streamed] == [token.bytes for token in expected]
    assert [token.logprob for token in streamed] == pytest.approx(
        [token.logprob for token in expected], abs=1e-4
    )


def test_n_answers_are_streamed_each_under_its_index(client: OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "messages": HELLO, "max_tokens": 6, "n": 3, "seed": 1, "temperature": 1,
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_a_stop_string_ends_the_answer_before_it(client: OpenAI) -> None:
    free = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=20)
    text = free.choices[0].message.content or ""
    stop = text[4:6]
    held = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=20, stop=stop)
    assert held.choices[0].finish_reason == "stop"
    assert held.choices[0].message.content == text[: text.index(stop)]


def test_tools_are_called_and_their_results_read(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=200, tools=[WEATHER], tool_choice="required",
        parallel_tool_calls=False,
    )  # fmt: skip
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls is not None
    call: Any = message.tool_calls[0]
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Bonn", "Rome")
    told = [
        *HELLO,
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    after = client.chat.completions.create(model="tiny", messages=told, max_tokens=4)
    assert after.usage is not None
    assert answer.usage is not None
    assert after.choices[0].message.content is not None


def test_a_streamed_call_comes_with_its_name_first(client: OpenAI) -> None:
    parts: list[Any] = []
    for chunk in client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=200, tools=[WEATHER], stream=True,
        tool_choice={"type": "function", "function": {"name": "weather"}},
        parallel_tool_calls=False,
    ):  # fmt: skip
        parts += [part for choice in chunk.choices for part in choice.delta.tool_calls or []]
    assert parts[0].function.name == "weather"
    assert parts[0].id
    assert not any(part.id for part in parts[1:])
    assert json.loads("".join(part.function.arguments for part in parts))["city"]


def test_an_answer_is_held_to_a_json_schema(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_tokens=40,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "city", "strict": True, "schema": City.model_json_schema()},
        },
    )
    City.model_validate_json(answer.choices[0].message.content or "")


@pytest.mark.parametrize(
    ("kind", "role", "asked"),
    [
        (openai.AuthenticationError, "cope_nonsense", {}),
        (openai.PermissionDeniedError, "alice", {"user": "bob"}),
        (openai.NotFoundError, "alice", {"model": "gpt-6"}),
        (openai.BadRequestError, "alice", {"presence_penalty": 1.0}),
        (openai.BadRequestError, "alice", {"messages": [{"role": "user", "content": "a " * 2000}]}),
        (openai.BadRequestError, "alice", {"max_tokens": 10**9, "stream": True}),
        (openai.NotFoundError, "alice", {"extra_body": {"cope": {"adapter_version": "none"}}}),
    ],
)
def test_each_refusal_is_an_error_of_its_class(
    kind: type[openai.APIStatusError], role: str, asked: dict[str, Any], server: Running
) -> None:
    key = server.keys.get(role, role)
    with OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
        with pytest.raises(kind) as refused:
            client.chat.completions.create(**{"model": "tiny", "messages": HELLO, **asked})
        assert refused.value.code
        assert refused.value.request_id


def test_other_protocols_are_named_as_not_spoken(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="chat/completions"):
        client.responses.create(model="tiny", input="Hello")


def test_chat_openai_answers_streams_and_counts(server: Running) -> None:
    chat = chat_openai(server, stream_usage=True)
    whole = chat.invoke("Hello")
    chunks = list(chat.stream("Hello"))
    joined = chunks[0]
    for chunk in chunks[1:]:
        joined += chunk
    assert isinstance(whole, AIMessage)
    assert joined.content == whole.content
    assert joined.usage_metadata == whole.usage_metadata
    assert joined.usage_metadata is not None
    assert chat.invoke("Hello", user="alice").content == whole.content
    with pytest.raises(openai.PermissionDeniedError):
        chat.invoke("Hello", user="bob")


def test_chat_openai_binds_tools(server: Running) -> None:
    bound = chat_openai(server, max_completion_tokens=200).bind_tools(
        [WEATHER], tool_choice="weather", parallel_tool_calls=False
    )
    calls = bound.invoke("Hello").tool_calls
    assert [call["name"] for call in calls] == ["weather"]
    assert calls[0]["args"]["city"] in ("Bonn", "Rome")


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_chat_openai_gives_structured_output(method: Any, server: Running) -> None:
    chat = chat_openai(server, max_completion_tokens=200)
    assert isinstance(chat.with_structured_output(City, method=method).invoke("Hello"), City)


def test_the_models_are_listed_to_the_client(client: OpenAI, server: Running) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny:alice"]
    assert client.models.retrieve("tiny:alice").id == "tiny:alice"
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}
