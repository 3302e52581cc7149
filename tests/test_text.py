"""Sentences that people read."""

import pytest

from langchain_cope.text import count


@pytest.mark.parametrize(
    ("number", "expected"), [(0, "0 items"), (1, "1 item"), (2, "2 items"), (-1, "-1 items")]
)
def test_a_count_has_a_plural_noun_unless_it_is_one(number: int, expected: str) -> None:
    assert count(number, "item") == expected
