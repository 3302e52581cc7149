"""Tools as LangChain users bind them: every form, every choice, streamed, and refused if wrong."""

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.runnables import RunnableBinding
from langchain_core.tools import tool
from pydantic import BaseModel, Field
from tiny import NO_SYSTEM, THINKS_FIRST, TOOLS

from langchain_cope import ChatCoPe
from langchain_cope.chat.call import prompt_of
from langchain_cope.chat.messages import template_messages
from langchain_cope.chat.tools import ToolUse
from langchain_cope.engine import load_base
from langchain_cope.errors import InputError


@tool
def weather(city: str, days: int = 1) -> str:
    """The weather in a city."""
    return f"{city}: sun for {days}"


def multiply(a: int, b: int) -> int:
    """Multiply.

    Args:
        a: one
        b: the other
    """
    return a * b


class Search(BaseModel):
    """Search the web."""

    query: str = Field(max_length=40)


class Note(TypedDict):
    """Write a note."""

    text: str


RAW = {"title": "ping", "description": "Ping.", "type": "object", "properties": {}}
ALL = [weather, multiply, Search, Note, RAW]
NAMES = ["weather", "multiply", "Search", "Note", "ping"]


CLOSING = '"]}'
"""Likely for a model whose random JSON is to close."""


def chat_on(folder: Path, **settings: Any) -> ChatCoPe:
    fields = {"max_tokens": 300, "temperature": 1.0, "seed": 0, **settings}
    return ChatCoPe(model=str(folder), store="memory://tools", device="cpu", **fields)


@pytest.fixture(scope="module")
def chat(tiny: Callable[..., Path]) -> ChatCoPe:
    return chat_on(tiny("llama", context=4096, likely=CLOSING))


@pytest.mark.parametrize("template", [None, TOOLS, NO_SYSTEM])
def test_a_forced_call_is_one_of_the_tools_with_arguments_that_fit(
    template: Any, tiny: Callable[..., Path]
) -> None:
    changes = {} if template is None else {"template": template}
    chat = chat_on(tiny("llama", context=4096, likely=CLOSING, **changes), max_tokens=1000)
    for seed in range(6):
        message = chat.bind_tools(ALL, tool_choice="any").invoke("Do something", seed=seed)
        assert not message.invalid_tool_calls
        assert message.tool_calls
        assert {call["name"] for call in message.tool_calls} <= set(NAMES)
        assert message.content == ""
        assert len({call["id"] for call in message.tool_calls}) == len(message.tool_calls)


@pytest.mark.parametrize("choice", ["Search", {"type": "function", "function": {"name": "Search"}}])
def test_a_tool_chosen_by_name_is_the_one_that_is_called(chat: ChatCoPe, choice: Any) -> None:
    bound = chat.bind_tools(ALL, tool_choice=choice, parallel_tool_calls=False)
    message = bound.invoke("Do something")
    assert [call["name"] for call in message.tool_calls] == ["Search"]
    Search.model_validate(message.tool_calls[0]["args"])


@pytest.mark.parametrize("choice", ["required", True])
def test_other_words_for_any(chat: ChatCoPe, choice: Any) -> None:
    assert chat.bind_tools([weather], tool_choice=choice).invoke("Do something").tool_calls


def test_none_calls_no_tool_and_auto_may(chat: ChatCoPe) -> None:
    plain = chat.invoke("Do something")
    assert chat.bind_tools(ALL, tool_choice="none").invoke("Do something").content == plain.content
    assert isinstance(chat.bind_tools(ALL).invoke("Do something"), AIMessage)


