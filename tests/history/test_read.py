"""Files and rows of every format become items; what is wrong is named with file and line."""

import io
import itertools
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_cope.errors import HistoryError
from langchain_cope.history import Item, UserHistory, as_history, read_history, read_users
from langchain_cope.history.reader import MESSAGE_INSTRUCTION, TEXT_INSTRUCTION

EXAMPLE = Path(__file__).parents[2] / "examples" / "data" / "user.jsonl"
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi there"},
    {"role": "user", "content": "what is new?"},
    {"role": "assistant", "content": "nothing much"},
]


def write(folder: Path, *rows: object, name: str = "user.jsonl") -> Path:
    path = folder / name
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows),
        encoding="utf-8",
    )
    return path


def pair(number: int, **more: object) -> dict[str, object]:
    return {"prompt": f"question {number}", "completion": f"answer {number}", **more}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def completions(history: UserHistory) -> list[str]:
    return [item.completion for item in history.items]


# Formats


def test_prompt_and_completion_rows_become_items_in_their_order(tmp_path: Path) -> None:
    history = read_history(write(tmp_path, pair(1), "", pair(2)), user_id="ann")
    assert history.items == [
        Item(prompt="question 1", completion="answer 1"),
        Item(prompt="question 2", completion="answer 2"),
    ]
    assert (history.user_id, history.queries, history.instruction) == ("ann", [], None)
    assert history.notes == ["the items have no created_at: their order is taken as oldest first"]


def test_a_conversation_gives_one_item_for_each_assistant_turn(tmp_path: Path) -> None:
    history = read_history(write(tmp_path, {"messages": CHAT}), user_id="ann")
    assert [(item.prompt, item.completion) for item in history.items] == [
        (CHAT[:2], "hi there"),
        (CHAT[:4], "nothing much"),
    ]
    assert history.instruction is None


def test_with_target_user_the_roles_of_the_prompt_are_swapped(tmp_path: Path) -> None:
    history = read_history(write(tmp_path, {"messages": CHAT}), user_id="ann", target="user")
    system, instruction = turn("system", "Be kind."), turn("user", MESSAGE_INSTRUCTION)
    assert [(item.prompt, item.completion) for item in history.items] == [
        ([system, instruction], "hello"),
        (
            [system, instruction, turn("assistant", "hello"), turn("user", "hi there")],
            "what is new?",
        ),
    ]
    assert history.instruction == MESSAGE_INSTRUCTION
    assert any(MESSAGE_INSTRUCTION in note for note in history.notes)


def test_a_first_user_turn_answers_the_instruction_that_was_given(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, {"messages": CHAT[1:3]})
    history = read_history(path, user_id="ann", target="user", instruction="Say something.")
    assert [(item.prompt, item.completion) for item in history.items] == [
        ("Say something.", "hello")
    ]
    assert history.instruction == "Say something."


def test_an_assistant_that_speaks_first_answers_the_instruction() -> None:
    items = as_history(
        [{"messages": [turn("assistant", "welcome"), turn("user", "hi"), turn("assistant", "so?")]}]
    ).items
    instruction = turn("user", MESSAGE_INSTRUCTION)
    assert [item.messages for item in items] == [
        [instruction],
        [instruction, turn("assistant", "welcome"), turn("user", "hi")],
    ]


