"""Items most like a text, by BM25."""

import pytest

from langchain_cope.history.items import Item
from langchain_cope.history.similar import most_alike

ITEMS = [
    Item(prompt="Write a headline about the senate vote.", completion="Senate Votes At Last"),
    Item(prompt="Write a headline about apple cake.", completion="Cake For Everyone"),
    Item(prompt="Write a headline about an apple harvest.", completion="A Sweet Autumn"),
    Item(prompt="Write a headline about the tax vote.", completion="Taxes, Again"),
]


def test_the_most_alike_comes_last() -> None:
    found = most_alike(ITEMS, "Write a headline about a cake with one apple.", 2)
    assert found == [ITEMS[2], ITEMS[1]]
    assert most_alike(ITEMS, "Write a headline about a cake with one apple.", 1) == [ITEMS[1]]


def test_the_newer_of_equal_ones_is_taken() -> None:
    twins = [*ITEMS, ITEMS[1].model_copy(update={"completion": "Everyone For Cake"})]
    assert most_alike(twins, "cake", 1) == [twins[4]]


@pytest.mark.parametrize("text", ["", "Hi! How are you?", "Write a letter to my landlord, please."])
def test_what_nearly_all_items_hold_is_no_likeness(text: str) -> None:
    assert most_alike(ITEMS, text, 3) == []


def test_an_item_that_shares_next_to_nothing_is_left_out() -> None:
    unlike = " ".join(f"word{number}" for number in range(40))
    assert most_alike(ITEMS, f"{unlike} cake", 3) == []
    assert most_alike(ITEMS, "three words of cake", 3) == [ITEMS[1]]


def test_no_items_and_no_number_give_none() -> None:
    assert most_alike([], "cake", 3) == []
    assert most_alike(ITEMS, "cake", 0) == []


def test_scores_order_as_the_formula_written_out() -> None:
    """One word, three lengths and counts: BM25 with k1 1.2 and b 0.75."""
    words = ["fox", "fox fox dog", "fox dog cat cow hen pig", "dog"]
    others = ["hen", "cow", "pig", "cat"]
    items = [Item(prompt=text, completion="x") for text in [*words, *others]]
    lengths = [len(text.split()) + 1 for text in [*words, *others]]
    usual = sum(lengths) / len(lengths)

    def score(count: int, length: int) -> float:
        return count * 2.2 / (count + 1.2 * (0.25 + 0.75 * length / usual))

    expected = sorted((0, 1, 2), key=lambda at: score(words[at].split().count("fox"), lengths[at]))
    assert most_alike(items, "fox", 3) == [items[at] for at in expected]
