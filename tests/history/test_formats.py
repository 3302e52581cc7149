"""Every format is recognised by its fields, named, and read as what its makers meant."""

import json
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.load import dumpd
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    messages_to_dict,
)
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers import BaseTracer, Run

from langchain_cope.errors import HistoryError
from langchain_cope.history import Item, UserHistory, as_history, files, formats, read_history
from langchain_cope.history.reader import MESSAGE_INSTRUCTION, TEXT_INSTRUCTION


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def completions(history: UserHistory) -> list[str]:
    return [item.completion for item in history.items]


def contents(history: UserHistory) -> list[tuple[Any, str, tuple[str, ...]]]:
    return [(item.prompt, item.completion, item.rejected) for item in history.items]


SAID = [HumanMessage("hello"), AIMessage("hi"), HumanMessage("bye")]
FIRST = [user(MESSAGE_INSTRUCTION)]
LOG = [
    (MESSAGE_INSTRUCTION, "hello", ()),
    ([*FIRST, assistant("hello"), user("hi")], "bye", ()),
]


def chatgpt(*path: tuple[str, Any], **more: Any) -> dict[str, Any]:
    """A conversation of an export: a root without a message, then a node a (role, content)."""
    mapping: dict[str, Any] = {
        "root": {"id": "root", "message": None, "parent": None, "children": ["n0"]}
    }
    for number, (role, content) in enumerate(path):
        parts = (
            content if isinstance(content, dict) else {"content_type": "text", "parts": [content]}
        )
        message = {
            "author": {"role": role},
            "content": parts,
            "weight": 1.0,
            "recipient": "all",
            "metadata": {},
        }
        parent = f"n{number - 1}" if number else "root"
        mapping[f"n{number}"] = {
            "id": f"n{number}",
            "message": message,
            "parent": parent,
            "children": [],
        }
    last = f"n{len(path) - 1}" if path else "root"
    return {
        "title": "t",
        "create_time": 1717142400.25,
        "mapping": mapping,
        "current_node": last,
        "id": "c1",
        **more,
    }


# One row of every format, its name, and what is learnt from it.
FORMATS = [
    ("prompt and completion", {"prompt": "q", "completion": "a"}, [("q", "a", ())]),
    (
        "prompt and completion",
        {"prompt": [user("q")], "completion": [assistant("a")]},
        [([user("q")], "a", ())],
    ),
    ("plain text", {"text": "a"}, [(TEXT_INSTRUCTION, "a", ())]),
    (
        "OpenAI messages",
        {"messages": [user("q"), assistant("a")], "tools": []},
        [([user("q")], "a", ())],
    ),
    (
        "OpenAI preference pairs",
        {
            "input": {"messages": [user("q")], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [assistant("better")],
            "non_preferred_output": [assistant("worse")],
        },
        [([user("q")], "better", ("worse",))],
    ),
    (
        "chosen and rejected",
        {"prompt": "q", "chosen": "better", "rejected": "worse"},
        [("q", "better", ("worse",))],
    ),
    (
        "chosen and rejected",
        {"prompt": [user("q")], "chosen": [assistant("better")], "rejected": [assistant("worse")]},
        [([user("q")], "better", ("worse",))],
    ),
    (
        "chosen and rejected",
        {"chosen": [user("q"), assistant("better")], "rejected": [user("q"), assistant("worse")]},
        [([user("q")], "better", ("worse",))],
    ),
    (
        "chosen and rejected",
        {
            "prompt": "q",
            "chosen": [user("q"), assistant("better")],
            "rejected": [user("q"), assistant("worse")],
            "messages": [user("q"), assistant("better")],
            "score_chosen": 9.5,
        },
        [([user("q")], "better", ("worse",))],
    ),
    (
        "ShareGPT",
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": "{}"},
                {"from": "observation", "value": "18 degrees"},
                {"from": "gpt", "value": "a"},
            ]
        },
        [
            (
                [
                    {"role": "system", "content": "s"},
                    user("q"),
                    {"role": "tool", "content": "18 degrees", "tool_call_id": ""},
                ],
                "a",
                (),
            )
        ],
    ),
    (
        "Alpaca",
        {"instruction": "do", "input": "it", "output": "a", "text": "###"},
        [("do\n\nit", "a", ())],
    ),
    ("Alpaca", {"instruction": "do", "input": "", "output": "a"}, [("do", "a", ())]),
    (
        "Alpaca",
        {"instruction": "do", "output": "a", "system": "s", "history": [["q", "r"]]},
        [([{"role": "system", "content": "s"}, user("q"), assistant("r"), user("do")], "a", ())],
    ),
    ("LangChain messages", {"messages": messages_to_dict(SAID)}, LOG),
    ("LangChain messages", {"messages": [message.model_dump() for message in SAID]}, LOG),
    ("LangChain messages", {"messages": [dumpd(message) for message in SAID]}, LOG),
    (
        "ChatGPT export",
        chatgpt(("system", ""), ("user", "hello"), ("assistant", "hi"), ("user", "bye")),
        LOG,
    ),
    (
        "LaMP profile",
        {"user_id": "ann", "profile": [{"input": "q", "output": "a"}]},
        [("q", "a", ())],
    ),
    ("feedback", {"prompt": "q", "answer": "a", "score": 1}, [("q", "a", ())]),
    (
        "feedback",
        {"prompt": "q", "answer": "a", "score": None, "correction": "b"},
        [("q", "b", ("a",))],
    ),
]


