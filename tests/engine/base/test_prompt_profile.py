"""Which prompts are like a history's: on the tiny base, whose embeddings are random."""

import hashlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DEVICE

from langchain_cope.engine import Base, PromptProfile, load_base, questions_of
from langchain_cope.engine.base.prompt_profile import EVERYDAY, FORMAT, words_of
from langchain_cope.errors import ModelError

THINGS = ("a baking show", "the marathon", "a lost cat", "rain in May", "a new tram", "old songs")
PROMPTS = [f"Generate a headline for the following article. {thing.title()}" for thing in THINGS]
UNLIKE = ["Who wrote Faust?", "Add 12 and 7.", "Wie hoch ist der Brocken?", "Hi!", "List 5 trees."]


@pytest.fixture
def base(tiny: Callable[..., Path]) -> Base:
    return load_base(tiny("llama"), device=DEVICE, dtype="float32")


def profile(base: Base) -> PromptProfile:
    found = PromptProfile.of(base.everyday, PROMPTS)
    assert found is not None
    return found


def test_like_prompts_are_relevant_and_others_are_not(base: Base) -> None:
    found = profile(base)
    like = "Generate a headline for the following article. A Dog On The Moon"
    assert found.relevance(base.everyday, [like]) == 1
    assert [found.relevance(base.everyday, [text]) for text in UNLIKE] == [0] * len(UNLIKE)
    assert found.relevance(base.everyday, [""]) == 0
    assert found.relevance(base.everyday, []) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="Linux lists a process's threads")
def test_a_long_question_leaves_no_idle_threads_behind(base: Base) -> None:
    def num_threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    def ask() -> None:
        found.relevance(base.everyday, ["Hi!"])
        before = num_threads()
        found.relevance(base.everyday, ["word " * 2000])
        seen.append(num_threads() - before)

    found, seen, threads = profile(base), list[int](), torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(threads)
    assert seen == [0]


@pytest.mark.parametrize(
    "question",
    [
        "Write a headline about Taylor Swift.",
        "Three HEADLINES, please: the old bridge is closed",
        "ＨＥＡＤＬＩＮＥ",
        f"Here is what happened. {'It rained again that day. ' * 4000}Your headline?",
    ],
    ids=lambda question: question[:20],
)
def test_the_same_wish_in_other_words_is_relevant(base: Base, question: str) -> None:
    assert profile(base).relevance(base.everyday, [question]) == 1


def test_another_wish_about_the_same_matter_is_half_relevant(base: Base) -> None:
    assert profile(base).relevance(base.everyday, ["Who wrote that article?"]) == 0.5


POLITE = [f"Please could you write me a headline for this article? {thing}" for thing in THINGS]
CASUAL = [f"Hey, I've an idea: couldn't you write a headline in English? {t}" for t in THINGS]
GERMAN = [f"Verfasse bitte einen Titel für den folgenden Artikel: {thing}" for thing in THINGS]


@pytest.mark.parametrize(
    ("prompts", "like", "unlike"),
    [
        (
            PROMPTS,
            "A headline: Rain",
            ["Generate the following numbers.", "A headlight is broken."],
        ),
        (POLITE, "A headline: Rain", ["Please, could you add 12 and 7?", "Who sang old songs?"]),
        (CASUAL, "A headline: Rain", ["Hey, I've lost my keys.", "Couldn't you add 12 and 7?"]),
        (GERMAN, "Ein Titel: Regen", ["Wer hat den Computer erfunden?", "Nenne bitte einen Baum."]),
    ],
    ids=["plain", "polite", "casual", "German"],
)
def test_common_words_and_those_of_single_prompts_tell_nothing(
    base: Base, prompts: list[str], like: str, unlike: list[str]
) -> None:
    found = PromptProfile.of(base.everyday, prompts)
    assert found is not None
    assert found.relevance(base.everyday, [like]) == 1
    assert [found.relevance(base.everyday, [text]) for text in unlike] == [0, 0]


def test_words_that_nine_in_ten_prompts_hold_are_kept(base: Base) -> None:
    nine = ["headline"] * 9 + ["story"]
    eight = ["article"] * 8 + ["report"] * 2
    things = [*THINGS, "a flood", "the choir", "dry wells", "late buses"]
    found = PromptProfile.of(
        base.everyday,
        [f"Write a {a} for the {b}. {c}" for a, b, c in zip(nine, eight, things, strict=True)],
    )
    assert found is not None
    assert len(found.words) == 1
    assert found.relevance(base.everyday, ["Headline?"]) == 1


def test_a_role_at_the_beginning_counts_as_the_wish(base: Base) -> None:
    prompts = [f"You are a journalist. Write a headline for this article. {t}" for t in THINGS]
    found = PromptProfile.of(base.everyday, prompts)
    assert found is not None
    questions = ("Ask a journalist.", "Which headline?")
    assert [found.relevance(base.everyday, [text]) for text in questions] == [1, 0.5]


