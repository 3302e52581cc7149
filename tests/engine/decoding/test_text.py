"""Text out of tokens, piece by piece: nothing is lost, and nothing is shown too early."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from langchain_cope.engine.decoding.text import Detokenizer, StopStrings

quickly = settings(deadline=None, max_examples=120)
TEXTS = [
    "plain words",
    "smile 🙂 and 👩‍👩‍👧 family",
    "日本語のテキスト",
    "a\ufffdb literal replacement",
    "  two  spaces ",
    "é",
    "𝔘𝔫𝔦",
    "",
]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def sentence_piece() -> PreTrainedTokenizerFast:
    """Llama 2's way: ▁ for spaces, bytes for unknown characters, a leading space stripped."""
    words = ["<unk>", "▁", "▁the", "▁dog", "s", "▁s", "t", "he", "▁a"]
    words += [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def pushed(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, tokenizer.all_special_ids)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_never_show_half_a_character(
    text: str, byte_level: PreTrainedTokenizerFast
) -> None:
    pieces = pushed(byte_level, byte_level.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_an_emoji_split_over_tokens_comes_as_one_piece(byte_level: PreTrainedTokenizerFast) -> None:
    ids = byte_level.encode("👍", add_special_tokens=False)
    assert len(ids) > 1
    assert pushed(byte_level, ids) == [""] * (len(ids) - 1) + ["👍", ""]


def test_an_emoji_cut_off_by_the_end_is_shown_as_unfinished(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    ids = byte_level.encode("a👍", add_special_tokens=False)[:-1]
    assert "".join(pushed(byte_level, ids)) == byte_level.decode(ids)


def test_special_tokens_are_not_text(byte_level: PreTrainedTokenizerFast) -> None:
    ids = byte_level.encode("a<|im_start|>b<|endoftext|>", add_special_tokens=False)
    assert "".join(pushed(byte_level, ids)) == "ab"


@quickly
@given(ids=st.lists(st.integers(0, 383), max_size=40))
def test_any_tokens_at_all_join_to_what_the_tokenizer_decodes(
    byte_level: PreTrainedTokenizerFast, ids: list[int]
) -> None:
    assert "".join(pushed(byte_level, ids)) == byte_level.decode(ids, skip_special_tokens=True)


# Words, and characters spelt in bytes. (Of broken bytes this decoder garbles the whole run,
# complete characters in it as well.)
spelt = st.characters(exclude_categories=["Cs"]).map(lambda c: [9 + byte for byte in c.encode()])
words = st.integers(1, 8).map(lambda word: [word])


@quickly
@given(parts=st.lists(words | spelt, max_size=20))
def test_any_characters_of_a_sentencepiece_decoder_join_too(
    sentence_piece: PreTrainedTokenizerFast, parts: list[list[int]]
) -> None:
    ids = list(itertools.chain.from_iterable(parts))
    whole = sentence_piece.decode(ids, skip_special_tokens=True)
    assert "".join(pushed(sentence_piece, ids)) == whole


letters = st.text("ab", max_size=30)
stops = st.text("ab", min_size=1, max_size=4)


def shown(pieces: list[str], *stop: str) -> tuple[str, bool]:
    strings = StopStrings(stop)
    text = ""
    for piece in pieces:
        text += strings.push(piece)
        if strings.stopped:
            return text, True
    return text + strings.flush(), False


@quickly
@given(pieces=st.lists(letters, max_size=8), stop=stops)
def test_however_a_text_falls_into_pieces_it_ends_before_the_stop_string(
    pieces: list[str], stop: str
) -> None:
    whole = "".join(pieces)
    assert shown(pieces, stop) == (whole.split(stop)[0], stop in whole)


@quickly
@given(pieces=st.lists(letters, max_size=8), several=st.lists(stops, min_size=1, max_size=3))
def test_of_several_stop_strings_none_is_ever_shown(pieces: list[str], several: list[str]) -> None:
    whole = "".join(pieces)
    text, stopped = shown(pieces, *several)
    assert whole.startswith(text)
    assert not any(stop in text for stop in several)
    assert stopped == any(stop in whole for stop in several)
    assert stopped or text == whole


def test_text_that_can_no_longer_become_a_stop_string_is_shown() -> None:
    strings = StopStrings(["\nUser:"])
    pieces = ["Hello", "\n", "Us", "e it", "\nUser", ":"]
    assert [strings.push(piece) for piece in pieces] == ["Hello", "", "", "\nUse it", "", ""]
    assert strings.stopped