@given(
    roles=st.lists(
        st.sampled_from(["system", "user", "assistant", "tool"]), min_size=1, max_size=9
    ),
    target=st.sampled_from(["assistant", "user"]),
)
def test_every_prompt_alternates_and_ends_in_what_is_answered(
    roles: list[str], target: str
) -> None:
    messages = [turn(role, f"text {index}") for index, role in enumerate(roles)]
    if target not in roles:
        with pytest.raises(HistoryError, match=f"no {target} turn"):
            as_history([{"messages": messages}], target=target)
        return
    for item in as_history([{"messages": messages}], target=target).items:
        dialogue = [message["role"] for message in item.messages]
        if dialogue[0] == "system":
            dialogue = dialogue[1:]
        assert dialogue[0] == "user"
        assert dialogue[-1] in ("user", "tool")
        if "tool" not in dialogue:
            assert dialogue == ["user", "assistant"] * (len(dialogue) // 2) + ["user"]
        assert not any(one == other != "tool" for one, other in itertools.pairwise(dialogue))


def test_a_tool_answer_reaches_the_assistant_but_not_the_user() -> None:
    messages = [
        turn("user", "weather?"),
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        turn("tool", "18 degrees"),
        turn("assistant", "It is mild."),
        turn("user", "thanks"),
    ]
    (answer,) = as_history([{"messages": messages}]).items
    assert answer.prompt == [
        turn("user", "weather?"),
        {**turn("tool", "18 degrees"), "tool_call_id": ""},  # its call has no name
    ]
    last = as_history([{"messages": messages}], target="user").items[-1]
    assert last.messages[1:] == [turn("assistant", "weather?"), turn("user", "It is mild.")]


def test_text_parts_are_joined_and_other_parts_counted() -> None:
    parts = [
        {"type": "text", "text": "one"},
        {"type": "image_url", "image_url": {}},
        {"type": "text", "text": " two"},
    ]
    messages = [
        {"role": "user", "content": parts},
        turn("assistant", "fine"),
        turn("developer", "later"),
    ]
    history = as_history([{"messages": messages}])
    assert history.items[0].prompt == [turn("user", "one two")]
    assert "parts of messages left out because they are not text: 1" in history.notes


def test_a_prompt_may_be_messages_and_a_missing_one_gets_the_instruction() -> None:
    history = as_history(
        [
            {"prompt": CHAT[:2], "completion": "a"},
            {"completion": "b"},
            {"prompt": " ", "completion": "c"},
        ]
    )
    assert [item.prompt for item in history.items] == [CHAT[:2], TEXT_INSTRUCTION, TEXT_INSTRUCTION]
    assert history.instruction == TEXT_INSTRUCTION


def test_plain_text_is_one_text_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "first text", "", "  second, with U+2028\u2028inside ", name="posts.TXT")
    history = read_history(path, user_id="ann", target="user")
    assert completions(history) == ["first text", "second, with U+2028\u2028inside"]
    assert {item.prompt for item in history.items} == {TEXT_INSTRUCTION} == {history.instruction}


def test_a_user_a_line_brings_history_and_queries(tmp_path: Path) -> None:
    row = {"user_id": "ann", "history": [pair(1), {"messages": CHAT}], "queries": [pair(9)]}
    history = read_history(write(tmp_path, row))
    assert history.user_id == "ann"
    assert completions(history) == ["answer 1", "hi there", "nothing much"]
    assert [query.completion for query in history.queries] == ["answer 9"]


def test_the_example_user_is_read_whole() -> None:
    history = read_history(EXAMPLE)
    assert (history.user_id, len(history.items), len(history.queries)) == ("robin", 50, 25)
    assert all(
        item.messages[0]["content"].startswith("Generate a headline") for item in history.items
    )


@pytest.mark.parametrize(
    ("entry", "question", "prompt", "completion"),
    [
        ({"text": "t", "category": "c", "title": "h"}, "", "Which category", "c"),
        ({"description": "d", "tag": "comedy"}, "", "Which tag", "comedy"),
        ({"text": "t", "score": 4}, "", "What is the score", "4"),
        (
            {"title": "h", "text": "t"},
            "Generate a headline for",
            "Generate a headline for the following article: t",
            "h",
        ),
        (
            {"title": "h", "text": "t"},
            "a subject for the following email: x",
            "Generate a subject",
            "h",
        ),
        (
            {"title": "h", "abstract": "a"},
            "Generate a title for",
            "Generate a title for the following abstract",
            "h",
        ),
        (
            {"title": "h", "abstract": "a"},
            'Generate an abstract for the title "x"',
            'Generate an abstract for the title "h"',
            "a",
        ),
        (
            {"reviewText": "r", "summary": "s", "description": ["p", "q"], "overall": 5.0},
            "",
            "Generate the review text",
            "r",
        ),
        ({"summary": "s", "content": "c"}, "", "Generate the content for a reddit post s", "c"),
        ({"input": "i", "output": "o"}, "", "i", "o"),
        ({"text": "a tweet"}, "Paraphrase", TEXT_INSTRUCTION, "a tweet"),
    ],
)
def test_lamp_profiles_of_every_task_are_known(
    tmp_path: Path, entry: dict[str, object], question: str, prompt: str, completion: str
) -> None:
    row = {
        "user_id": 7,
        "profile": [{"id": "1", "date": "2017-03", **entry}],
        "query": [{"input": question, "gold": "g"}],
    }
    history = read_history(write(tmp_path, [row], name="lamp.json"))
    (item,) = history.items
    assert isinstance(item.prompt, str)
    assert item.prompt.startswith(prompt)
    assert (history.user_id, item.completion, item.created_at) == (
        "7",
        completion,
        datetime(2017, 3, 1, tzinfo=UTC),
    )
    assert [query.completion for query in history.queries] == ["g"]


