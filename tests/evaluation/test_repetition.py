import random
import time

import pytest

from langchain_cope.evaluation.repetition import (
    CopyRates,
    copy_rates,
    distinct,
    mean_num_words,
    most_repeated,
)


def test_copies_are_told_by_where_they_stand() -> None:
    answers = ["One two three FOUR, five six seven eight!"]  # five runs of four words
    prompts = ["Write: five six seven eight"]
    history = ["zero one two three four", "four five six", "five six seven eight"]
    assert copy_rates(answers, prompts, history) == CopyRates(1 / 5, 1 / 5)


def test_no_run_spans_two_texts_of_the_history() -> None:
    assert copy_rates(["a b c d"], [""], ["a b", "c d"]) == CopyRates(0, 0)


def test_each_answer_is_compared_with_its_own_prompt() -> None:
    answers, prompts = ["a b c d", "e f g h"], ["e f g h", "a b c d"]
    assert copy_rates(answers, prompts, []) == CopyRates(0, 0)
    assert copy_rates(answers, prompts[::-1], []) == CopyRates(0, 1)


def test_signs_are_words_where_no_spaces_part_them() -> None:
    assert copy_rates(["今天天气好"], [""], ["今天天气不好"]) == CopyRates(1 / 2, 0)


def test_too_short_answers_have_no_rates() -> None:
    assert copy_rates(["three words only", ""], ["", ""], ["three words only"]) is None
    assert distinct(["one"], 2) is None


@pytest.mark.parametrize(("length", "share"), [(1, 2 / 5), (2, 2 / 3)])
def test_distinct_counts_over_all_answers(length: int, share: float) -> None:
    assert distinct(["a b a", "A b"], length) == share


def test_mean_length_is_in_words() -> None:
    assert mean_num_words(["Two words.", "and one, two, three"]) == 3


@pytest.mark.parametrize(
    ("text", "times"),
    [
        ("no no no no", 4),
        ("No, no, no, no.", 3),
        ("\U0001f602\U0001f602\U0001f602", 3),
        ("doc:doc:doc:doc:", 4),
        ("The cat sat there. " * 5, 5),
        ("Oh. " + "The cat sat there. " * 3, 3),
        ("no no", 1),
        ("no no no, I will be there at seven", 1),
        ("", 1),
    ],
)
def test_what_stands_in_a_row_is_counted_where_it_is_half(text: str, times: int) -> None:
    assert most_repeated(text) == times


def test_long_texts_are_looked_through_at_once() -> None:
    started = time.monotonic()
    assert most_repeated("ab" * 20_000) == 20_000
    assert most_repeated("".join(random.Random(0).choices("abcd ", k=20_000))) == 1
    assert time.monotonic() - started < 10