@pytest.mark.parametrize(("name", "row", "expected"), FORMATS, ids=range(len(FORMATS)))
def test_every_format_is_read_from_a_line_a_list_and_memory(
    tmp_path: Path, name: str, row: dict[str, Any], expected: list[Any]
) -> None:
    line, listed = tmp_path / "user.jsonl", tmp_path / "user.json"
    line.write_text(json.dumps(row))
    listed.write_text(json.dumps([row], indent=1))
    for history in (
        read_history(line, user_id="ann"),
        read_history(listed, user_id="ann"),
        as_history([row]),
    ):
        assert contents(history) == expected
        assert history.formats == {name: 1}
        assert as_history(history.items).items == history.items


def test_several_formats_in_one_file_are_counted() -> None:
    rows = [row for _, row, _ in FORMATS if "user_id" not in row]
    history = as_history(rows, target="user")
    assert sum(history.formats.values()) == len(rows)
    assert history.formats["chosen and rejected"] == 4
    assert (history.num_pairs, history.target) == (2, "user"), "pairs that say the same are one"


def test_an_unknown_row_is_refused_with_the_fields_of_every_format() -> None:
    with pytest.raises(HistoryError) as caught:
        as_history([{"question": "q"}])
    assert str(caught.value) == (
        "history[0]: no text to learn from: expected the keys text, or prompt and completion, "
        "or messages, or conversations, or inputs, outputs and score, "
        "or inputs, outputs and correction, or prompt, answer and score, "
        "or prompt, answer and correction, or prompt, chosen and rejected, "
        "or input, preferred_output and non_preferred_output, or instruction and output, "
        "or user_id and profile, or mapping, or user_id and history; found 'question'"
    )
    for kind in formats.FORMATS:
        assert all(key in str(caught.value) for key in kind.keys), kind.name


# What a row says beside its format


@pytest.mark.parametrize("key", ["system", "system_prompt", "systemPrompt", "system_instructions"])
@pytest.mark.parametrize(("name", "row", "expected"), FORMATS, ids=range(len(FORMATS)))
def test_a_system_prompt_beside_a_row_leads_in_every_format(
    name: str, row: dict[str, Any], expected: list[Any], key: str
) -> None:
    led = as_history([{**row, key: "Answer like a pirate."}])
    plain = as_history([row])
    assert len(led.items) == len(plain.items) == len(expected)
    for item, before in zip(led.items, plain.items, strict=True):
        first, *others = item.messages
        texts = first["content"].split("\n\n")
        assert first["role"] == "system"
        assert "Answer like a pirate." in texts, name
        kept = [message for message in before.messages if message["role"] != "system"]
        assert others == kept
        assert (item.completion, item.rejected) == (before.completion, before.rejected)
    assert not [note for note in led.notes if "not read" in note]


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        ("Be kind.", "Be kind."),
        ([{"text": "Be"}, {"type": "text", "text": " kind."}], "Be kind."),
        ({"role": "system", "content": "Be kind."}, "Be kind."),
        ("", None),
        (None, None),
    ],
)
def test_a_system_prompt_may_be_text_parts_or_a_message(system: Any, expected: str | None) -> None:
    row = {"messages": [user("q"), assistant("a")], "system": system}
    (item,) = as_history([row]).items
    first = item.messages[0]
    assert first == ({"role": "system", "content": expected} if expected else user("q"))


def test_the_same_system_prompt_is_not_said_twice() -> None:
    said = {"role": "system", "content": "Be kind."}
    row = {"messages": [said, user("q"), assistant("a")], "system": "Be kind."}
    assert as_history([row]).items[0].messages == [said, user("q")]
    both = {"prompt": "q", "completion": "a", "system": "Be kind.", "system_prompt": "Be brief."}
    assert as_history([both]).items[0].messages[0]["content"] == "Be kind.\n\nBe brief."


