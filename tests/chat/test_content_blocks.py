"""Blocks of any provider in a conversation: what others wrote is read, what was asked has to be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from langchain_cope import ChatCoPe
from langchain_cope.chat.messages import template_messages
from langchain_cope.errors import InputError

DATA = "data:image/png;base64,AAAA"
IMAGES: list[dict[str, Any]] = [
    {"type": "image", "base64": "AAAA", "mime_type": "image/png"},
    {"type": "image_url", "image_url": {"url": DATA}},
    {"type": "input_image", "image_url": DATA},
    {"type": "image", "source": {"type": "base64", "data": "AAAA"}},
    {"image": {"format": "png", "source": {"bytes": b"A"}}},
]
FROM_OTHERS: list[tuple[Any, str]] = [
    ({"type": "output_text", "text": "Ahoy", "annotations": []}, "Ahoy"),
    ({"type": "text", "text": "Ahoy", "index": 0}, "Ahoy"),
    ({"text": "Ahoy"}, "Ahoy"),
    ({"type": "text-plain", "text": "Ahoy", "mime_type": "text/plain"}, "Ahoy"),
    ({"type": "refusal", "refusal": "I will not."}, "I will not."),
    ({"type": "audio", "id": "1", "transcript": "Ahoy"}, "Ahoy"),
    ({"type": "text", "text": None}, ""),
    ({"type": "text"}, ""),
    ({"type": "json", "json": {"a": 1}}, '{"a": 1}'),
    ({"type": "server_tool_use", "id": "1", "name": "web_search", "input": {}}, ""),
    ({"type": "server_tool_call", "id": "1", "name": "web_search", "args": {}}, ""),
    ({"type": "web_search_call", "id": "1", "status": "completed"}, ""),
    ({"type": "mcp_list_tools", "tools": []}, ""),
    ({"type": "thinking", "thinking": "Hm.", "signature": "x"}, ""),
    ({"type": "redacted_thinking", "data": "x"}, ""),
    ({"type": "reasoning", "summary": [], "encrypted_content": "x"}, ""),
    ({"type": "reasoning_content", "reasoning_content": {"text": "Hm."}}, ""),
    ({"type": "tool_use", "id": "1", "name": "f", "input": {}}, ""),
    ({"type": "input_json_delta", "partial_json": "{"}, ""),
    ({"type": "web_search_tool_result", "content": []}, "[web_search_tool_result]"),
    ({"type": "audio", "base64": "AAAA"}, "[audio]"),
    ({"type": "file", "file_id": "1"}, "[file]"),
    ({"type": "media", "mime_type": "image/png", "data": "AAAA"}, "[media]"),
    ({"type": "non_standard", "value": {"type": "image_url", "image_url": DATA}}, "[image]"),
    ({"type": "non_standard", "value": {"type": "output_text", "text": "Ahoy"}}, "Ahoy"),
    ({}, "[empty]"),
    *[(image, "[image]") for image in IMAGES],
]


def by_a_model(block: Any) -> BaseMessage:
    return AIMessage([{"type": "text", "text": "A"}, block, "B"])


def by_a_tool(block: Any) -> BaseMessage:
    return ToolMessage([{"type": "text", "text": "A"}, block, "B"], tool_call_id="1")


def in_a_result(block: Any) -> BaseMessage:
    content = [{"type": "text", "text": "A"}, block, {"type": "text", "text": "B"}]
    return HumanMessage([{"type": "tool_result", "tool_use_id": "1", "content": content}])


def by_an_assistant(block: Any) -> BaseMessage:
    return ChatMessage(role="assistant", content=["A", block, "B"])


@pytest.mark.parametrize("where", [by_a_model, by_a_tool, in_a_result, by_an_assistant])
@pytest.mark.parametrize(("block", "text"), FROM_OTHERS)
def test_what_others_wrote_becomes_text_a_mark_or_nothing(
    block: Any, text: str, where: Callable[[Any], BaseMessage]
) -> None:
    [turn] = template_messages([where(block)])
    assert turn["content"] == f"A{text}B"


@pytest.mark.parametrize("content", [None, "", [], {"type": "text", "text": "hi"}])
def test_a_result_may_have_any_content(content: Any) -> None:
    result = {"type": "tool_result", "tool_use_id": "1", "content": content}
    [turn] = template_messages([HumanMessage([result])])
    assert turn["content"] == ("hi" if content else "")


@pytest.mark.parametrize("kind", [HumanMessage, SystemMessage])
@pytest.mark.parametrize("block", [*IMAGES, {"type": "audio", "base64": "A"}, {"type": "file"}])
def test_what_is_asked_about_has_to_be_text(block: Any, kind: Any) -> None:
    with pytest.raises(InputError, match="the base reads text only"):
        template_messages([kind([{"type": "text", "text": "What is this?"}, block])])


@pytest.mark.parametrize("kind", ["text", "input_text", "text-plain"])
def test_what_is_asked_may_be_text_of_any_kind(kind: str) -> None:
    [turn] = template_messages([HumanMessage([{"type": kind, "text": "Hi"}])])
    assert turn["content"] == "Hi"


def test_a_talk_begun_with_another_model_goes_on(tiny: Callable[..., Path]) -> None:
    chat = ChatCoPe(model=str(tiny("llama")), store="memory://blocks", max_tokens=2)
    talk = [
        HumanMessage("Draw a cat."),
        AIMessage([{"type": "output_text", "text": "Here."}, *IMAGES[:1]]),
        ToolMessage([IMAGES[1]], tool_call_id="1"),
        HumanMessage("Thank you."),
    ]
    assert chat.invoke(talk).usage_metadata
