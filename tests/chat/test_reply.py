"""Replies taken apart while they come: however a text falls into pieces, one message comes out."""

import json
from typing import Any

import pytest
from langchain_core.messages import AIMessageChunk
from tiny import CHATML, NO_SYSTEM, THINKS_FIRST, TOOLS, make_tokenizer

from langchain_cope.chat.reply import ReplyStream
from langchain_cope.engine.base.reply_format import reply_format_of


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return reply_format_of(make_tokenizer(tmp_path_factory.mktemp("t"))).template


def message(
    template: dict[str, Any], pieces: list[str], prefix: str = "", with_calls: bool = True
) -> AIMessageChunk:
    stream = ReplyStream(template, prefix=prefix, with_calls=with_calls)
    chunks = [chunk for piece in pieces for chunk in stream.push(piece)] + stream.finish()
    return sum(chunks, AIMessageChunk(content=""))  # type: ignore[return-value]


def facts(message: AIMessageChunk) -> tuple[Any, ...]:
    return (
        message.content,
        message.additional_kwargs.get("reasoning_content"),
        [(call["name"], call["args"]) for call in message.tool_calls],
        [call["args"] for call in message.invalid_tool_calls],
    )


def call(name: str, arguments: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


ADD = call("add", {"a": 1, "b": [2, {"c": '}"</x>'}]})
PARSED = ("add", {"a": 1, "b": [2, {"c": '}"</x>'}]})
REPLIES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "text": ("Just text < more <tool", ("Just text < more <tool", None, [], [])),
    "a thought": ("<think>\nHm.\n</think>\n\nYes.", ("Yes.", "\nHm.\n", [], [])),
    "a call": (ADD, ("", None, [PARSED], [])),
    "text, then two calls": (
        f"Let me see.\n{ADD}\n{call('noop', {})}",
        ("Let me see.\n", None, [PARSED, ("noop", {})], []),
    ),
    "another order": (
        '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>',
        ("", None, [("add", {"a": 1})], []),
    ),
    "named parameters": (
        '<tool_call>{"name": "add", "parameters": {"a": 1}}</tool_call>',
        ("", None, [("add", {"a": 1})], []),
    ),
    "no JSON": ("<tool_call>\nadd(1, 2)\n</tool_call>", ("", None, [], ["add(1, 2)]"])),
    "cut in the arguments": (
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b"',
        ("", None, [], ['{"a": 1, "b"]']),
    ),
    "cut in a string": (
        '<tool_call>\n{"name": "add", "arguments": {"a": "xy',
        ("", None, [], ['{"a": "xy"]']),
    ),
    "cut in a list": (
        '<tool_call>\n{"name": "add", "arguments": {"a": [1',
        ("", None, [], ['{"a": [1}']),
    ),
    "cut after the arguments": (
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}',
        ("", None, [("add", {"a": 1})], []),
    ),
    "text after a call": (
        f"{ADD}\nHello there.\n\nBye",
        ("Hello there.\n\nBye", None, [PARSED], []),
    ),
    "a mark in a string": (
        f"{call('f', {'a': 'x </tool_call> y', 'b': '<'})}\n{ADD} so",
        ("so", None, [("f", {"a": "x </tool_call> y", "b": "<"}), PARSED], []),
    ),
    "a mark in a string, cut": (
        '<tool_call>\n{"name": "f", "arguments": {"a": "x</tool_call>y',
        ("", None, [], ['{"a": "x</tool_call>y"]']),
    ),
    "cut before the arguments": (
        '<tool_call>\n{"name": "ad',
        ("", None, [], ['{"name": "ad"]']),
    ),
}


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_in_pieces_makes_the_message_it_makes_as_a_whole(
    name: str, template: dict[str, Any]
) -> None:
    text, expected = REPLIES[name]
    assert facts(message(template, [text])) == expected
    assert facts(message(template, list(text))) == expected
    for size in (2, 3, 7):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert facts(message(template, pieces)) == expected


def test_a_call_streams_name_and_id_first_then_pieces_of_arguments(
    template: dict[str, Any],
) -> None:
    stream = ReplyStream(template, prefix="", with_calls=True)
    chunks = [chunk for character in ADD for chunk in stream.push(character)] + stream.finish()
    pieces = [piece for chunk in chunks for piece in chunk.tool_call_chunks]
    assert (pieces[0]["name"], pieces[0]["args"]) == ("add", "")
    assert pieces[0]["id"]
    assert len(pieces) > 10
    assert all(
        piece["name"] is None and piece["id"] is None and piece["index"] == 0
        for piece in pieces[1:]
    )
    assert json.loads("".join(piece["args"] or "" for piece in pieces)) == PARSED[1]


def test_a_thought_is_a_reasoning_block_and_may_begin_in_the_prompt(
    template: dict[str, Any],
) -> None:
    reply = message(template, ["Hm.", "</think>", "\n\nYes."], prefix="<think>")
    assert facts(reply)[:2] == ("Yes.", "Hm.")
    assert [block["type"] for block in reply.content_blocks] == ["reasoning", "text"]


def test_without_tools_the_marks_of_a_call_are_text(template: dict[str, Any]) -> None:
    assert message(template, [ADD], with_calls=False).content == ADD


@pytest.mark.parametrize(
    ("chat_template", "native"),
    [(CHATML, False), (TOOLS, True), (NO_SYSTEM, False), (THINKS_FIRST, False)],
)
def test_the_format_is_found_in_the_chat_template(
    chat_template: str, native: bool, tmp_path: Any
) -> None:
    assert reply_format_of(make_tokenizer(tmp_path, template=chat_template)).native_tools is native


def test_a_response_template_of_the_tokenizers_own_comes_first(tmp_path: Any) -> None:
    tokenizer = make_tokenizer(tmp_path, template=TOOLS)
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {"thinking": {"open": "[THINK]", "close": "[/THINK]"}, "content": {}},
    }
    reply_format = reply_format_of(tokenizer)
    assert not reply_format.native_tools
    assert reply_format.uses("[THINK]")
    reply = message(reply_format.template, [f"[THINK]a[/THINK]b{ADD}"])
    assert facts(reply) == ("b", "a", [PARSED], [])


def test_an_answer_that_is_held_is_taken_as_it_is(template: dict[str, Any]) -> None:
    stream = ReplyStream(template, prefix="", with_calls=False, whole=True)
    text = '{"tag": "<think>x</think> <tool_call>"}'
    chunks = [chunk for character in text for chunk in stream.push(character)] + stream.finish()
    assert "".join(str(chunk.content) for chunk in chunks) == text


def test_formats_that_trl_knows_are_taken_from_it(tmp_path: Any) -> None:
    from trl.chat_template_utils import gptoss_chat_template, qwen3_chat_template

    assert reply_format_of(make_tokenizer(tmp_path, template=qwen3_chat_template)).native_tools
    reply_format = reply_format_of(make_tokenizer(tmp_path, template=gptoss_chat_template))
    assert reply_format.uses("<|channel|>")
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    )
    assert facts(message(reply_format.template, [text]))[:2] == ("Yes.", "Hm.")
