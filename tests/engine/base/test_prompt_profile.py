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
from langchain_cope.engine.base.prompt_profile import EVERYDAY, FORMAT
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
