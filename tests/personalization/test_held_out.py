"""Which items are held out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_cope.errors import HistoryError
from langchain_cope.history import Item
from langchain_cope.personalization import held_out


def items(count: int, conversations: dict[int, str] | None = None) -> list[Item]:
    named = conversations or {}
    return [
        Item(prompt=f"p{i}", completion=f"c{i}", conversation=named.get(i)) for i in range(count)
    ]


@pytest.mark.parametrize(
    ("count", "expected"), [(5, 2), (10, 2), (12, 2), (13, 3), (50, 10), (74, 15)]
)
def test_the_newest_fifth_is_held_out_and_at_least_two(count: int, expected: int) -> None:
    trained, newest = held_out.split(items(count))
    assert len(newest) == expected
    assert [*trained, *newest] == items(count)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_fewer_than_five_items_are_refused_with_the_count_needed(count: int) -> None:
    with pytest.raises(HistoryError, match=rf"holds {count} different item.*at least 5 are needed"):
        held_out.split(items(count))


def test_a_conversation_falls_on_one_side() -> None:
    trained, newest = held_out.split(items(10, {1: "a", 8: "a", 5: "b", 6: "b"}))
    assert [item.prompt for item in newest] == ["p1", "p8", "p9"]
    assert len(trained) == 7


def test_one_conversation_alone_cannot_be_split() -> None:
    with pytest.raises(HistoryError, match="belong to the newest conversations"):
        held_out.split(items(10, dict.fromkeys(range(10), "a")))


@given(st.integers(5, 60), st.dictionaries(st.integers(0, 59), st.sampled_from("abc")))
def test_every_item_is_on_exactly_one_side(count: int, conversations: dict[int, str]) -> None:
    history = items(count, conversations)
    try:
        trained, newest = held_out.split(history)
    except HistoryError:
        return
    assert sorted([*trained, *newest], key=history.index) == history
    assert {i.conversation for i in trained} & {i.conversation for i in newest} <= {None}
    assert len(newest) >= max(2, round(0.2 * count))


def test_a_version_recognises_what_it_was_trained_on() -> None:
    history = items(20)
    fingerprints = held_out.fingerprint_items(history[:15])
    assert held_out.count_trained_on(fingerprints, history[15:]) == 0
    assert held_out.count_trained_on(fingerprints, history[10:]) == 5
    assert held_out.count_trained_on(None, history) == 0


@pytest.mark.parametrize(
    ("count", "choosing"), [(2, 0), (16, 0), (23, 0), (24, 8), (30, 10), (60, 20), (200, 24)]
)
def test_items_to_choose_by_are_the_oldest_and_judge_nothing(count: int, choosing: int) -> None:
    chosen, judging = held_out.divide(items(count))
    assert chosen == list(range(choosing))
    assert judging == list(range(choosing, count))


@pytest.mark.parametrize("num_items", [0, 40, 80, 200])
@pytest.mark.parametrize("num_judging", [2, 10, 15, 16, 40])
def test_so_many_items_leave_so_many_to_judge(num_judging: int, num_items: int) -> None:
    needed = held_out.items_for(num_judging, num_items)
    assert needed > num_items

    def judges(num_items: int) -> int:
        return len(held_out.divide(held_out.split(items(num_items))[1])[1])

    assert judges(needed) >= num_judging
    assert needed <= max(num_items, 5) + 5 or judges(needed - 5) < num_judging


def test_a_conversation_never_chooses_and_judges() -> None:
    chosen, judging = held_out.divide(items(30, {0: "a", 29: "a"}))
    assert chosen == list(range(1, 10))
    assert judging == [0, *range(10, 30)]
    assert held_out.divide(items(24, {0: "a", 23: "a"})) == ([], list(range(24)))