def test_calls_stream_name_and_id_first(chat: ChatCoPe) -> None:
    bound = chat.bind_tools([Search], tool_choice="any", parallel_tool_calls=False)
    chunks = list(bound.stream("Do something"))
    pieces = [piece for chunk in chunks for piece in chunk.tool_call_chunks]
    assert (pieces[0]["name"], pieces[0]["args"]) == ("Search", "")
    assert pieces[0]["id"]
    assert len(pieces) > 4
    assert {piece["index"] for piece in pieces} == {0}
    whole: AIMessageChunk = sum(chunks[1:], chunks[0])  # type: ignore[arg-type]
    arguments = "".join(piece["args"] or "" for piece in pieces)
    assert whole.tool_calls[0]["args"] == json.loads(arguments)
    assert whole.chunk_position == "last"


async def test_calls_that_the_budget_cuts_are_invalid_and_whole_ones_stay(chat: ChatCoPe) -> None:
    bound = chat.bind_tools([Search, multiply], tool_choice="any")

    async def ask(seed: int, budget: int) -> AIMessage:
        return await bound.ainvoke("Do something", max_tokens=budget, seed=seed)

    answers = await asyncio.gather(*(ask(seed, 200) for seed in range(16)))
    seed, whole = next(pair for pair in enumerate(answers) if len(whole_calls(pair[1])) > 1)
    size = whole.usage_metadata["output_tokens"]  # type: ignore[index]
    budgets = [*range(1, size, 3), size - 1, size, size + 50]
    messages = await asyncio.gather(*(ask(seed, budget) for budget in budgets))
    for budget, message in zip(budgets, messages, strict=True):
        assert calls_of(message) == calls_of(whole)[: len(message.tool_calls)]
        is_cut = message.response_metadata["finish_reason"] == "length"
        assert is_cut == (budget < size)
        assert is_cut or calls_of(message) == calls_of(whole)
        assert len(message.invalid_tool_calls) <= is_cut
    assert {len(message.tool_calls) for message in messages} >= {0, 1, 2}
    cut = messages[len(messages) // 2]
    chunks = list(bound.stream("Do something", max_tokens=budgets[len(messages) // 2], seed=seed))
    streamed: Any = sum(chunks[1:], chunks[0])
    assert calls_of(streamed) == calls_of(cut)
    assert len(streamed.invalid_tool_calls) == len(cut.invalid_tool_calls)


@pytest.mark.parametrize("choice", ["any", "ping"])
@pytest.mark.parametrize("template", [None, TOOLS])
async def test_a_forced_call_is_not_repeated(
    choice: str, template: str | None, tiny: Callable[..., Path]
) -> None:
    changes = {} if template is None else {"template": template}
    # So hot that every other answer goes on to another call, which can only be the same.
    chat = chat_on(tiny("llama", context=4096, **changes), max_tokens=400, temperature=50.0)
    bound = chat.bind_tools([RAW], tool_choice=choice)
    messages = [bound.invoke("Do", seed=seed) for seed in range(12)]
    messages += bound.batch(["Do"] * 2, seed=3)
    messages += [await bound.ainvoke("Do", seed=3)]
    for seed in range(4):
        chunks = list(bound.stream("Do", seed=seed))
        messages.append(sum(chunks[1:], chunks[0]))  # type: ignore[arg-type]
        assert len([each for chunk in chunks for each in chunk.tool_call_chunks if each["id"]]) == 1
    for message in messages:
        assert calls_of(message) == [("ping", {})]
        assert not message.invalid_tool_calls
        assert message.response_metadata["finish_reason"] == "tool_calls"
    sizes = {message.usage_metadata["output_tokens"] for message in messages}  # type: ignore[index]
    assert max(sizes) > 1.5 * min(sizes), "no repeat was begun"


def whole_calls(message: AIMessage) -> list[Any]:
    return message.tool_calls if message.response_metadata["finish_reason"] == "tool_calls" else []


def calls_of(message: AIMessage) -> list[tuple[str, dict[str, Any]]]:
    return [(call["name"], call["args"]) for call in message.tool_calls]


PARTS_OF_PROMPT = (
    "Be kind.",
    '"multiply"',
    "Search the web.",
    "Weather?",
    '"arguments": {"city": "Kiel"}',
    "Error: sun",
)


def test_the_prompt_tells_the_tools_and_what_they_returned(tiny: Callable[..., Path]) -> None:
    called = AIMessage("", tool_calls=[{"name": "weather", "args": {"city": "Kiel"}, "id": "1"}])
    talk = [
        SystemMessage("Be kind."),
        HumanMessage("Weather?"),
        called,
        ToolMessage("sun", tool_call_id="1", status="error"),
    ]
    for template, native in ((TOOLS, True), (NO_SYSTEM, False)):
        base = load_base(tiny("llama", context=4096, template=template), device="cpu")
        assert base.reply_format.native_tools is native
        prompt, _ = prompt_of(base, talk, ToolUse.of({"tools": ALL}))
        text = base.tokenizer.decode(prompt)
        for part in PARTS_OF_PROMPT:
            assert part in text
        assert ("<tool_response>" in text) is not native


def test_content_blocks_of_other_providers_are_read() -> None:
    blocks = [
        {"type": "thinking", "thinking": "?"},
        {"type": "text", "text": "a"},
        {"type": "tool_use", "id": "1", "name": "f", "input": {}},
    ]
    result = {
        "type": "tool_result",
        "tool_use_id": "1",
        "content": [{"type": "text", "text": "r"}],
        "is_error": True,
    }
    talk = [
        HumanMessage([{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]),
        AIMessage(blocks, tool_calls=[{"name": "f", "args": {}, "id": "1"}]),
        HumanMessage([result]),
    ]
    turns = template_messages(talk)
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool"]
    assert [turn["content"] for turn in turns] == ["hi", "a", "Error: r"]
    with pytest.raises(InputError, match="image"):
        template_messages([HumanMessage([{"type": "image", "url": "x"}])])


def test_thoughts_are_not_answers_and_forced_answers_have_none(
    tiny: Callable[..., Path],
) -> None:
    folder = tiny("llama", context=4096, template=THINKS_FIRST, likely=CLOSING)
    chat = chat_on(folder, max_tokens=40)
    message = chat.invoke("Think")
    assert message.content == ""  # a random model never ends its thought
    assert message.additional_kwargs["reasoning_content"]
    assert message.content_blocks[0]["type"] == "reasoning"
    forced = chat.bind_tools([multiply], tool_choice="any").invoke("Do", max_tokens=200)
    assert forced.tool_calls
    assert "reasoning_content" not in forced.additional_kwargs


@pytest.mark.parametrize("stop", ["e", "<|endoftext|>"])
def test_a_stop_string_ends_no_thought(stop: str, tiny: Callable[..., Path]) -> None:
    folder = tiny("llama", context=4096, template=THINKS_FIRST, likely=CLOSING)
    chat = chat_on(folder, max_tokens=120)
    free, stopped = chat.invoke("Think"), chat.invoke("Think", stop=[stop])
    assert stopped.additional_kwargs == free.additional_kwargs
    assert stopped.usage_metadata == free.usage_metadata
    assert "e" in stopped.additional_kwargs["reasoning_content"]


REASONS = TOOLS.replace("{{ m['content'] }}", "{{ m.KEY or '' }}{{ m['content'] }}")
"""A template that prints a turn's thought under one name."""
STRICT = REASONS.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if m.KEY and m['content'] %}"
    "{{ raise_exception('not both') }}{% endif %}",
)


def called(thought: str, **fields: Any) -> AIMessage:
    calls = [{"name": "weather", "args": {"city": "Kiel"}, "id": "1"}]
    kwargs = {"additional_kwargs": {"reasoning_content": thought}, **fields}
    return AIMessage(**{"content": "", "tool_calls": calls, **kwargs})


def as_block(kind: str, thought: str) -> AIMessage:
    return called("", content=[{"type": kind, kind: thought}], additional_kwargs={})


RESULT = ToolMessage("sun", tool_call_id="1")
ASKED = HumanMessage("Weather?")
RUNNING = [ASKED, called("Hm1."), RESULT, called("Hm2."), RESULT]
THOUGHTS: dict[str, tuple[list[Any], list[str]]] = {
    "the running turn": (RUNNING, ["Hm1.", "Hm2."]),
    "after the next question": ([*RUNNING, AIMessage("Sun."), HumanMessage("And now?")], []),
    "a new running turn": ([*RUNNING, ASKED, called("Hm3."), RESULT], ["Hm3."]),
    "a result in a human message": (
        [ASKED, called("Hm1."), HumanMessage([{"type": "tool_result", "content": "sun"}])],
        ["Hm1."],
    ),
    "a thought in blocks": (
        [ASKED, as_block("reasoning", "Hm1."), RESULT, as_block("thinking", "Hm2."), RESULT],
        ["Hm1.", "Hm2."],
    ),
    "no thought": ([ASKED, called(""), RESULT], []),
}


@pytest.mark.parametrize(
    "template",
    [REASONS, NO_SYSTEM.replace("{{ m['content'] }}", "{{ m.KEY or '' }}{{ m['content'] }}")],
)
@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_of_the_running_turn_are_given_back(
    key: str, template: str, tiny: Callable[..., Path]
) -> None:
    base = load_base(
        tiny("llama", context=4096, template=template.replace("KEY", key)), device="cpu"
    )
    for talk, expected in THOUGHTS.values():
        prompt, _ = prompt_of(base, talk, ToolUse.of({"tools": [weather]}))
        assert re.findall(r"Hm\d\.", base.tokenizer.decode(prompt)) == expected


def test_a_template_that_refuses_a_thought_beside_text_gets_none(tiny: Callable[..., Path]) -> None:
    base = load_base(
        tiny("llama", context=4096, template=STRICT.replace("KEY", "thinking")), device="cpu"
    )
    talk = [ASKED, called("Hm1.", content="Let me see."), RESULT]
    text = base.tokenizer.decode(prompt_of(base, talk, ToolUse.of({"tools": [weather]}))[0])
    assert "Let me see." in text
    assert "Hm1." not in text


def test_tools_count_as_tokens(chat: ChatCoPe) -> None:
    talk = [HumanMessage("Hello")]
    with_tools = chat.get_num_tokens_from_messages(talk, tools=ALL)
    assert with_tools > chat.get_num_tokens_from_messages(talk) + 100
    message = chat.bind_tools(ALL).invoke(talk, max_tokens=1)
    assert message.usage_metadata["input_tokens"] == with_tools  # type: ignore[index]


NOT_A = {"a": {"not": {}}}
ODD = {"title": "odd", "description": "", "type": "object", "properties": NOT_A}


@pytest.mark.parametrize(
    ("tools", "options", "named"),
    [
        ([weather], {"tool_choice": "wether"}, "wether"),
        ([], {"tool_choice": "any"}, "no tools were given"),
        ([ODD], {}, "tool 'odd'.*not"),
        ([weather], {"response_format": "json"}, "response_format"),
        ([{"type": "web_search"}], {}, "only functions can be called"),
        ([{"name": "a\ud800", "description": "", "parameters": {}}], {}, "name"),
        ([weather], {"tool_choice": {"type": "function", "function": "wether"}}, "wether"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_when_it_is_bound(
    chat: ChatCoPe, tools: Any, options: Any, named: str
) -> None:
    with pytest.raises(InputError, match=named):
        chat.bind_tools(tools, **options)


def test_binding_is_lazy_and_keeps_the_user(chat: ChatCoPe) -> None:
    bound = chat.bind_tools(ALL, user_id="alice")
    assert isinstance(bound, RunnableBinding)
    assert bound.kwargs["user_id"] == "alice"
    assert bound.invoke("Do", max_tokens=2).response_metadata["user_id"] == "alice"