def test_a_system_prompt_of_a_line_leads_in_all_its_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "a"}, {"text": "b", "system": "Be brief."}]
    line = {"user_id": "ann", "system": "Be kind.", "history": rows, "persona": "old"}
    path = tmp_path / "users.jsonl"
    path.write_text(json.dumps({**line, "queries": [{"prompt": "r", "completion": "c"}]}))
    history = read_history(path)
    said = [item.messages[0]["content"] for item in [*history.items, *history.queries]]
    assert said == ["Be kind.", "Be brief.", "Be kind."]
    assert "fields with text that are not read, and their rows: 'persona' (1)" in history.notes
    lamp = {"user_id": "ann", "profile": [{"input": "q", "output": "a"}], "system": "Be kind."}
    lamp |= {"query": {"input": "r", "gold": "c"}}
    (item, query) = [*(read := as_history([lamp])).items, *read.queries]
    assert item.messages[0] == query.messages[0] == {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize("value", ["be a pirate", ["a"], {"b": {"c": "d"}}])
def test_fields_with_text_that_nobody_reads_are_named(value: Any) -> None:
    quiet = {"tools": [], "score_chosen": 9.5, "prompt_id": "x1", "blank": " ", "id": "7"}
    rows = [{"messages": [user("q"), assistant("a")], **quiet}, {"text": "b", "style": value}]
    history = as_history([*rows, {"text": "c", "style": value, "tone": "x"}])
    assert (
        "fields with text that are not read, and their rows: 'style' (2), 'tone' (1)"
        in history.notes
    )


# Targets


@pytest.mark.parametrize(
    ("row", "target"),
    [
        ({"messages": [user("q"), assistant("a")]}, "assistant"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "assistant",
        ),
        ({"messages": messages_to_dict(SAID)}, "user"),
        (chatgpt(("user", "q"), ("assistant", "a")), "user"),
    ],
)
def test_the_usual_target_is_noted_and_the_other_can_be_asked_for(
    row: dict[str, Any], target: str
) -> None:
    usual = as_history([row])
    other = "user" if target == "assistant" else "assistant"
    assert usual.target == target
    assert usual.notes[0].startswith(f"the {target}'s turns are learnt, as is usual for ")
    assert usual.notes[0].endswith(f"--target {other}")
    asked = as_history([row], target=other)  # type: ignore[arg-type]
    assert asked.target == other
    assert not any("as is usual" in note for note in asked.notes)
    assert {item.completion for item in asked.items}.isdisjoint(
        item.completion for item in usual.items
    )


def test_formats_of_both_targets_need_a_target() -> None:
    rows = [
        {"messages": [user("q"), assistant("a")]},
        chatgpt(("user", "hello"), ("assistant", "hi")),
    ]
    with pytest.raises(
        HistoryError,
        match=r"history\[0\] \(OpenAI messages: usually the assistant's\) and history\[1\]",
    ):
        as_history(rows)
    assert completions(as_history(rows, target="user")) == ["q", "hello"]
    assert completions(as_history(rows, target="assistant")) == ["a", "hi"]


def test_prompts_with_completions_have_no_target() -> None:
    history = as_history([{"prompt": "q", "completion": "a"}], target="user")
    assert (history.target, contents(history)) == (None, [("q", "a", ())])


# Weights


def test_turns_of_weight_zero_are_context_and_not_learnt() -> None:
    messages = [
        user("a"),
        assistant("b", weight=0),
        user("c"),
        assistant("d", weight=1),
        user("e"),
        assistant("f"),
    ]
    history = as_history([{"messages": messages}])
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    assert contents(history) == [(plain[:3], "d", ()), (plain[:5], "f", ())]
    assert "turns of weight 0, which are context and not learnt: 1" in history.notes


def test_a_turn_joined_from_two_is_learnt_only_where_both_are() -> None:
    row = {
        "messages": [user("a"), assistant("b", weight=0), assistant("c"), user("d"), assistant("e")]
    }
    assert completions(as_history([row])) == ["e"]


def test_a_row_of_weight_zero_is_not_learnt() -> None:
    rows = [{"prompt": "p", "completion": "c", "weight": weight} for weight in (0, 1, None, 0.0)]
    assert completions(as_history(rows)) == ["c"]
    history = as_history([{"messages": [user("a"), assistant("b", weight=0)]}])
    assert (history.items, history.target) == ([], "assistant")


@pytest.mark.parametrize("weight", [0.5, 2, -1, "1", float("nan"), [1]])
def test_any_other_weight_is_refused(weight: object) -> None:
    with pytest.raises(
        HistoryError, match=r"messages\[1\]: the weight is .*; expected 1 \(learnt\) or 0"
    ):
        as_history([{"messages": [user("a"), assistant("b", weight=weight)]}])
    with pytest.raises(HistoryError, match=r"history\[0\]: the weight is"):
        as_history([{"prompt": "p", "completion": "c", "weight": weight}])


# Pairs


def test_pairs_with_the_same_chosen_answer_become_one_item() -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": text} for text in ("x", "y", "x")]
    history = as_history([*rows, {"prompt": "q", "completion": "a"}])
    assert contents(history) == [("q", "a", ("x", "y"))]
    assert history.num_pairs == 2
    assert history.notes[-1] == "2 exact duplicates removed, 1 item left"


def test_the_prompt_of_a_pair_is_what_its_sides_begin_with() -> None:
    shared = [{"role": "system", "content": "s"}, user("q"), assistant("r"), user("q2")]
    row = {"chosen": [*shared, assistant("better")], "rejected": [*shared, assistant("worse")]}
    assert contents(as_history([row])) == [(shared, "better", ("worse",))]
    more = {"prompt": [user("before"), assistant("so?")], **row}
    more["chosen"], more["rejected"] = (
        [user("q"), assistant("better")],
        [user("q"), assistant("worse")],
    )
    assert contents(as_history([more])) == [
        ([user("before"), assistant("so?"), user("q")], "better", ("worse",))
    ]


def test_a_disliked_answer_is_rejected_for_the_liked_one() -> None:
    rows = [
        {"prompt": "q", "answer": "bad", "score": 0},
        {"prompt": "q", "answer": "worse", "score": False},
        {"prompt": "other", "answer": "bad", "score": -1},
        {"prompt": "q", "answer": "good", "score": True},
        {"prompt": "q", "answer": "no comment", "score": None},
    ]
    history = as_history(rows)
    assert contents(history) == [("q", "good", ("bad", "worse"))]
    assert "disliked answers left out, as no liked one has the same prompt: 1" in history.notes
    assert "rows left out, as nothing in them can be learnt: 1 of 5 (feedback)" in history.notes


@pytest.mark.parametrize(
    ("scores", "expected"), [((1, 0), []), ((0, 1), ["a"]), ((1, 0, 1), ["a"])]
)
def test_the_later_word_on_an_answer_counts(scores: tuple[int, ...], expected: list[str]) -> None:
    rows = [{"prompt": "q", "answer": "a", "score": score} for score in scores]
    assert [(item.completion, item.rejected) for item in as_history(rows).items] == [
        (text, ()) for text in expected
    ]


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        ("edited", ("edited", ("original",))),
        ({"content": "edited"}, ("edited", ("original",))),
        ({"output": "edited"}, ("edited", ("original",))),
        (AIMessage("edited"), ("edited", ("original",))),
        ("original", ("original", ())),
    ],
)
def test_an_edited_answer_is_chosen_and_the_original_rejected(
    correction: object, expected: object
) -> None:
    row = {
        "prompt": [HumanMessage("q")],
        "answer": AIMessage("original"),
        "score": 0,
        "correction": correction,
    }
    (item,) = as_history([row]).items
    assert (item.messages, (item.completion, item.rejected)) == ([user("q")], expected)


