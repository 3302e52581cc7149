"""From token ids to text, piece by piece: incremental detokenising and stop strings.

Pieces joined equal the whole: nothing is shown that a later token would change, and nothing of a
stop string.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "�"
"""What decoders put for bytes that do not yet make a character."""


class Detokenizer:
    """Text of a growing list of tokens: `push` returns what is new and final, `flush` the rest."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", hidden: Collection[int] = ()) -> None:
        """Decode with `tokenizer`, leaving out the tokens in `hidden`."""
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._ids: list[int] = []
        self._prefix = 0  # decoding starts here, far enough back for the decoder's own context
        self._read = 0  # tokens before this have been shown

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes; empty while a character is unfinished."""
        self._ids.append(token_id)
        text = self._new_text()
        if not text or text.endswith(UNFINISHED):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return text

    def flush(self) -> str:
        """Return what is left at the end of the answer, an unfinished character as U+FFFD."""
        text = self._new_text()
        self._prefix = self._read = len(self._ids)
        return text

    def _new_text(self) -> str:
        # Decoded with and without the new tokens, because a decoder may treat the first token of a
        # text differently.
        shown = self._decode(self._ids[self._prefix : self._read])
        return self._decode(self._ids[self._prefix :])[len(shown) :]

    def _decode(self, ids: list[int]) -> str:
        shown = [token for token in ids if token not in self._hidden]
        text = self._tokenizer.decode(
            shown, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text if isinstance(text, str) else "".join(text)


class StopStrings:
    """Cuts a stream of text before the first stop string, holding back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False
        """Whether a stop string came; what follows it is dropped."""

    def push(self, piece: str) -> str:
        """Return the part of the text that can be shown now, after `piece` was added."""
        if not self._stops:
            return piece
        text = self._held + piece
        starts = [text.find(stop) for stop in self._stops]
        first = min((start for start in starts if start >= 0), default=None)
        if first is not None:
            self.stopped, self._held = True, ""
            return text[:first]
        shown = len(text) - max(overlap(text, stop) for stop in self._stops)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """Return what was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins, and is not all of, `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
