"""The bytes of single tokens, which together are the text."""

from pathlib import Path

from tiny import make_tokenizer

from langchain_cope.engine.decoding.token_bytes import token_bytes

TEXT = "Wörter, 日本語 and 🙂 …\n"


def test_the_bytes_of_tokens_join_to_the_text(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    pieces = [token_bytes(tokenizer, token) for token in ids]
    assert b"".join(pieces) == TEXT.encode()
    assert any(b"\xf0" in piece and "🙂".encode() != piece for piece in pieces), "in parts"
    assert token_bytes(tokenizer, tokenizer.eos_token_id) == b"<|im_end|>"


def test_byte_tokens_of_sentencepiece_are_one_byte() -> None:
    class Pieces:
        def decode(self, ids: list[int]) -> str:
            return "�"

        def convert_ids_to_tokens(self, token: int) -> str:
            return "<0xE6>"

    assert token_bytes(Pieces(), 1) == b"\xe6"  # type: ignore[arg-type]
