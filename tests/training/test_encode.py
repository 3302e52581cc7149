import pytest
from training.tiny import TEMPLATES, example
from trl.data_utils import _tokenize, common_prefix_length

from langchain_cope.training.encode import Example, closing_ids, encode, encode_candidate, fit

SYSTEM = {"role": "system", "content": "Be brief."}
END = 257  # <|end|>


def turns(*contents):
    return [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant") * 9, contents, strict=False)
    ]


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


def test_completion_starts_with_the_empty_think_block_and_ends_with_what_trails_the_turn(make_base):
    _, completion = encode(make_base(template="empty think block"), turns("two?"), "2")
    assert make_base().tokenizer.decode(completion) == "<think>\n\n</think>\n\n2<|end|>\n"


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
    item = fit(base, [example(1)], 200, 100)[0][0]
    assert base.tokenizer.decode(closing_ids(base)) == closing
    _, closed = encode_candidate(base, item, "an answer", 200, closed=True)
    _, cut = encode_candidate(base, item, "an answer", 200, closed=False)
    assert base.tokenizer.decode(closed) == "an answer" + closing
    assert base.tokenizer.decode(cut) == "an answer"


def test_what_fits_is_not_touched(base, examples):
    items, notes = fit(base, examples, 2048, 768)
    assert [item.example for item in items] == examples
    assert [(item.prompt_ids, item.completion_ids) for item in items] == [
        encode(base, e.prompt, e.completion) for e in examples
    ]
    assert notes == []


def test_long_prompt_is_cut_so_that_the_whole_completion_fits_and_that_is_said(base):
    long = Example(turns("Headline for: " + "word " * 200), "Short one")
    items, notes = fit(base, [example(0), long], 2048, 768)
    assert len(items[1].prompt_ids) + len(items[1].completion_ids) == base.context == 256
    assert items[1].example.prompt[0]["content"].startswith("Headline for: word")
    assert base.tokenizer.decode(items[1].completion_ids) == "Short one<|end|>"
    assert notes == ["1 of 2 items had a prompt too long for 256 tokens in all, cut"]


def test_oldest_turns_go_before_the_last_question_is_cut(base):
    long = Example([SYSTEM, *turns("a" * 100, "b" * 100, "and now?")], "Yes")
    (item,), notes = fit(base, [long], 200, 768)
    assert item.example.prompt == [SYSTEM, {"role": "user", "content": "and now?"}]
    assert notes == ["1 of 1 items had a prompt too long for 200 tokens in all, cut"]


def test_long_completion_is_cut_without_its_end_of_turn_and_that_is_said(base):
    items, notes = fit(base, [Example(turns("two?"), "x" * 400)], 2048, 768)
    assert len(items[0].prompt_ids) + len(items[0].completion_ids) == 256
    assert END not in items[0].completion_ids
    assert notes == [
        "1 of 1 items had a completion too long for 256 tokens in all, cut without its end of turn"
    ]


def test_a_text_of_millions_of_characters_is_cut_before_it_is_tokenized(base, monkeypatch):
    seen = []
    prompt_ids, conversation_ids = base.prompt_ids, base.conversation_ids
    monkeypatch.setattr(base, "prompt_ids", lambda m: seen.append(m) or prompt_ids(m))
    monkeypatch.setattr(base, "conversation_ids", lambda m: seen.append(m) or conversation_ids(m))
    huge = [Example(turns("two?"), "x" * 5_000_000), Example(turns("x" * 5_000_000), "2")]
    items, notes = fit(base, huge, 2048, 768)
    assert max(len(message["content"]) for messages in seen for message in messages) == 25_600
    assert [len(item.prompt_ids) + len(item.completion_ids) for item in items] == [256, 256]
    assert notes[0] == "2 of 2 items had a field of more than 25600 characters, cut there"


def test_long_prompt_and_long_completion_share_the_room(base):
    (item,), notes = fit(base, [Example(turns("p" * 400), "x" * 400)], 2048, 768)
    assert len(item.prompt_ids) == 64
    assert len(item.completion_ids) == 192
    assert len(notes) == 2


def test_fields_keep_their_first_words_and_that_is_said(base):
    (item,), notes = fit(
        base, [Example(turns("one  two\nthree four"), "five six seven eight")], 2048, 3
    )
    assert item.example == Example(turns("one  two\nthree"), "five six seven")
    assert item.completion_ids[-1] == END
    assert notes == ["1 of 1 items had a field of more than 3 words, cut there"]


def test_item_without_room_for_its_completion_is_dropped_and_that_is_said(base):
    items, notes = fit(base, [example(0)], 5, 768)
    assert items == []
    assert notes == ["1 of 1 items dropped: the chat template alone fills 5 tokens"]