def test_a_question_without_its_answer_is_not_a_query(tmp_path: Path) -> None:
    row = {
        "id": "10",
        "input": "Generate a title for x",
        "profile": [{"title": "h", "abstract": "a"}],
    }
    history = read_history(write(tmp_path, row))
    assert (history.user_id, len(history.items), history.queries) == ("10", 1, [])


def test_an_unknown_profile_is_refused_with_its_fields(tmp_path: Path) -> None:
    path = write(tmp_path, {"user_id": "a", "profile": [{"id": 1, "text": "t", "mood": "sad"}]})
    with pytest.raises(
        HistoryError,
        match=r"user\.jsonl:1: profile\[0\]: fields of no known task: 'id', 'text', 'mood'",
    ):
        read_history(path)


def test_a_json_file_may_hold_a_list_an_object_or_lines(tmp_path: Path) -> None:
    as_list = write(tmp_path, json.dumps([pair(1), pair(2)], indent=1), name="a.json")
    as_object = write(
        tmp_path,
        json.dumps({"user_id": "u", "history": [pair(1), pair(2)]}, indent=1),
        name="b.json",
    )
    as_lines = write(tmp_path, pair(1), pair(2), name="c.json")
    for path in (as_list, as_object, as_lines):
        assert completions(read_users(path)[0]) == ["answer 1", "answer 2"]


# Order, duplicates, conversations


def test_items_are_sorted_when_all_have_a_time_in_any_notation() -> None:
    times = [
        "2024-05-31T12:00:00+02:00",
        1717142400,
        "2023",
        "2024-05-31",
        "2024-05-31T10:00:01",
    ]  # 1717142400 = 08:00Z
    history = as_history([pair(number, created_at=time) for number, time in enumerate(times)])
    assert completions(history) == ["answer 2", "answer 3", "answer 1", "answer 0", "answer 4"]
    assert all(
        item.created_at and item.created_at.utcoffset() is not None for item in history.items
    )
    assert history.notes == []


# None is an item without a time; the letters are as the file lists them, newest at the end.
@pytest.mark.parametrize(
    ("years", "expected"),
    [
        ([2024, None], "ab"),
        ([None, 2024], "ab"),
        ([None, None], "ab"),
        ([2021, None, 2023], "abc"),
        ([2023, None, 2021], "cba"),
        ([2023, 2022, None, None, 2020, 2019], "fedcba"),
        ([None, 2022, None, 2020, None], "edcba"),
        ([None, 2020, None, 2022, None], "abcde"),
        ([2024, None, None, 2024], "abcd"),
        ([2020, 2023, 2021, None, 2022], "acdeb"),
    ],
)
def test_items_without_a_time_are_placed_by_their_neighbours(
    years: list[int | None], expected: str
) -> None:
    rows = [
        {"text": letter, **({"created_at": str(year)} if year else {})}
        for letter, year in zip("abcdef", years, strict=False)
    ]
    history = as_history(rows)
    assert "".join(completions(history)) == expected
    num_dated = len(years) - years.count(None)
    if 0 < num_dated < len(years):
        assert history.notes[-1] == (
            f"only {num_dated} of {len(years)} items have created_at: "
            "the others are placed by their neighbours"
        )


def test_a_conversation_without_times_keeps_its_order_in_a_newest_first_list() -> None:
    def said(text: str, year: int | None, conversation: int) -> dict[str, object]:
        return {"text": text, "created_at": year, "conversation": conversation}

    rows = [said("e", 2023, 3), said("c", None, 2), said("d", None, 2), said("a", 2021, 1)]
    assert completions(as_history([*rows, said("b", None, 1)])) == ["a", "b", "c", "d", "e"]