class Traces(BaseTracer):
    """Runs as LangSmith gets them."""

    def __init__(self) -> None:
        super().__init__(_schema_format="original+chat")
        self.runs: list[Run] = []

    def _persist_run(self, run: Run) -> None:
        self.runs.append(run)


def test_feedback_on_runs_as_langchain_traces_them() -> None:
    traces = Traces()
    model = GenericFakeChatModel(messages=iter(["first", "second", "third"]))
    model.invoke([SystemMessage("s"), HumanMessage("q")], {"callbacks": [traces]})
    chain = ChatPromptTemplate.from_template("say {x}") | model | StrOutputParser()
    chain.invoke({"x": "it"}, {"callbacks": [traces]})
    RunnableLambda(lambda given: {"messages": [*given["messages"], model.invoke("so?")]}).invoke(
        {"messages": [HumanMessage("agent?")]}, {"callbacks": [traces]}
    )
    rows = [
        {"inputs": run.inputs, "outputs": run.outputs, "score": 0, "correction": "edited"}
        for run in traces.runs
    ]
    history = as_history(rows)
    assert contents(history) == [
        ([{"role": "system", "content": "s"}, user("q")], "edited", ("first",)),
        ("it", "edited", ("second",)),
        ([user("agent?")], "edited", ("third",)),
    ]
    assert history.formats == {"feedback on traced runs": 3}


# LangChain


def test_langchain_messages_are_read_as_objects_and_as_one_list(
    tmp_path: Path,
) -> None:
    messages = [
        SystemMessage("s"),
        HumanMessage(
            [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "x"}}]
        ),
        AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "1"}]),
        ToolMessage("18 degrees", tool_call_id="1"),
        AIMessageChunk("mild"),
        HumanMessage("thanks"),
    ]
    expected = [
        ([{"role": "system", "content": "s"}, *FIRST], "look", ()),
        (
            [{"role": "system", "content": "s"}, *FIRST, assistant("look"), user("mild")],
            "thanks",
            (),
        ),
    ]
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(messages_to_dict(messages)))
    line = tmp_path / "chat.jsonl"
    line.write_text(
        json.dumps(messages_to_dict(messages)) + "\n" + json.dumps(messages_to_dict(SAID))
    )
    assert contents(as_history(messages)) == expected
    assert contents(read_history(path, user_id="ann")) == expected
    both = read_history(line, user_id="ann")
    assert (contents(both), both.formats) == ([*expected, *LOG], {"LangChain messages": 2})


def test_a_log_without_a_target_turn_is_left_out_and_counted() -> None:
    rows = [
        {"messages": messages_to_dict([AIMessage("welcome")])},
        {"messages": messages_to_dict(SAID)},
    ]
    rows += [chatgpt(("system", "")), chatgpt(("user", " ")), chatgpt(("user", "hello"), id="c2")]
    history = as_history(rows)
    assert {item.completion for item in history.items} == {"hello", "bye"}
    assert (
        "rows left out, as nothing in them can be learnt: 1 of 2 (LangChain messages)"
        in history.notes
    )
    assert (
        "rows left out, as nothing in them can be learnt: 2 of 3 (ChatGPT export)" in history.notes
    )


def test_a_message_that_stands_alone_is_refused_with_a_hint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(user("hello")))
    with pytest.raises(
        HistoryError,
        match=r"log\.jsonl:1: no text .* found 'role', 'content'; a message alone is not a row",
    ):
        read_history(path, user_id="ann")


# ChatGPT's export


def test_an_export_is_read_along_the_branch_that_the_user_saw_last() -> None:
    row = chatgpt(("user", "first try"), ("assistant", "no"))
    row["mapping"]["edited"] = {
        "message": row["mapping"]["n0"]["message"] | {"content": _text("edited")},
        "parent": "root",
    }
    row["mapping"]["answer"] = {
        "message": row["mapping"]["n1"]["message"] | {"content": _text("yes")},
        "parent": "edited",
    }
    row["current_node"] = "answer"
    assert completions(as_history([row])) == ["edited"]
    assert completions(as_history([row], target="assistant")) == ["yes"]
    (item,) = as_history([row]).items
    assert (item.conversation, item.created_at) == (
        "c1",
        datetime(2024, 5, 31, 8, 0, 0, 250_000, tzinfo=UTC),
    )


