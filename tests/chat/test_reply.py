"""Replies taken apart while they come: however a text falls into pieces, one message comes out."""

import json
from typing import Any

import pytest
from langchain_core.messages import AIMessageChunk
from tiny import CHATML, NO_SYSTEM, THINKS_FIRST, TOOLS, make_tokenizer

from langchain_cope.chat.reply import message_chunk
from langchain_cope.engine.base.reply_format import reply_format_of
from langchain_cope.engine.reply import ReplyParts, ReplyReader

WITH_CALLS = ReplyParts(calls=True)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return reply_format_of(make_tokenizer(tmp_path_factory.mktemp("t"))).template


def chunks_of(
    template: dict[str, Any],
    pieces: list[str],
    parts: ReplyParts | None = WITH_CALLS,
    *,
    stops: tuple[str, ...] = (),
    cut: bool = False,
) -> list[AIMessageChunk]:
    reader = ReplyReader(template, parts, stops)
    found = [part for piece in pieces for part in reader.push(piece)]
    return [message_chunk(part) for part in [*found, *reader.finish(cut=cut)]]


def message(*args: Any, **options: Any) -> AIMessageChunk:
    return sum(chunks_of(*args, **options), AIMessageChunk(content=""))  # type: ignore[return-value]


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
        ("", None, [], ['{"a": 1}]']),
    ),
    "cut before the end mark": (
        f"{ADD}\n<tool_call>\n" + '{"name": "noop", "arguments": {}}\n</tool_cal',
        ("", None, [PARSED], ["{}]"]),
    ),
    "cut in another order": (
        '<tool_call>{"arguments": {"a": 1}, "name": "add"}',
        ("", None, [], ['{"arguments": {"a": 1}, "name": "add"}]']),
    ),
    "cut in what may be a repeat": (
        f"{ADD}\n{ADD[:60]}",
        ("", None, [PARSED], ['{"a": 1, "b": [2, {]']),
    ),
    "ended by the model without an end mark": (
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}',
        ("", None, [("add", {"a": 1})], []),
    ),
    "arguments that are no JSON": (
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, b: 2}}\n</tool_call>',
        ("", None, [], ['{"a": 1, b: 2}]']),
    ),
    "a name that is no JSON": (
        '<tool_call>\n{"name": "\\x", "arguments": {}}\n</tool_call>',
        ("", None, [], ['{"name": "\\x", "arguments": {}}]']),
    ),
    "both marks in a string": (
        call("f", {"a": "x </tool_call> <tool_call> y"}),
        ("", None, [("f", {"a": "x </tool_call> <tool_call> y"})], []),
    ),
    "text after a call": (
        f"{ADD}\nHello there.\n\nBye",
        ("Hello there.\n\nBye", None, [PARSED], []),
    ),
    "a mark in a string": (
        f"{call('f', {'a': 'x </tool_call> y', 'b': '<'})}\n{ADD} so",
        ("so", None, [("f", {"a": "x </tool_call> y", "b": "<"}), PARSED], []),
    ),
    "cut after a mark in a string": (
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
    for size in (1, 2, 3, 7, len(text)):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert facts(message(template, pieces, cut=name.startswith("cut"))) == expected


CUT = [
    'a "quote", a \\ backslash, a line\nand a tab\t',
    "é 日本 🙂",
    ["\\", '"', {"b\\": {"c": [1, [2.5e10, None, True]]}}],
    "</tool_call> <tool_call> {[",
]


@pytest.mark.parametrize("earlier", ["", call("f", {"a": 1}) + "\n", call("g", {}) + "\n"])
@pytest.mark.parametrize("value", CUT, ids=str)
def test_a_call_cut_at_any_character_is_no_call(
    value: Any, earlier: str, template: dict[str, Any]
) -> None:
    text = call("f", {"a": value, "key \\": 1})
    for end in range(1, len(text)):
        pieces = [earlier, *text[:end]] if end % 2 else [earlier + text[:end]]
        found = message(template, pieces, ReplyParts(False, calls=True, text=False), cut=True)
        assert len(found.tool_calls) == (earlier != ""), text[:end]
        assert [found.content, len(found.invalid_tool_calls)] == ["", 1], text[:end]


ONE, TWO = call("f", {"a": 1}), call("f", {"a": 2})
F1, F2 = ("f", {"a": 1}), ("f", {"a": 2})
REPEATS: dict[str, tuple[str, list[Any]]] = {
    "the same": (f"{ONE}\n{ONE}", [F1]),
    "the same after another": (f"{ONE}\n{TWO}\n{ONE}", [F1, F2]),
    "another order of arguments": (
        call("f", {"a": 1, "b": 2}) + call("f", {"b": 2, "a": 1}),
        [("f", {"a": 1, "b": 2})],
    ),
    "another order of parts": (
        ONE + '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>',
        [F1],
    ),
    "another way to write a number": (ONE + ONE.replace("1", "1.0"), [F1]),
    "another way to write a text": (
        call("f", {"a": "x"}) + call("f", {"a": "x"}).replace("x", "\\u0078"),
        [("f", {"a": "x"})],
    ),
    "white space": (ONE + ONE.replace(": ", ":\n  "), [F1]),
    "with text between them": (f"{ONE} Again: {ONE}", [F1]),
    "no arguments": (call("f", {}) * 2, [("f", {})]),
}
DIFFERENT: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "other arguments": [F1, F2],
    "another tool": [F1, ("g", {"a": 1})],
    "true and 1": [F1, ("f", {"a": True})],
    "a text and a number": [F1, ("f", {"a": "1"})],
    "null and nothing": [("f", {"a": None}), ("f", {})],
    "one more in a list": [("f", {"a": [1]}), ("f", {"a": [1, 1]})],
    "one more argument": [F1, ("f", {"a": 1, "b": 1})],
    "large numbers": [("f", {"a": 2**60}), ("f", {"a": 2**60 + 1})],
}