def test_milliseconds_and_datetimes_are_times_too() -> None:
    moment = datetime(2024, 5, 31, 8, tzinfo=UTC)
    naive = moment.replace(tzinfo=None)
    items = as_history(
        [pair(1, created_at=1717142400000), pair(2, created_at=moment), pair(3, date=naive)]
    ).items
    assert {item.created_at for item in items} == {moment}
    assert Item(prompt="p", completion="c", created_at=naive).created_at == moment


def test_of_exact_duplicates_the_oldest_stays_where_it_was() -> None:
    history = as_history([pair(1), pair(2), pair(1), pair(3), pair(1)])
    assert completions(history) == ["answer 1", "answer 2", "answer 3"]
    assert history.notes[-1] == "2 exact duplicates removed, 3 items left"
    dated = as_history([pair(1, created_at="2024"), pair(1, created_at="2020")])
    assert dated.items[0].created_at == datetime(2020, 1, 1, tzinfo=UTC)


def test_only_items_of_one_conversation_share_a_name() -> None:
    other = [turn("user", "bye"), turn("assistant", "see you")]
    items = as_history(
        [{"messages": CHAT}, {"messages": other}, pair(1), pair(2, conversation=5)]
    ).items
    names = [item.conversation for item in items]
    assert names[0] == names[1] is not None
    assert names[2] not in (None, names[0])
    assert names[3:] == [None, "5"]


@pytest.mark.parametrize("order", [1, -1])
def test_a_log_that_repeats_a_conversation_from_its_beginning_is_one_conversation(
    order: int,
) -> None:
    rows = [{"messages": CHAT[:3]}, {"messages": CHAT}][::order]
    history = as_history(rows)
    assert sorted(completions(history)) == ["hi there", "nothing much"]
    assert len({item.conversation for item in history.items}) == 1


def test_a_common_greeting_does_not_join_conversations() -> None:
    greeting = [turn("system", "Be kind."), turn("assistant", "welcome")]
    longer = [
        [*greeting, turn("user", text), turn("assistant", f"re: {text}")] for text in ("a", "b")
    ]
    items = as_history([{"messages": messages} for messages in (greeting, *longer)]).items
    assert len({item.conversation for item in items}) == 3


# Several files, and standard input


def test_several_files_are_ordered_by_their_times(tmp_path: Path) -> None:
    old = write(tmp_path, pair(1, created_at=2020), pair(4, created_at=2023), name="old.jsonl")
    new = write(tmp_path, pair(3, created_at=2022), pair(2, created_at=2021), name="new.json")
    history = read_history(old, new, user_id="ann")
    assert completions(history) == [f"answer {number}" for number in (1, 2, 3, 4)]
    assert history.notes == []


@pytest.mark.parametrize(
    ("order", "expected"),
    [("ntd", "nabcd"), ("dnt", "abcdn"), ("ndt", "nabcd"), ("tn", "bcn"), ("nn", "n")],
)
def test_a_file_without_times_comes_where_it_was_named(
    tmp_path: Path, order: str, expected: str
) -> None:
    def dated(text: str, year: int) -> dict[str, object]:
        return {"text": text, "created_at": year}

    paths = {
        "n": write(tmp_path, "n", name="n.txt"),
        "t": write(tmp_path, dated("c", 2022), dated("b", 2021), name="t.jsonl"),
        "d": write(tmp_path, dated("a", 2020), dated("d", 2023), name="d.jsonl"),
    }
    history = read_history(*[paths[name] for name in order], user_id="ann")
    assert "".join(completions(history)) == expected


def test_files_of_one_user_are_one_history_and_others_are_refused(tmp_path: Path) -> None:
    ann = write(tmp_path, pair(1, user_id="ann"), name="ann.jsonl")
    both = write(tmp_path, pair(2, user_id="bob"), pair(3, user_id="ann"), name="both.jsonl")
    bob = write(tmp_path, pair(4, user_id="bob"), name="bob.jsonl")
    text = write(tmp_path, "a text", name="posts.txt")
    assert read_history(ann, ann).user_id == "ann"
    read = read_history(ann, both, text, user_id="ann")
    assert completions(read) == ["answer 1", "answer 3", "a text"]
    assert read.formats == {"prompt and completion": 2, "plain text": 1}
    for paths, user_id, message in [
        ((ann, bob), None, r"bob\.jsonl: has the user 'bob', but .*ann\.jsonl the user 'ann'"),
        ((ann, text), None, r"posts\.txt: the file names no user; name one"),
        (
            (ann, bob),
            "ann",
            r"bob\.jsonl: asked for the user 'ann', but the file has the user 'bob'",
        ),
    ]:
        with pytest.raises(HistoryError, match=message):
            read_history(*paths, user_id=user_id)