def test_only_what_user_and_assistant_said_is_read_from_an_export() -> None:
    parts = {
        "content_type": "multimodal_text",
        "parts": [{"content_type": "image_asset_pointer"}, "what is this?"],
    }
    row = chatgpt(
        ("user", {"content_type": "user_editable_context", "user_profile": "I am Ann"}),
        ("user", parts),
        ("assistant", {"content_type": "thoughts", "thoughts": []}),
        ("assistant", {"content_type": "code", "text": "look()"}),
        ("tool", "a cat"),
        ("assistant", "A cat."),
        ("user", "hidden"),
        ("user", "thanks"),
    )
    row["mapping"]["n3"]["message"]["recipient"] = "python"
    row["mapping"]["n6"]["message"]["metadata"]["is_visually_hidden_from_conversation"] = True
    history = as_history([row])
    assert completions(history) == ["what is this?", "thanks"]
    assert (
        "parts of conversations left out: settings (1), image (1), thoughts (1), "
        "code for a tool (1), tool output (1), hidden message (1)"
    ) in history.notes
    (answer,) = as_history([row], target="assistant").items
    assert (answer.prompt, answer.completion) == ([user("what is this?")], "A cat.")


def _voice(text: str, direction: str = "in") -> dict[str, Any]:
    transcript = {"content_type": "audio_transcription", "text": text, "direction": direction}
    sound = {"content_type": "audio_asset_pointer", "asset_pointer": "x"}
    return {"content_type": "multimodal_text", "parts": [transcript, sound]}


IMAGE = {"content_type": "multimodal_text", "parts": [{"content_type": "image_asset_pointer"}]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("hello", "hello"),
        (_voice("hello"), "hello"),
        ({"content_type": "code", "language": "python", "text": "hello"}, "hello"),
        ({"content_type": "execution_output", "text": "hello"}, "hello"),
        ({"content_type": "tether_quote", "url": "x", "title": "t", "text": "hello"}, "hello"),
        ({"content_type": "new_kind", "text": "hello"}, "hello"),
        ({"content_type": "new_kind", "parts": ["hel", {"text": "lo"}]}, "hel\nlo"),
        ({"content_type": "multimodal_text", "parts": [None, "hello", {"a": 1}]}, "hello"),
    ],
)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_every_part_with_text_that_one_side_said_is_read(
    content: Any, text: str, role: Any
) -> None:
    other = "assistant" if role == "user" else "user"
    row = chatgpt((other, "before"), (role, content), (other, "after"))
    assert completions(as_history([row], target=role)) == [text]
    assert completions(as_history([row], target=other)) == ["before", "after"]


# (who, what it is made of, the recipient); the marks are what stands where nothing was read
LOST: list[tuple[list[tuple[str, Any]], list[tuple[str, str]], list[str]]] = [
    (
        [("user", "a"), ("assistant", IMAGE), ("user", "b"), ("assistant", "c")],
        [("user", "a"), ("assistant", "[image]"), ("user", "b"), ("assistant", "c")],
        ["c"],
    ),
    (
        [("user", "a"), ("tool", IMAGE), ("user", "b"), ("assistant", "c")],
        [("user", "a"), ("assistant", "[tool output]"), ("user", "b"), ("assistant", "c")],
        ["c"],
    ),
    (
        [("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c")],
        [("user", "a"), ("assistant", "[nothing]"), ("user", "b"), ("assistant", "c")],
        ["c"],
    ),
    (
        [("user", "a"), ("assistant", "b"), ("user", IMAGE), ("assistant", "c"), ("user", "d")],
        [("user", "a"), ("assistant", "b"), ("user", "[image]"), ("assistant", "c"), ("user", "d")],
        ["b"],
    ),
    (
        [("user", IMAGE), ("assistant", "a"), ("user", "b"), ("assistant", "c")],
        [("user", "[image]"), ("assistant", "a"), ("user", "b"), ("assistant", "c")],
        ["c"],
    ),
    (
        [("user", "a"), ("assistant", "b"), ("tool", "out"), ("assistant", "c")],
        [("user", "a"), ("assistant", "b\n\nc")],
        ["b\n\nc"],
    ),
]


@pytest.mark.parametrize(("path", "shown", "learnt"), LOST)
def test_turns_are_not_joined_over_one_without_text(
    path: Any, shown: list[tuple[str, str]], learnt: list[str]
) -> None:
    row = chatgpt(*path)
    texts = [text for role, text in shown if role == "user" and not text.startswith("[")]
    assert completions(as_history([row])) == texts
    assert completions(as_history([row], target="assistant")) == learnt
    last = as_history([row], target=shown[-1][0]).items[-1]  # type: ignore[arg-type]
    assert [message["content"] for message in last.messages][-len(shown) + 1 :] == [
        text for _, text in shown[:-1]
    ]


def _odd(**change: Any) -> dict[str, Any]:
    return {**chatgpt(("user", "q"), ("assistant", "a"), id="odd"), **change}


def _odd_content(content: Any) -> dict[str, Any]:
    row = _odd()
    row["mapping"]["n0"]["message"]["content"] = content
    return row


ODD: list[Any] = [
    _odd(current_node=None),
    _odd(current_node="n9"),
    _odd(mapping=None),
    _odd(mapping={}),
    _odd(mapping=[]),
    _odd(mapping={"n1": {"message": None, "parent": "gone"}}),
    _odd(mapping={"n1": {"message": None, "parent": "n1"}}),
    _odd(mapping={"n1": None}),
    _odd(create_time="then"),
    _odd(create_time=float("nan")),
    _odd(create_time=10**30),
    _odd(id=[1]),
    _odd_content({"content_type": "text", "parts": None}),
    _odd_content({"content_type": "text", "parts": ["half \ud83d"]}),
    _odd_content({"content_type": "text", "parts": [5]}),
    _odd_content(None),
    {"title": "no mapping", "create_time": 1},
    {},
    None,
    "text",
]


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_an_odd_conversation_is_passed_over_and_counted(tmp_path: Path, odd: Any) -> None:
    rows = [odd, chatgpt(("user", "hello")), odd, chatgpt(("user", "bye"), id="c2")]
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps(rows))
    history = read_history(path, user_id="ann")
    assert completions(history) == ["hello", "bye"]
    assert history.formats == {"ChatGPT export": 4}
    (note,) = [note for note in history.notes if "passed over" in note]
    assert note.startswith(
        "conversations passed over, as they cannot be read: 2 of 4 (ChatGPT export); the first: "
    )
    assert f"{path}[0]" in note


