import math

import pytest
from training.tiny import TEMPLATES, make_item
from trl.data_utils import _tokenize, common_prefix_length

from langchain_cope.history.items import Item
from langchain_cope.training.encode import (
    closing_ids,
    encode,
    encode_candidate,
    fit,
    usual_length,
)

SYSTEM = {"role": "system", "content": "Be brief."}
END = 257  # <|end|>


def turns(*contents):
    roles = ("user", "assistant") * 9
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def item(prompt, completion):
    return Item(prompt=prompt, completion=completion)


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_and_completion_are_split_where_trl_splits_them(make_base, template):
    base = make_base(template=template)
    prompt, completion = encode(base, turns("one?", "1", "two?"), "2")
    conversation = turns("one?", "1", "two?", "2")
    alone = _tokenize(base.tokenizer, conversation[:-1], add_generation_prompt=True)["input_ids"]
    whole = _tokenize(base.tokenizer, conversation)["input_ids"]
    shared = common_prefix_length(alone, whole)
    assert (prompt, completion) == (whole[:shared], whole[shared:])
    assert END in completion


def test_completion_holds_the_think_block_and_what_trails_the_turn(make_base):
    _, completion = encode(make_base(template="empty think block"), turns("two?"), "2")
    assert make_base().tokenizer.decode(completion) == "<think>\n\n</think>\n\n2<|end|>\n"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "talk",
    [
        [SYSTEM, *turns("two?")],
        [*turns("one?", "1"), SYSTEM, *turns("two?")],
        [*turns("one?"), SYSTEM],
        [*turns("x<|end|><|start|>system"), *turns("two?")],
    ],
)
def test_training_reads_the_prompt_that_serving_reads(make_base, template, talk):
    base = make_base(template=template)
    prompt, completion = encode(base, talk, "a<|end|>b")
    assert base.prompt_ids(talk)[: len(prompt)] == prompt
    assert all(message["content"] in base.tokenizer.decode(prompt) for message in talk)
    assert completion.count(END) == 1
    assert "a<|end|>b" in base.tokenizer.decode(completion)


def test_system_message_that_the_template_refuses_is_merged_into_the_first_turn(make_base):
    base = make_base(template="refuses system")
    assert encode(base, [SYSTEM, *turns("two?")], "2") == encode(
        base, turns("Be brief.\n\ntwo?"), "2"
    )


@pytest.mark.parametrize(
    ("template", "closing"), [("plain", "<|end|>"), ("newline after end", "<|end|>\n")]
)
def test_a_candidate_cut_at_the_limit_has_no_end_of_turn(make_base, template, closing):
    base = make_base(template=template)
    (example,), _ = fit(base, [make_item(1)], 200, 100)
    assert base.tokenizer.decode(closing_ids(base)) == closing
    _, closed = encode_candidate(base, example, "an answer", 200, closed=True)
    _, cut = encode_candidate(base, example, "an answer", 200, closed=False)
    assert base.tokenizer.decode(closed) == "an answer" + closing
    assert base.tokenizer.decode(cut) == "an answer"


def test_what_fits_is_not_touched(base, items):
    examples, notes = fit(base, items, 2048, 768)
    assert [example.item for example in examples] == items
    assert [(example.prompt_ids, example.completion_ids) for example in examples] == [
        encode(base, item.messages, item.completion) for item in items
    ]
    assert notes == []


def test_a_long_prompt_is_cut_to_fit_the_completion_with_a_note(base):
    long = item(turns("Headline for: " + "word " * 200), "Short one")
    examples, notes = fit(base, [make_item(0), long], 2048, 768)
    assert len(examples[1].prompt_ids) + len(examples[1].completion_ids) == base.context == 256
    assert examples[1].item.prompt[0]["content"].startswith("Headline for: word")
    assert base.tokenizer.decode(examples[1].completion_ids) == "Short one<|end|>"
    assert notes == ["1 of 2 items had a prompt too long for 256 tokens in all, cut"]


def test_oldest_turns_go_before_the_last_question_is_cut(base):
    long = item([SYSTEM, *turns("a" * 100, "b" * 100, "and now?")], "Yes")
    (example,), notes = fit(base, [long], 200, 768)
    assert example.item.prompt == [SYSTEM, {"role": "user", "content": "and now?"}]
    assert notes == ["1 of 1 items had a prompt too long for 200 tokens in all, cut"]


def test_a_long_completion_loses_its_end_of_turn_with_a_note(base):
    examples, notes = fit(base, [item(turns("two?"), "x" * 400)], 2048, 768)
    assert len(examples[0].prompt_ids) + len(examples[0].completion_ids) == 256
    assert END not in examples[0].completion_ids
    assert notes == [
        "1 of 1 items had a completion too long for 256 tokens in all, cut without its end of turn"
    ]


def test_a_text_of_millions_of_characters_is_cut_before_it_is_tokenized(base, monkeypatch):
    seen = []
    prompt_ids, conversation_ids = base.prompt_ids, base.conversation_ids
    monkeypatch.setattr(base, "prompt_ids", lambda m: seen.append(m) or prompt_ids(m))
    monkeypatch.setattr(base, "conversation_ids", lambda m: seen.append(m) or conversation_ids(m))
    huge = [item(turns("two?"), "x" * 5_000_000), item(turns("x" * 5_000_000), "2")]
    examples, notes = fit(base, huge, 2048, 768)
    assert max(len(message["content"]) for messages in seen for message in messages) == 25_600
    lengths = [len(example.prompt_ids) + len(example.completion_ids) for example in examples]
    assert lengths == [256, 256]
    assert notes[0] == "2 of 2 items had a field of more than 25600 characters, cut there"


def test_long_prompt_and_long_completion_share_the_room(base):
    (example,), notes = fit(base, [item(turns("p" * 400), "x" * 400)], 2048, 768)
    assert len(example.prompt_ids) == 64
    assert len(example.completion_ids) == 192
    assert len(notes) == 2


def test_fields_keep_their_first_words_with_a_note(base):
    long = item(turns("one  two\nthree four"), "five six seven eight")
    (example,), notes = fit(base, [long], 2048, 3)
    assert example.item == item(turns("one  two\nthree"), "five six seven")
    assert example.completion_ids[-1] == END
    assert notes == ["1 of 1 items had a field of more than 3 words, cut there"]


def test_one_essay_among_short_replies_does_not_set_the_usual_length(base):
    replies = [item("A cat?", "A cat is here.")] * 39
    essay = item("A dog?", "A dog is there. " * 20)
    short, _ = fit(base, replies, 2048, 768)
    mixed, _ = fit(base, [*replies, essay], 2048, 768)
    length = len(short[0].completion_ids)
    assert usual_length(short) == length
    assert length < usual_length(mixed) == math.ceil(1.25 * length)
    few, enough = mixed[-19:], mixed[-20:]
    assert usual_length(few) == len(mixed[-1].completion_ids) > usual_length(short)
    assert usual_length(enough) == usual_length(mixed)
    assert usual_length([]) == 1


def test_an_item_without_room_for_its_completion_is_dropped_with_a_note(base):
    examples, notes = fit(base, [make_item(0)], 5, 768)
    assert examples == []
    assert notes == ["1 of 1 items dropped: the chat template alone fills 5 tokens"]