def test_words_count_at_either_end_of_a_prompt_alone(base: Base) -> None:
    middle = "whereas throughout " * 20
    prompts = [f"Headline, please. {f'{t} ' * 8} {middle} {f'{t} ' * 8}" for t in THINGS]
    assert words_of(prompts[0]) == ["headline", "please", "baking", "show"]
    found = profile(base)
    assert found.relevance(base.everyday, [f"{'word ' * 20} headline"]) == 1
    assert found.relevance(base.everyday, [f"{'word ' * 20} headline {'word ' * 20}"]) == 0


@pytest.mark.parametrize(
    "template",
    [
        "please rewrite every paragraph below using plain language without changing facts names "
        "figures quotations headings footnotes captions margins",
        "Skriv en rubrik för följande artikel:",
    ],
    ids=["long", "Swedish"],
)
def test_of_a_long_template_or_another_language_no_words_are_kept(
    base: Base, template: str
) -> None:
    found = PromptProfile.of(base.everyday, [f"{template} {thing}" for thing in THINGS])
    assert found is not None
    assert found.words == ()


def test_digests_of_the_same_word_differ_between_histories(base: Base) -> None:
    another = PromptProfile.of(base.everyday, [prompt.upper() for prompt in PROMPTS])
    assert another is not None
    assert len(another.words) == len(profile(base).words) == 2
    assert not set(another.words) & set(profile(base).words)


def test_a_profile_from_before_words_were_kept_is_read(base: Base) -> None:
    stored = profile(base).to_stored()
    del stored["words"]
    earlier = PromptProfile.from_stored(stored, base.everyday)
    assert earlier is not None
    assert earlier.relevance(base.everyday, ["Write a headline about Taylor Swift."]) == 0
    assert earlier.relevance(base.everyday, [PROMPTS[0]]) == 1


def test_a_follow_up_is_as_relevant_as_what_it_follows(base: Base) -> None:
    found = profile(base)
    like = "Generate a headline for the following article. A Dog On The Moon"
    assert found.relevance(base.everyday, [like, "Shorter, please."]) == 1
    assert found.relevance(base.everyday, ["Hi!", like, "Thanks. Once more?"]) == 1
    assert found.relevance(base.everyday, UNLIKE) == 0


def test_what_is_stored_reads_back_and_holds_no_text(base: Base) -> None:
    found = profile(base)
    stored = found.to_stored()
    assert PromptProfile.from_stored(stored, base.everyday) == found
    assert len(stored["centre"]) < 2 * base.everyday.width
    assert not any("headline" in str(value) for value in stored.values())


@pytest.mark.parametrize("prompts", [PROMPTS[:2], PROMPTS[:1] * 9, UNLIKE], ids=str)
def test_prompts_that_have_nothing_in_common_have_no_profile(
    base: Base, prompts: list[str]
) -> None:
    assert PromptProfile.of(base.everyday, prompts) is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"format": "1"}, "no object with a format"),
        ({"language": 999}, "language"),
        ({"language": True}, "language"),
        ({"low": "0.1"}, "no cosines"),
        ({"low": float("nan")}, "no cosines"),
        ({"low": 0.9, "high": 0.2}, "wrong order"),
        ({"centre": "AAAA"}, "has 3 entries"),
        ({"centre": "*" * 44}, "not base64"),
        ({"centre": "A" * 100_000}, "no short text"),
        ({"centre": 7}, "no short text"),
        ({"words": "headline"}, "its words are no list"),
        ({"words": ["0" * 12] * 9}, "its words are no list"),
        ({"words": ["headline"]}, "its words are no digests"),
        ({"words": ["z" * 12]}, "its words are no digests"),
        ({"words": [["0" * 12]]}, "its words are no digests"),
        ({"words": None}, "its words are no list"),
    ],
)
def test_a_damaged_profile_is_refused(base: Base, changes: dict[str, Any], told: str) -> None:
    stored = profile(base).to_stored() | changes
    with pytest.raises(ModelError, match=told):
        PromptProfile.from_stored(stored, base.everyday)


def test_no_profile_and_one_of_another_format_are_none(base: Base) -> None:
    later = profile(base).to_stored() | {"format": FORMAT + 1}
    assert PromptProfile.from_stored(later, base.everyday) is None
    assert PromptProfile.from_stored(None, base.everyday) is None


def test_the_format_stands_for_the_list_of_everyday_prompts() -> None:
    """Where the list changes, `FORMAT` has to: stored profiles rest on both."""
    digest = hashlib.sha256(EVERYDAY.read_bytes()).hexdigest()
    assert (FORMAT, digest[:16]) == (1, "0eff669f5056eab3")


def test_the_questions_are_the_users_turns() -> None:
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
        {"role": "tool", "content": "4"},
    ]
    assert questions_of(turns) == ["One?", "Three?"]
    assert questions_of(turns[:1]) == ["Be kind."]
    assert questions_of([]) == []