def test_an_export_of_odd_conversations_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps(rows := [row for row in ODD if row and "mapping" in row]))
    with pytest.raises(HistoryError, match=r"conversations\.json\[0\]: a mapping without curr"):
        read_history(path, user_id="ann")
    path.write_text(json.dumps([*rows, {"prompt": "p", "completion": "c"}]))
    with pytest.raises(HistoryError, match=r"conversations\.json\[0\]: a mapping without curr"):
        read_history(path, user_id="ann")


# The times are those of conversations, or of their first messages.
@pytest.mark.parametrize(
    "times",
    [
        [(5, None), (4, None), (3, None), (2, None)],
        [(5, None), (None, None), (3, None), (2, None)],
        [(None, None), (4, None), (3, None), (2, None)],
        [(5, None), (4, None), (3, None), (None, None)],
        [(5, None), (None, None), (None, None), (2, None)],
        [(None, 5), (None, 4), (None, 3), (None, 2)],
        [(None, 5), (4, 9), (None, None), (2, 1)],
        [(2, None), (None, 5), (3, None), (None, 4)],
    ],
)
def test_a_newest_first_export_is_ordered_by_what_times_there_are(times: Any) -> None:
    rows = []
    for number, (own, first) in enumerate(times):
        row = chatgpt(("user", f"{number}a"), ("assistant", "hm"), ("user", f"{number}b"))
        row |= {"create_time": own and 1.7e9 + own, "id": f"c{number}"}
        if first:
            row["mapping"]["n0"]["message"]["create_time"] = 1.7e9 + first
        rows.append(row)
    expected = [3, 2, 1, 0] if times[0] != (2, None) else [0, 2, 3, 1]
    assert completions(as_history(rows)) == [f"{n}{side}" for n in expected for side in "ab"]


def test_a_conversation_has_the_time_of_its_first_message() -> None:
    newer = {"messages": [user("q", created_at=2024), assistant("newer")]}
    older = {"conversations": [{"from": "human", "value": "q", "timestamp": 2023}]}
    older["conversations"].append({"from": "gpt", "value": "older"})
    history = as_history([newer, older])
    assert completions(history) == ["older", "newer"]
    assert all(item.created_at for item in history.items)


def test_a_long_conversation_is_followed_to_its_root() -> None:
    row = chatgpt(
        *[("user", f"u{n}") if n % 2 == 0 else ("assistant", f"a{n}") for n in range(3_000)]
    )
    assert len(as_history([row]).items) == 1_500


@pytest.mark.parametrize("target", ["user", "assistant"])
def test_a_prompt_holds_the_newest_turns_of_a_very_long_conversation(target: str) -> None:
    messages = [user(f"u{n}") if n % 2 == 0 else assistant(f"a{n}") for n in range(3_000)]
    history = as_history([{"messages": messages}], target=target)  # type: ignore[arg-type]
    assert len(history.items) == 1_500
    assert max(len(item.messages) for item in history.items) == 199
    last = history.items[-1].messages
    assert (len(last), last[0]["role"], last[-1]["role"]) == (199, "user", "user")
    assert last[-1]["content"] == ("a2997" if target == "user" else "u2998")
    assert any(
        note.startswith("prompts that hold only the newest 199 turns") for note in history.notes
    )


def test_tens_of_thousands_of_turns_of_one_role_are_read() -> None:
    one_side = [user("x" * 100) for _ in range(30_000)]
    (item,) = as_history([{"messages": [*one_side, assistant("a")]}]).items
    assert len(item.messages[0]["content"]) == 102 * 30_000 - 2
    systems = [
        message
        for n in range(3_000)
        for message in ({"role": "system", "content": "s"}, user("q"), assistant(f"{n}"))
    ]
    last = as_history([{"messages": systems}]).items[-1]
    assert last.messages[0]["content"] == "\n\n".join("s" * 199)


def _text(text: str) -> dict[str, Any]:
    return {"content_type": "text", "parts": [text]}


def _without(row: dict[str, Any], *path: str) -> dict[str, Any]:
    copied = json.loads(json.dumps(row))
    inner = copied
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return copied  # type: ignore[no-any-return]


SOUND = chatgpt(("user", "q"), ("assistant", "a"))
CIRCLE = chatgpt(("user", "q"), ("assistant", "a"))
CIRCLE["mapping"]["n0"]["parent"] = "n1"
SELF = chatgpt(("user", "q"))
SELF["mapping"]["n0"]["parent"] = "n0"
DEEP: Any = "x"
for _ in range(200):
    DEEP = [DEEP]

