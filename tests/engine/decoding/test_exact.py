"""Where an answer has to be exact, by examples."""

import pytest

from langchain_cope.engine.decoding.exact import is_exact, names_in

PROMPT = "Write a headline for: On Monday the senator Maria Cantwell, of Seattle, met 14 farmers."
NAMES = names_in(PROMPT)


def test_names_are_the_capitals_within_a_sentence() -> None:
    assert {"Maria", "Cantwell", "Seattle"} <= NAMES
    assert not {"Write", "On", "headline", "of"} & NAMES


@pytest.mark.parametrize(
    ("answer", "token"),
    [
        ("Take this:\n```python\nx = y", " +"),
        ("Call `list", "dir"),
        ('She said "never', " again"),
        ("She said “never", " again"),
        ("See https://example", ".org"),
        ("Write to ann@example", "."),
        ("Add 2", "50"),
        ("Add 2.", "5"),
        ("Add", " 3"),
        ("Sen. Maria Can", "t"),
        ("Sen.", " Maria"),
        ("they met: On Monday the senator", " Maria"),
        ("and so on Monday the senator", " Maria"),
    ],
)
def test_spans_that_have_to_be_exact(answer: str, token: str) -> None:
    assert is_exact(answer, token, PROMPT, NAMES)


@pytest.mark.parametrize(
    ("answer", "token"),
    [
        ("", "The"),
        ("Take this:\n```python\nx = y\n```\nIt", " adds"),
        ("Call `listdir` and", " see"),
        ('She said "never" and', " left"),
        ('She said "never\nThen', " she"),
        ("See https://example.org and", " read"),
        ("Add 250 grams of", " flour"),
        ("What", " Every"),
        ("A", " A"),
        ("and so on Monday the senator", " left"),
    ],
)
def test_what_is_said_freely(answer: str, token: str) -> None:
    assert not is_exact(answer, token, PROMPT, NAMES)
