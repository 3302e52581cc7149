"""Words of every script: what ROUGE, METEOR, copying and the style view count.

`docs/evaluation.md` says what a word is.
"""

import unicodedata

import regex

# Scripts that write no spaces between words: Chinese and Japanese, then (Line_Break=SA, which is
# how Unicode tells them) Thai, Lao, Khmer, Burmese and their kin.
UNSPACED = r"[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Bopomofo}\p{Line_Break=SA}]"
_WORD = regex.compile(
    rf"""
      (?=[[\p{{L}}\p{{N}}]&&{UNSPACED}]) \X \p{{M}}*              # one sign of these
    | (?=[\p{{Extended_Pictographic}}\p{{Regional_Indicator}}]) \X  # an emoji
    | [[\p{{L}}\p{{N}}]--{UNSPACED}]                                # a word with all its marks;
      [[\p{{L}}\p{{N}}\p{{M}}\u200c\u200d]--{UNSPACED}]*            # joiners stand inside words
    """,
    regex.VERBOSE | regex.VERSION1,
)
_SIGN = regex.compile(r"(?!\s)\X")


def words(text: str) -> list[str]:
    """Return the words of `text` in order, folded: neither case nor compatible forms tell apart.

    A sign is a word where the script writes no spaces, and so is an emoji. A text without any word,
    `:-)` say, is split into its signs.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return list(_WORD.findall(folded) or _SIGN.findall(folded))