BAD_ROWS: list[tuple[Any, str]] = [
    (CIRCLE, r"mapping goes round in a circle at 'n1'; expected parents that lead to a root"),
    (SELF, r"mapping goes round in a circle at 'n0'"),
    (
        _without(SOUND, "mapping", "n0"),
        r"the parent of 'n1' is 'n0', which is not one of the 2 nodes in mapping",
    ),
    (_without(SOUND, "current_node"), r"a mapping without current_node; expected the name of"),
    ({**SOUND, "current_node": "n9"}, r"current_node is 'n9', which is not one of the 3 nodes"),
    ({**SOUND, "current_node": 5}, r"current_node is 5, which is not one of"),
    ({**SOUND, "current_node": DEEP}, r"current_node is \[\[.*, which is not one of"),
    ({**SOUND, "mapping": []}, r"mapping: expected an object with named fields, found list"),
    (
        {**SOUND, "mapping": {"n1": 5}},
        r"mapping\['n1'\]: expected an object with named fields, found int",
    ),
    (
        _without(SOUND, "mapping", "n0", "message", "author"),
        r"mapping\['n0'\]: message: author: expected an object",
    ),
    (
        _without(SOUND, "mapping", "n0", "message", "content"),
        r"mapping\['n0'\]: message: content: expected an object",
    ),
    (
        _without(SOUND, "mapping", "n0", "message", "content", "parts"),
        r"mapping\['n0'\]: the content's parts are None",
    ),
    ({**SOUND, "create_time": "then"}, r"the time is 'then'"),
    (
        {"input": "q", "preferred_output": [], "non_preferred_output": []},
        r"input: expected an object",
    ),
    (
        {"input": {}, "preferred_output": [], "non_preferred_output": []},
        r"input must hold messages; found none",
    ),
    (
        {
            "input": {"messages": [user("q")]},
            "preferred_output": [],
            "non_preferred_output": [assistant("a")],
        },
        r"preferred_output is blank",
    ),
    (
        {
            "input": {"messages": [user("q")]},
            "preferred_output": [user("b")],
            "non_preferred_output": [assistant("a")],
        },
        r"preferred_output\[0\] has the role 'user'; expected one answer, of the assistant",
    ),
    (
        {"input": {"messages": [user("q")]}, "preferred_output": [assistant("b")]},
        r"no text to learn from",
    ),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, r"chosen and rejected are the same"),
    ({"prompt": "q", "chosen": " ", "rejected": "a"}, r"chosen is blank"),
    ({"prompt": "q", "chosen": "a", "rejected": None}, r"rejected must be text, not NoneType"),
    ({"chosen": "a", "rejected": "b"}, r"chosen and rejected without prompt"),
    (
        {"prompt": [user("q"), assistant("r")], "chosen": "a", "rejected": "b"},
        r"prompt ends in an assistant turn",
    ),
    (
        {
            "chosen": [user("q"), assistant("a"), user("so")],
            "rejected": [user("q"), assistant("b")],
        },
        r"chosen\[1\] has the role 'user'; expected one answer",
    ),
    (
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("a")]},
        r"chosen and rejected are the same",
    ),
    ({"prompt": "q", "completion": "a", "rejected": [5]}, r"rejected\[0\] must be text, not int"),
    (
        {"prompt": "q", "completion": "a", "rejected": {"a": 1}},
        r"rejected must be a list of texts, not dict",
    ),
    ({"conversations": "q"}, r"messages must be a list, not str"),
    (
        {"conversations": [{"from": "alien", "value": "q"}]},
        r"messages\[0\] has the role 'alien'; known roles",
    ),
    (
        {"conversations": [{"from": "human"}, {"from": "gpt"}]},
        r"no assistant turn with text in messages",
    ),
    ({"messages": [{"type": "alien", "content": "q"}]}, r"messages\[0\] has the role 'alien'"),
    (
        {"messages": [{"type": "human", "data": {"content": DEEP}}]},
        r"messages\[0\]: content\[0\]: expected an object",
    ),
    (
        {"messages": [user("q"), assistant("a", weight=DEEP)]},
        r"messages\[1\]: the weight is \[\[.*\.\.\.",
    ),
    ({"messages": [{"role": DEEP, "content": "q"}]}, r"messages\[0\] has the role \[\[.*\.\.\."),
    ({"instruction": "q", "output": ""}, r"output is blank"),
    ({"instruction": 5, "output": "a"}, r"instruction must be text, not int"),
    (
        {"instruction": "q", "output": "a", "history": [["q"]]},
        r"history\[0\] is \['q'\]; expected \[instruction, output\]",
    ),
    (
        {"prompt": "q", "answer": "a", "score": 0.4},
        r"the score is 0\.4; expected 1 or true \(liked\)",
    ),
    ({"prompt": "q", "answer": "a", "score": 3}, r"the score is 3; expected"),
    ({"prompt": "q", "answer": "a", "score": "up"}, r"the score is 'up'; expected"),
    ({"prompt": "q", "answer": "", "score": 1}, r"answer is blank"),
    ({"prompt": "", "answer": "a", "score": 1}, r"feedback without prompt"),
    (
        {"prompt": "q", "answer": "a", "correction": {"x": "1", "y": "2"}},
        r"correction must be a text or hold one; found 'x'",
    ),
    (
        {"inputs": {"a": 1, "b": 2}, "outputs": {"o": "x"}, "score": 1},
        r"inputs must hold messages, or one text",
    ),
    (
        {"inputs": {"a": "q"}, "outputs": [], "score": 1},
        r"outputs: expected an object with named fields, found list",
    ),
    (
        {"inputs": {"a": "q"}, "outputs": {"generations": []}, "score": 1},
        r"outputs: generations: expected an object",
    ),
    ({"text": 5}, r"text must be text, not int"),
    ([1, 2], r"expected an object with named fields, found list"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_row_is_named_with_what_was_found(tmp_path: Path, row: object, message: str) -> None:
    path = tmp_path / "user.jsonl"
    path.write_text(json.dumps({"prompt": "p", "completion": "c"}) + "\n" + json.dumps(row))
    with pytest.raises(HistoryError, match=rf"user\.jsonl:2: {message}"):
        read_history(path, user_id="ann")


KEYS = st.sampled_from([
    "prompt", "completion", "chosen", "rejected", "messages", "conversations", "mapping", "profile",
    "current_node", "parent", "instruction", "input", "output", "preferred_output", "answer",
    "non_preferred_output", "score", "correction", "text", "role", "content", "from", "value",
    "type", "data", "weight", "message", "author", "parts", "history", "queries", "user_id",
    "created_at", "conversation", "a",
])  # fmt: skip
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.floats()
    | st.sampled_from(["user", "ai", "human", "a", "", " "]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(row=st.dictionaries(KEYS, VALUES, max_size=6))
def test_any_row_is_read_or_refused(row: dict[str, Any]) -> None:
    with suppress(HistoryError):
        assert all(item.completion.strip() and item.messages for item in as_history([row]).items)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value in a row."""
    children: Any = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    for key, child in children:
        yield (*path, key)
        yield from _paths(child, (*path, key))


@settings(max_examples=400, deadline=None)
@given(
    data=st.data(),
    sound=st.sampled_from([row for _, row, _ in FORMATS]),
    target=st.sampled_from([None, "user"]),
)
def test_a_sound_row_with_any_value_anywhere_is_read_or_refused(
    data: Any, sound: Any, target: Any
) -> None:
    row = json.loads(json.dumps(sound))
    *path, last = data.draw(st.sampled_from(list(_paths(row))))
    inner = row
    for key in path:
        inner = inner[key]
    inner[last] = data.draw(VALUES)
    with suppress(HistoryError):
        assert all(
            item.completion.strip() and item.messages
            for item in as_history([row], target=target).items
        )


@pytest.mark.parametrize("depth", [200, 900, 960, 985])
def test_a_row_nested_at_the_limit_is_refused_with_its_line(tmp_path: Path, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    message = f'[{{"role": "assistant", "content": {deep}}}]'
    path = tmp_path / "user.jsonl"
    for row in (
        f'{{"messages": {message}}}',
        f'{{"chosen": {message}, "rejected": {message}}}',
        f'{{"prompt": {deep}, "answer": "a", "score": 1}}',
        f'{{"prompt": "q", "answer": "a", "score": {deep}}}',
        f'{{"mapping": {{"a": {deep}}}, "current_node": "a"}}',
        f'{{"messages": [{{"type": "human", "content": {deep}}}]}}',
    ):
        path.write_text(row)
        with pytest.raises(HistoryError, match=r"user\.jsonl:1: "):
            read_history(path, user_id="ann")


# Hostile files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"PK\x03\x04rest",
            r"user\.jsonl:1: not UTF-8 but a ZIP archive; unpack it .* conversations\.json",
        ),
        (b"\x1f\x8brest", "compressed with gzip; unpack it"),
        (b"PAR1rest", "a Parquet file"),
        ('{"prompt": "p"}'.encode("utf-16"), "not UTF-8 but UTF-16; save the file as UTF-8"),
        (
            '\n{"prompt": "p"}'.encode("utf-16-le"),
            r"user\.jsonl:2: not text but binary, or UTF-16 without its mark",
        ),
        (b'{"text": "a"}\n{"text": "b\0"}', r"user\.jsonl:2: not text but binary"),
        (b'{"text": "a"}\n\n{"text": "\xe4"}', r"user\.jsonl:3: not UTF-8 but another encoding"),
    ],
)
def test_a_file_that_is_not_text_is_named_for_what_it_is(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "user.jsonl"
    path.write_bytes(content)
    with pytest.raises(HistoryError, match=message):
        read_history(path, user_id="ann")


def test_a_huge_line_and_a_huge_file_are_refused_with_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_LINE", 1_000)
    path = tmp_path / "user.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "b" * 1_000}))
    with pytest.raises(
        HistoryError, match=r"user\.jsonl:2: a line of 1,012 characters; expected at most 1,000"
    ):
        read_history(path, user_id="ann")
    monkeypatch.setattr(files, "MAX_FILE", 1 << 20)
    path.write_text("x" * (1 << 20) + "y")
    with pytest.raises(
        HistoryError, match=r"user\.jsonl: larger than the 1 MiB that are read at once"
    ):
        read_history(path, user_id="ann")


@pytest.mark.parametrize(
    "nested", ['{"messages": ' + "[" * 100_000, "[" * 5_000 + "]" * 5_000, '{"a":' * 50_000]
)
def test_a_file_nested_too_deeply_is_refused(tmp_path: Path, nested: str) -> None:
    for name in ("user.jsonl", "user.json"):
        path = tmp_path / name
        path.write_text(nested)
        with pytest.raises(HistoryError, match=r"user\.jsonl?(:1)?: "):
            read_history(path, user_id="ann")


def test_items_can_be_rows_again(tmp_path: Path) -> None:
    item = Item(
        prompt=[user("q")],
        completion="a",
        rejected=("b", "c"),
        created_at=datetime(2024, 1, 1, tzinfo=UTC),
    )
    path = tmp_path / "user.jsonl"
    path.write_text(item.model_dump_json())
    assert read_history(path, user_id="ann").items == [item]
