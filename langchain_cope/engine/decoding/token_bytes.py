"""The bytes that one token stands for, also where they are only a part of a character."""

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from langchain_cope.engine.decoding.text import UNFINISHED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: "PreTrainedTokenizerBase", token: int) -> bytes:
    """Return the bytes of a token: those of its text, unless that holds unfinished characters."""
    text = str(tokenizer.decode([token]))
    if UNFINISHED not in text:
        return text.encode()
    piece = str(tokenizer.convert_ids_to_tokens(token))
    single = _BYTE_TOKEN.fullmatch(piece)
    if single:
        return bytes([int(single[1], 16)])
    alphabet = _byte_alphabet()
    if all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    return text.encode()


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """Return the byte of every character with which byte-level tokenizers write bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
    return {character: byte for byte, character in alphabet.items()}