def test_a_dislike_in_one_file_counts_for_the_like_in_another(tmp_path: Path) -> None:
    liked = write(tmp_path, {"prompt": "q", "answer": "good", "score": 1}, name="liked.jsonl")
    bad = write(tmp_path, {"prompt": "q", "answer": "bad", "score": 0}, name="bad.jsonl")
    for paths in [(liked, bad), (bad, liked)]:
        (item,) = read_history(*paths, user_id="ann").items
        assert (item.completion, item.rejected) == ("good", ("bad",))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ('{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
        ('[\n {"text": "one"},\n {"text": "two"}\n]', ["one", "two"]),
        ("[sic] one\n{two}\n", ["[sic] one", "{two}"]),
    ],
)
def test_standard_input_is_read_as_json_or_plain_text(
    given: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    more = write(tmp_path, "three", name="more.txt")
    assert completions(read_history("-", more, user_id="ann")) == [*expected, "three"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"", "standard input: the file is empty"),
        (b'{"broken', "standard input:1: broken JSON"),
        (b"{'text': 'a'}", "standard input:1: broken JSON"),
        (b"12/24/23, 9:01 PM - Ann: hi", "standard input: looks like an exported chat"),
        (b"PK\x03\x04", "standard input:1: not UTF-8 but a ZIP archive"),
    ],
)
def test_wrong_standard_input_is_named(
    given: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
    with pytest.raises(HistoryError, match=message):
        read_history("-", user_id="ann")


# Users of a file


def test_one_of_several_users_is_picked_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, pair(1, user_id="ann"), pair(2, user_id="bob"), pair(3, user_id="ann"))
    assert completions(read_history(path, user_id="ann")) == ["answer 1", "answer 3"]
    assert [(user.user_id, len(user.items)) for user in read_users(path)] == [
        ("ann", 2),
        ("bob", 1),
    ]


def test_several_users_in_a_file_are_counted_and_named(tmp_path: Path) -> None:
    path = write(tmp_path, *[pair(number, user_id=f"user{number}") for number in range(7)])
    with pytest.raises(
        HistoryError,
        match=r"7 users: 'user0', 'user1', 'user2', 'user3', 'user4', …; pick one \(--user",
    ):
        read_history(path)


def test_a_file_of_another_user_is_refused_naming_both(tmp_path: Path) -> None:
    path = write(tmp_path, pair(1, user_id="ann"))
    with pytest.raises(
        HistoryError, match="asked for the user 'bob', but the file has the user 'ann'"
    ):
        read_history(path, user_id="bob")


def test_a_file_that_names_no_user_needs_one(tmp_path: Path) -> None:
    path = write(tmp_path, pair(1))
    with pytest.raises(HistoryError, match=r"names no user; name one \(--user ID\)"):
        read_history(path)
    assert read_users(path)[0].user_id is None


def test_a_file_that_names_a_user_on_some_lines_only_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, pair(1, user_id="ann"), pair(2))
    with pytest.raises(
        HistoryError, match=r"user\.jsonl:2: names no user, while .*user\.jsonl:1 does"
    ):
        read_history(path, user_id="ann")


def test_rows_of_two_users_are_never_mixed_in_memory() -> None:
    with pytest.raises(
        HistoryError, match=r"history\[1\]: belongs to the user 'bob', not to 'ann'"
    ):
        as_history([pair(1, user_id="ann"), pair(2, user_id="bob")])
    with pytest.raises(
        HistoryError, match=r"history\[0\]: belongs to the user 'bob', not to 'ann'"
    ):
        as_history([pair(1, user_id="bob")], user_id="ann")


@pytest.mark.parametrize("user_id", ["../x", "$ne", "a\0b", "🙂", "x" * 10_000, " "])
def test_any_text_is_a_user_id(tmp_path: Path, user_id: str) -> None:
    assert read_history(write(tmp_path, pair(1, user_id=user_id))).user_id == user_id


# Bad input

