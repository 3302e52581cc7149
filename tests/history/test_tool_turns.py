"""Calls of tools and their results in a history: context of what the assistant wrote."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    messages_to_dict,
)
from tiny import CHATML, TOOLS

from langchain_cope.chat.messages import template_messages
from langchain_cope.engine import load_base
from langchain_cope.errors import HistoryError
from langchain_cope.history import ChromaHistory, as_history
from langchain_cope.training.encode import encode, fit

TALK = [
    SystemMessage("Be brief."),
    HumanMessage("Weather in Ulm and Kiel?"),
    AIMessage(
        "I look.",
        tool_calls=[
            {"name": "weather", "args": {"city": "Ulm"}, "id": "1"},
            {"name": "weather", "args": {"city": "Kiel"}, "id": "2"},
        ],
    ),
    ToolMessage("18 degrees", tool_call_id="1", name="weather"),
    ToolMessage("12 degrees", tool_call_id="2", name="weather"),
    AIMessage("Mild in Ulm, fresh in Kiel."),
    HumanMessage("And tomorrow?"),
    AIMessage("The same."),
]


def call(city: str, number: str) -> dict[str, Any]:
    function = {"name": "weather", "arguments": {"city": city}}
    return {"type": "function", "id": number, "function": function}


def turn(role: str, content: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def openai(city: str, number: str) -> dict[str, Any]:
    whole = call(city, number)
    arguments = json.dumps(whole["function"]["arguments"])
    return {**whole, "function": {**whole["function"], "arguments": arguments}}


OPENAI = [
    turn("system", "Be brief."),
    turn("user", "Weather in Ulm and Kiel?"),
    turn("assistant", "I look.", tool_calls=[openai("Ulm", "1"), openai("Kiel", "2")]),
    turn("tool", "18 degrees", tool_call_id="1", name="weather"),
    turn("tool", "12 degrees", tool_call_id="2", name="weather"),
    turn("assistant", "Mild in Ulm, fresh in Kiel."),
    turn("user", "And tomorrow?"),
    turn("assistant", "The same."),
]
PROMPT = [
    *OPENAI[:2],
    turn("assistant", "I look.", tool_calls=[call("Ulm", "1"), call("Kiel", "2")]),
    *OPENAI[3:5],
]


@pytest.mark.parametrize(
    "history",
    [
        [{"messages": OPENAI}],
        [{"messages": TALK}],
        messages_to_dict(TALK),
        [message.model_dump() for message in TALK],
    ],
    ids=["OpenAI", "LangChain", "LangChain's dictionaries", "LangChain's dumps"],
)
def test_calls_and_results_stay_turns_of_their_own(history: list[Any]) -> None:
    read = as_history(history, target="assistant")
    assert [(item.messages, item.completion) for item in read.items] == [
        (PROMPT, "Mild in Ulm, fresh in Kiel."),
        ([*PROMPT, *OPENAI[5:7]], "The same."),
    ]
    assert "turns that call tools, which are context and not learnt: 1" in read.notes
    assert read.items[0].messages == template_messages(TALK[:5]), "what serving is given"


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        (
            turn("assistant", None, function_call={"name": "weather", "arguments": "{}"}),
            turn("function", "18 degrees", name="weather"),
        ),
        (
            {"from": "function_call", "value": '{"name": "weather", "arguments": {}}'},
            {"from": "observation", "value": "18 degrees"},
        ),
    ],
    ids=["OpenAI's older form", "ShareGPT"],
)
def test_older_forms_of_calls_are_read(asked: dict[str, Any], answered: dict[str, Any]) -> None:
    if "role" in asked:
        row = {"messages": [turn("user", "q"), asked, answered, turn("assistant", "a")]}
    else:
        said = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
        row = {"conversations": [said[0], asked, answered, said[1]]}
    (item,) = as_history([row]).items
    function = {"name": "weather", "arguments": {}}
    expected = turn(
        "assistant", "", tool_calls=[{"type": "function", "id": "", "function": function}]
    )
    assert item.messages[:2] == [turn("user", "q"), expected]
    assert (item.messages[2]["role"], item.messages[2]["content"]) == ("tool", "18 degrees")


def test_arguments_that_are_no_json_stay_text() -> None:
    odd = {"id": "1", "function": {"name": "weather", "arguments": "{city"}}
    messages = [
        turn("user", "q"),
        turn("assistant", None, tool_calls=[odd]),
        turn("assistant", "a"),
    ]
    (item,) = as_history([{"messages": messages}]).items
    assert item.messages[1]["tool_calls"][0]["function"]["arguments"] == "{city"


def test_a_call_with_half_a_character_is_refused_with_its_place() -> None:
    odd = {"id": "1", "function": {"name": "weather", "arguments": {"city": "\ud800"}}}
    messages = [
        turn("user", "q"),
        turn("assistant", None, tool_calls=[odd]),
        turn("assistant", "a"),
    ]
    with pytest.raises(HistoryError, match=r"messages\[1\] holds half of a surrogate pair"):
        as_history([{"messages": messages}])


def test_a_conversation_of_calls_alone_is_left_out_with_a_note() -> None:
    only_calls = {"messages": OPENAI[:3]}
    read = as_history([only_calls, {"messages": [turn("user", "q"), turn("assistant", "a")]}])
    assert [item.completion for item in read.items] == ["a"]
    assert "conversations left out, as every turn in them calls tools: 1" in read.notes


def test_chroma_gives_calls_and_results_back(tmp_path: Path) -> None:
    history = ChromaHistory(tmp_path / "chroma")
    history.add("ann", [{"messages": OPENAI}], target="assistant")
    expected = as_history([{"messages": OPENAI}], target="assistant").items
    assert [(item.messages, item.completion) for item in history.fetch("ann")] == [
        (item.messages, item.completion) for item in expected
    ]


def test_a_user_who_is_the_target_sees_neither_calls_nor_results() -> None:
    for item in as_history([{"messages": OPENAI}], target="user").items:
        assert all(message.keys() == {"role", "content"} for message in item.messages)
        assert not any("degrees" in message["content"] for message in item.messages)


@pytest.mark.parametrize("template", [CHATML, TOOLS])
def test_training_reads_calls_as_serving_does(tiny: Callable[..., Path], template: str) -> None:
    base = load_base(tiny("llama", template=template, context=512), device="cpu")
    (item, _) = as_history([{"messages": OPENAI}], target="assistant").items
    prompt, _ = encode(base, item.messages, item.completion)
    served = base.prompt_ids(template_messages(TALK[:5]))
    assert served[: len(prompt)] == prompt
    text = base.tokenizer.decode(prompt)
    assert text.count("<tool_call>\n") == 2 + text.count("Call them with")
    (example,), notes = fit(base, [item], 512, 768)
    assert (example.prompt_ids, notes) == (prompt, [])


@pytest.mark.parametrize(
    "before",
    [
        [HumanMessage([{"type": "text", "text": "Weather "}, {"type": "text", "text": "in Ulm?"}])],
        [HumanMessage(["Weather ", {"type": "text", "text": "in Ulm?"}])],
        [HumanMessage([{"type": "text-plain", "text": "Ulm?", "mime_type": "text/plain"}])],
        [HumanMessage("a"), AIMessage([{"type": "refusal", "refusal": "No."}]), HumanMessage("b")],
        [*TALK[:3], ToolMessage("no such city", tool_call_id="1", status="error")],
        [*TALK[:3], ToolMessage([{"type": "text", "text": "x"}], tool_call_id="1", status="error")],
    ],
    ids=["parts", "strings", "plain text", "refusal", "error", "error in parts"],
)
@pytest.mark.parametrize("dumped", [list, messages_to_dict])
def test_a_message_is_learnt_as_the_text_that_a_chat_reads(
    tiny: Callable[..., Path], before: list[Any], dumped: Callable[[list[Any]], Any]
) -> None:
    base = load_base(str(tiny(template=TOOLS)))
    row = {"messages": dumped([*before, AIMessage("Mild.")])}
    (*_, item) = as_history([row], target="assistant").items
    prompt, _ = encode(base, item.messages, item.completion)
    assert prompt == base.prompt_ids(template_messages(before))[: len(prompt)]
    assert item.completion == "Mild."
