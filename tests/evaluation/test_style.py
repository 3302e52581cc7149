import pytest

from langchain_cope.evaluation.style import mask_for, share_unspaced


def test_words_of_nearly_all_users_stay_and_others_leave_their_shape() -> None:
    users = [["The cat and the dog"], ["the sun AND moon"]] * 9
    mask = mask_for([*users, ["and the 2024 end"], ["only the moon"]])
    assert mask("The iPhone-15 and a McDonald, the USA!") == "The xXx-9 and x XxXx, the X!"


def test_a_word_of_fewer_users_is_no_function_word() -> None:
    assert mask_for([["a und b"]] * 8 + [["oder"]] * 2)("und") == "x"
    assert mask_for([["a und b"]] * 9 + [["oder"]])("und") == "und"


def test_numbers_are_never_function_words() -> None:
    assert mask_for([["in 2024"]] * 5)("in 2024, 3½") == "in 9, 9"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Привет, МИР и", "Xx, X и"),
        ("مرحبا بالعالم، و", "x x، و"),
        ("हिन्दी में और", "x x और"),
        ("Cafe\u0301 ✨\n\n- done 🎉", "Xx ✨\n\n- x 🎉"),
    ],
)
def test_words_of_every_script_have_shapes(text: str, masked: str) -> None:
    assert mask_for([["и و और"]] * 3)(text) == masked


def test_the_share_without_spaces_is_of_letters() -> None:
    assert share_unspaced(["ab, 12!", "左右"]) == 1 / 2
    assert share_unspaced(["안녕하세요 세계", "Привет"]) == 0
    assert share_unspaced(["สวัสดีครับ"]) == 1
    assert share_unspaced(["123 :-)"]) == 0