DEEP = "[" * 100_000
BAD_LINES = [
    ('{"prompt": "p", "completion"', r"broken JSON: Expecting ':' delimiter"),
    ("not json", r"broken JSON: Expecting value at character 1"),
    ('"text"', r"expected an object with named fields, found str"),
    ("[1]", r"expected an object with named fields, found list"),
    (
        {"question": "q", "answer": "a"},
        r"no text to learn from: expected the keys text, or prompt and completion, or messages",
    ),
    ({"question": "q", "answer": "a"}, r"no text to learn from: .*found 'question', 'answer'$"),
    ({}, r"no text to learn from.*found none"),
    ({"prompt": "p", "completion": "  \n"}, r"completion is blank"),
    ({"prompt": "p", "completion": None}, r"completion must be text, not NoneType"),
    ({"prompt": "p", "completion": 3}, r"completion must be text, not int"),
    ({"prompt": 3, "completion": "c"}, r"prompt must be a list, not int"),
    ({"prompt": [turn("assistant", "x")], "completion": "c"}, r"prompt ends in an assistant turn"),
    (
        '{"prompt": "p", "completion": "\\ud800"}',
        r"completion holds half of a surrogate pair at character 0",
    ),
    ({"messages": "hi"}, r"messages must be a list, not str"),
    ({"messages": []}, r"no assistant turn with text in messages; roles with text: none"),
    (
        {"messages": [turn("user", "hi")]},
        r"no assistant turn with text in messages; roles with text: user",
    ),
    (
        {"messages": [turn("alien", "hi")]},
        r"messages\[0\] has the role 'alien'; known roles: system",
    ),
    ({"messages": [{"content": "hi"}]}, r"messages\[0\] has the role None"),
    ({"messages": ["hi"]}, r"messages\[0\]: expected an object with named fields, found str"),
    (
        {"messages": [{"role": "user", "content": 5}]},
        r"messages\[0\]: content must be text, not int",
    ),
    (pair(1, created_at="yesterday"), r"the time is 'yesterday'; expected ISO 8601"),
    (pair(1, created_at=True), r"the time is"),
    (pair(1, created_at=float("nan")), r"the time is nan"),
    (pair(1, created_at=10**400), r"the time is a number out of range"),
    (pair(1, conversation=[1]), r"conversation must be text, not list"),
    ({"history": "x"}, r"history must be a list, not str"),
    ({"history": [pair(1), {"prompt": "x"}]}, r"history\[1\]: no text to learn from"),
    ({"profile": "x"}, r"profile must be a list, not str"),
    ('{"prompt": "p", "completion": ' + "1" * 5000 + "}", r"JSON that cannot be read"),
    (DEEP, r"JSON that cannot be read: nested too deeply"),
    (
        f'{{"messages": [{{"role": "user", "content": {"[" * 900}{"]" * 900}}}]}}',
        r".*(nested too deeply|must be text|found list)",
    ),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_with_what_is_wrong(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(HistoryError, match=rf"user\.jsonl:2: {message}"):
        read_history(write(tmp_path, pair(0), line), user_id="ann")


@pytest.mark.parametrize(
    ("user_id", "message"), [("", "user id is empty"), (1.5, "must be text"), ([], "must be text")]
)
def test_a_user_id_that_is_not_text_is_refused(
    tmp_path: Path, user_id: object, message: str
) -> None:
    with pytest.raises(HistoryError, match=message):
        read_history(write(tmp_path, pair(1, user_id=user_id)))


def test_a_huge_number_or_nan_beside_the_texts_does_no_harm(tmp_path: Path) -> None:
    path = write(
        tmp_path, pair(1, score=10**300, other=float("nan")), pair(2, note="x" * 1_000_000)
    )
    assert len(read_history(path, user_id="ann").items) == 2


def test_a_missing_file_a_folder_and_an_empty_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match=r"absent\.jsonl: no such file"):
        read_history(tmp_path / "absent.jsonl")
    with pytest.raises(HistoryError, match="is a folder; name a file in it"):
        read_history(tmp_path)
    with pytest.raises(HistoryError, match=r"user\.json: the list in the file is empty"):
        read_history(write(tmp_path, [], name="user.json"), user_id="ann")
    for name in ("empty.jsonl", "empty.txt", "empty.json"):
        with pytest.raises(HistoryError, match="the file is empty"):
            read_history(write(tmp_path, " ", "", name=name))
    with pytest.raises(HistoryError, match=r"cannot be read: .*null byte"):
        read_history("a\0b")


def test_a_byte_order_mark_is_skipped_and_another_encoding_named(tmp_path: Path) -> None:
    path = tmp_path / "user.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(pair(1)).encode() + b"\r\n")
    assert completions(read_history(path, user_id="ann")) == ["answer 1"]
    path.write_bytes(json.dumps(pair(1)).encode() + b"\n\xe9t\xe9")
    with pytest.raises(HistoryError, match=r"user\.jsonl:2: not UTF-8 but another encoding"):
        read_history(path, user_id="ann")
    path.write_text(json.dumps(pair(1)), encoding="utf-16")
    with pytest.raises(HistoryError, match="not UTF-8 but UTF-16"):
        read_history(path, user_id="ann")


BOM = "\ufeff"


@pytest.mark.parametrize("name", ["posts.txt", "posts.jsonl", "posts.json"])
@pytest.mark.parametrize("lines", [(BOM, ""), ("", BOM), (BOM, BOM), (" " + BOM, BOM + " "), BOM])
def test_a_byte_order_mark_before_any_line_is_dropped(
    tmp_path: Path, name: str, lines: tuple[str, str] | str
) -> None:
    texts = ["one", "two"] if name.endswith("txt") else ['{"text": "one"}', '{"text": "two"}']
    if lines == BOM:  # an empty file of its own
        texts.insert(1, "")
    marked = [f"{mark}{text}" for mark, text in zip([*lines, ""], texts, strict=False)]
    path = tmp_path / name
    path.write_text("\n".join([*marked, *texts[len(marked) :]]), encoding="utf-8")
    assert completions(read_history(path, user_id="ann")) == ["one", "two"]


def test_a_broken_json_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "[", json.dumps(pair(1)), "oops]", name="user.json")
    with pytest.raises(HistoryError, match=r"user\.json:3: broken JSON"):
        read_history(path, user_id="ann")
    with pytest.raises(HistoryError, match=r"user\.json\[1\]: no text to learn from"):
        read_history(write(tmp_path, [pair(1), {}], name="user.json"), user_id="ann")
    with pytest.raises(HistoryError, match="nested too deeply"):
        read_history(write(tmp_path, DEEP, name="user.json"), user_id="ann")


