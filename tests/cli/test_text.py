import unicodedata

from cope_lc.text import clean, finite, name_of, one_line, plural, shorten
from hypothesis import given
from hypothesis import strategies as st

ANY = st.text(st.characters(), max_size=200)  # half surrogates included
CONTROLS = {"Cc", "Cs", "Zl", "Zp"}
REORDERING = {"RLO", "LRO", "RLE", "LRE", "RLI", "LRI"}


@given(ANY)
def test_no_control_character_reaches_the_terminal(text: str) -> None:
    for shown in (clean(text), one_line(text), shorten(text), name_of(text)):
        assert not CONTROLS & {unicodedata.category(char) for char in shown}
        assert not REORDERING & {unicodedata.bidirectional(char) for char in shown}
        shown.encode()


@given(ANY)
def test_a_shortened_text_is_short(text: str) -> None:
    assert len(shorten(text, 20)) <= 20


def test_people_s_letters_stay_as_they_are() -> None:
    text = "Grüße, 日本語, עברית, नमस्ते, 👩‍👩‍👧 and a tab"
    assert clean(text) == one_line(text) == text


def test_an_escape_sequence_is_spelled() -> None:
    assert clean("\x1b[2J\x9b\x07\r") == "\\x1b[2J\\x9b\\x07\\x0d"
    assert clean("a\nb\tc", keep="\n\t") == "a\nb\tc"


def test_numbers_that_json_cannot_hold_become_null() -> None:
    value = {"a": [float("nan"), 1.5, (float("inf"), -float("inf"))]}
    assert finite(value) == {"a": [None, 1.5, [None, None]]}


def test_a_count_of_one_is_singular() -> None:
    assert [plural(number, "user") for number in range(3)] == ["0 users", "1 user", "2 users"]
