"""ROUGE counts words, or signs, of every script; on English it is rouge-score's own."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.tokenizers import DefaultTokenizer

from langchain_cope.evaluation.rouge import AnyScript, mean_rouge

TEXTS = {
    "Cyrillic": "Привет, мир",
    "umlauts": "Wörter über Straßen",
    "French": "L'été, déjà à l'œuvre",
    "Vietnamese": "Tiếng Việt rất hay",
    "Turkish": "İSTANBUL ılık",
    "Greek": "Καλημέρα κόσμε",
    "Hindi": "हिन्दी में लिखना",
    "Bengali": "বাংলা ভাষা",
    "Tamil": "தமிழ் மொழி",
    "Arabic": "مرحبا بالعالم",
    "Persian, with joiners inside words": "می‌خواهم بروم",
    "Hebrew with points": "שָׁלוֹם עוֹלָם",
    "Korean": "안녕하세요 세계",
    "Japanese": "ラーメンを食べたい。人々",
    "Chinese": "你好，世界",
    "Thai": "สวัสดีครับ",
    "Lao": "ສະບາຍດີ",
    "Khmer": "សួស្តីពិភពលោក",
    "Burmese": "မင်္ဂလာပါ",
    "Tibetan": "བོད་སྐད་",
    "Georgian": "გამარჯობა მსოფლიო",
    "Armenian": "Բարեւ աշխարհ",
    "Amharic": "ሰላም ለዓለም",
    "emoji": "🎉🎉 👨‍👩‍👧‍👦 👍🏽 🇩🇪",
    "symbols": "→ ∑ €",
    "punctuation": ":-) !!!",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_identical_texts_score_one_in_every_script(text: str) -> None:
    assert mean_rouge([text], [text]) == {"rouge1": 1.0, "rougeL": 1.0}
    assert mean_rouge([text], ["nothing alike"])["rouge1"] == 0.0


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Wörter, ÜBER", ["wörter", "über"]),
        ("Wo\u0308rter", ["wörter"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("iPhoneを買う", ["iphon", "を", "買", "う"]),
        ("ไม่ดี", ["ไ", "ม่", "ดี"]),
        ("👨‍👩‍👧‍👦🇩🇪 hi👍🏽", ["👨‍👩‍👧‍👦", "🇩🇪", "hi", "👍🏽"]),
        ("ＡＢＣ１２", ["abc12"]),
        ("don't stop_running", ["don", "t", "stop", "run"]),
        (":-)", [":", "-", ")"]),
        (" \n", []),
    ],
)
def test_a_token_is_a_word_a_sign_without_spaces_or_an_emoji(text: str, tokens: list[str]) -> None:
    assert AnyScript().tokenize(text) == tokens


def test_half_of_the_words_alike_score_one_half() -> None:
    assert mean_rouge(["красный дом"], ["красный кот"]) == {"rouge1": 0.5, "rougeL": 0.5}
    assert mean_rouge(["左右"], ["右左"]) == {"rouge1": 1.0, "rougeL": 0.5}


ENGLISH = DefaultTokenizer(use_stemmer=True)


@given(st.text(st.characters(min_codepoint=9, max_codepoint=126)))
def test_english_has_the_tokens_of_rouge_score(text: str) -> None:
    theirs = ENGLISH.tokenize(text)
    assert AnyScript().tokenize(text) == theirs or not theirs


def test_an_english_authors_texts_have_the_tokens_of_rouge_score() -> None:
    user = json.loads(Path("examples/data/user.jsonl").read_text(encoding="utf-8"))
    texts = [
        text
        for item in [*user["history"], *user["queries"]]
        for text in item.values()
        if text.isascii()
    ]
    assert len(texts) > 50
    for text in texts:
        assert AnyScript().tokenize(text) == ENGLISH.tokenize(text)