@pytest.mark.parametrize("rows", ["text", {"prompt": "p"}, 5])
def test_a_history_in_memory_must_be_a_list(rows: object) -> None:
    with pytest.raises(HistoryError, match="history must be a list of rows"):
        as_history(rows)  # type: ignore[arg-type]


def test_a_row_in_memory_is_named_by_its_index() -> None:
    with pytest.raises(HistoryError, match=r"history\[3\]: completion is blank"):
        as_history([pair(0), pair(1), pair(2), Item(prompt="p", completion=" ")])
    with pytest.raises(HistoryError, match="target is 'me'; expected 'assistant' or 'user'"):
        as_history([pair(0)], target="me")  # type: ignore[arg-type]


@given(rows=st.lists(st.tuples(st.text(), st.text().filter(str.strip), st.integers(0, 50))))
def test_reading_items_again_changes_nothing(rows: list[tuple[str, str, int]]) -> None:
    start = datetime(2024, 1, 1, tzinfo=UTC)
    raw = [
        {"prompt": p, "completion": c, "created_at": start + timedelta(days=days)}
        for p, c, days in rows
    ]
    items = as_history(raw).items
    assert as_history(items).items == items
    assert len({item.key for item in items}) == len(items)


@pytest.mark.parametrize(
    ("values", "shareable"), [([True], True), ([False], False), ([True, None], False), ([], False)]
)
def test_a_user_is_shareable_where_every_line_says_so(
    tmp_path: Path, values: list[bool | None], shareable: bool
) -> None:
    lines: list[dict[str, object]] = [
        {"user_id": "alice", "history": [pair(number)]} for number in range(len(values) or 1)
    ]
    for line, value in zip(lines, values, strict=False):
        if value is not None:
            line["shareable"] = value
    (user,) = read_users(write(tmp_path, *lines))
    assert user.shareable is shareable


def test_shareable_is_true_or_false(tmp_path: Path) -> None:
    path = write(tmp_path, {"user_id": "alice", "history": [pair(1)], "shareable": "yes"})
    with pytest.raises(HistoryError, match=r"user.jsonl:1: shareable is 'yes'; expected true"):
        read_users(path)