@pytest.mark.parametrize("name", REPEATS)
def test_a_repeated_call_ends_the_reply(name: str, template: dict[str, Any]) -> None:
    text, calls = REPEATS[name]
    for size in (1, 5, len(text)):
        reader = ReplyReader(template, WITH_CALLS)
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        chunks = [message_chunk(part) for piece in pieces for part in reader.push(piece)]
        assert reader.ended
        assert reader.push(f" more {TWO}") == reader.finish(cut=False) == []
        whole: Any = sum(chunks[1:], chunks[0])
        assert [(call["name"], call["args"]) for call in whole.tool_calls] == calls
        assert reader.num_calls == len(calls)
        assert not whole.invalid_tool_calls
        assert len({piece["index"] for piece in whole.tool_call_chunks}) == len(calls)


@pytest.mark.parametrize("name", DIFFERENT)
def test_calls_that_differ_stay(name: str, template: dict[str, Any]) -> None:
    calls = DIFFERENT[name]
    text = "\n".join(call(*each) for each in calls)
    assert facts(message(template, list(text)))[2] == calls


def test_text_between_marks_that_repeats_ends_the_reply_too(template: dict[str, Any]) -> None:
    text = "<tool_call>\nadd(1, 2)\n</tool_call>\n"
    assert facts(message(template, list(text * 8)))[3] == ["add(1, 2)]"]


STOPPED: dict[str, tuple[str, str, str, tuple[Any, ...]]] = {
    "in the answer": ("Yes. END no", "END", "", ("Yes. ", None, [])),
    "in a thought": (
        "<think>Not END yet</think>\n\nYes. END no",
        "END",
        "",
        ("Yes. ", "Not END yet", []),
    ),
    "in a thought that the prompt opens": (
        "Not END yet</think>Yes. END no",
        "END",
        "<think>",
        ("Yes. ", "Not END yet", []),
    ),
    "in the mark of a thought": ("<think>Hm</think>Yes", "think", "", ("Yes", "Hm", [])),
    "in the white space after a thought": (
        "<think>Hm</think>\n\nYes\nno",
        "\n",
        "",
        ("Yes", "Hm", []),
    ),
    "across the end of a thought": ("<think>Hm EN</think>D Yes", "END", "", ("D Yes", "Hm EN", [])),
    "in a call": (f"{ONE}\n{TWO} Yes", ":", "", ("Yes", None, [F1, F2])),
    "in the marks of a call": (f"So {ONE} Yes", "tool_call", "", ("So Yes", None, [F1])),
    "between two calls": (f"{ONE}\n{TWO}", "\n", "", ("", None, [F1, F2])),
    "across a call": (f"EN{ONE}D Yes", "END", "", ("END Yes", None, [F1])),
    "before a call": (f"So END {ONE}", "END", "", ("So ", None, [])),
    "after a call": (f"{ONE} Yes END no", "END", "", ("Yes ", None, [F1])),
}


@pytest.mark.parametrize("name", STOPPED)
def test_stop_strings_act_on_the_answer_alone(name: str, template: dict[str, Any]) -> None:
    text, stop, opened, expected = STOPPED[name]
    parts = ReplyParts(calls=True, opened=opened)
    for size in (1, 4, len(text)):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert facts(message(template, pieces, parts, stops=(stop,)))[:3] == expected


def test_a_call_streams_name_and_id_first_then_pieces_of_arguments(
    template: dict[str, Any],
) -> None:
    chunks = chunks_of(template, list(ADD))
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
    reply = message(template, ["Hm.", "</think>", "\n\nYes."], ReplyParts(opened="<think>"))
    assert facts(reply)[:2] == ("Yes.", "Hm.")
    assert [block["type"] for block in reply.content_blocks] == ["reasoning", "text"]


def test_without_tools_the_marks_of_a_call_are_text(template: dict[str, Any]) -> None:
    assert message(template, [ADD], ReplyParts()).content == ADD


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
    text = '{"tag": "<think>x</think> <tool_call>"}'
    assert message(template, list(text), None).content == text


def test_formats_that_trl_knows_are_taken_from_it(tmp_path: Any) -> None:
    from trl.chat_template_utils import gptoss_chat_template, qwen3_chat_template

    assert reply_format_of(make_tokenizer(tmp_path, template=qwen3_chat_template)).native_tools
    reply_format = reply_format_of(make_tokenizer(tmp_path, template=gptoss_chat_template))
    assert reply_format.uses("<|channel|>")
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    )
    assert facts(message(reply_format.template, [text]))[:2] == ("Yes.", "Hm.")
