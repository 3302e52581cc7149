"""From token ids to text, piece by piece: incremental detokenising and stop strings.

Pieces joined equal the whole: nothing is shown that a later token would change, and nothing of a stop string.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "�"  # what decoders put for bytes that do not yet make a character


class Detokenizer:
    """Text of a growing list of tokens. ``push`` returns what is new and final; ``flush`` the rest."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", hidden: Collection[int] = ()) -> None:
        """``hidden``: tokens that are left out."""
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._ids: list[int] = []
        self._prefix = 0  # decoding starts here, far enough back for the decoder's own context
        self._read = 0  # tokens before this have been shown

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; empty while a character is unfinished."""
        self._ids.append(token_id)
        text = self._new_text()
        if not text or text.endswith(UNFINISHED):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return text

    def flush(self) -> str:
        """What is left at the end of the answer, an unfinished character as U+FFFD."""
        text = self._new_text()
        self._prefix = self._read = len(self._ids)
        return text

    def _new_text(self) -> str:
        # Decoded with and without the new tokens, because a decoder may treat the first token of a text differently.
        shown = self._decode(self._ids[self._prefix : self._read])
        return self._decode(self._ids[self._prefix :])[len(shown) :]

    def _decode(self, ids: list[int]) -> str:
        shown = [token for token in ids if token not in self._hidden]
        text = self._tokenizer.decode(
            shown, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text if isinstance(text, str) else "".join(text)


class StopStrings:
    """Cuts a stream of text before the first stop string, holding back what may yet become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The part of the text that can be shown now. After a stop string, ``stopped`` is true and the rest is dropped."""
        if not self._stops:
            return piece
        text = self._held + piece
        found = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next(
        (
            size
            for size in range(min(len(text), len(stop) - 1), 0, -1)
            if text.endswith(stop[:size])
        ),
        0,
    )
