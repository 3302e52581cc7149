"""What people wrote is text: no control token is ever read out of it.

A chat template puts contents between control tokens and the tokenizer reads the whole, so that an
`<|im_end|>` in a user's message would end the turn. Here such texts are replaced by neutral words
before the template sees them, and come back as ordinary text when the prompt is tokenized. Prompts
without them have the very ids that `apply_chat_template` gives.
"""

import json
import re
import secrets
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from langchain_cope.errors import InputError

# Marks that templates look for in contents, whether the tokenizer has tokens for them or not.
_MARKS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
)  # fmt: skip
_LOOKS_LIKE_CONTROL = re.compile(r"<[|｜].+[|｜]>|</?[a-z]+_[a-z_]+>")
_SECRET = secrets.token_hex(8)  # what no content can hold
_OPEN, _CLOSE = f"zq{_SECRET}q", "zq"
_WORD = re.compile(rf"{_OPEN}(\d+){_CLOSE}", re.IGNORECASE)  # templates capitalize roles
_BOUNDARY = f"\ue000{_SECRET}\ue001"


class Contents:
    """Tells control tokens of a tokenizer and its chat template from texts that spell them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        template = str(tokenizer.chat_template)
        self._tokens = {
            entry.content: token
            for token, entry in tokenizer.added_tokens_decoder.items()
            if _is_control(entry, template)
        }
        marks = [mark for mark in _MARKS if mark in template and mark not in self._tokens]
        self._texts = [*self._tokens, *marks]
        self._numbers = {text: number for number, text in enumerate(self._texts)}
        self._hidden = _any_of(self._texts)
        self._separators = _any_of(list(self._tokens))
        self._controls = set(self._tokens.values()) - {tokenizer.unk_token_id}

    def hide(self, value: Any) -> Any:
        """Return `value`, texts in lists and dictionaries, with neutral words for control texts."""
        if isinstance(value, str):
            return self._hidden.sub(self._word, value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(entry) for entry in value]
        return value

    def ids(self, rendered: str) -> list[int]:
        """Return the token ids of a prompt that was rendered from contents with neutral words.

        Raises:
            InputError: the tokenizer cannot write a hidden text as ordinary text.
        """
        if not self._normalizes and not _WORD.search(rendered):
            return self._ordinary(rendered)
        ids: list[int] = []
        done = start = 0
        before: str | None = None
        for separator in [*self._separators.finditer(rendered), None]:
            end = len(rendered) if separator is None else separator.start()
            after = None if separator is None else separator[0]
            if self._spells_control(rendered[start:end]):
                ids += self._ordinary(rendered[done:start])
                ids += self._as_text(rendered[start:end], before, after)
                done = end
            if separator is not None:
                before, start = after, separator.end()
        return ids + self._ordinary(rendered[done:])

    def _spells_control(self, text: str) -> bool:
        """Return whether a text between control tokens would be read as one, were it not hidden."""
        if _WORD.search(text):
            return True
        return self._normalizes and not self._controls.isdisjoint(self._ordinary(text))

    @cached_property
    def _normalizes(self) -> bool:
        """Whether other texts than the control tokens' own may be read as them.

        A tokenizer may look for them after it has lowered case, say, or put plain for wide letters.
        """
        if not self._tokenizer.is_fast or self._tokenizer.backend_tokenizer.normalizer is None:
            return False
        entries = self._tokenizer.added_tokens_decoder
        return any(entries[token].normalized for token in self._tokens.values())

    def _word(self, found: "re.Match[str]") -> str:
        return f"{_OPEN}{self._numbers[found[0]]}{_CLOSE}"

    def _ordinary(self, text: str) -> list[int]:
        if not text:
            return []
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _as_text(self, hidden: str, before: str | None, after: str | None) -> list[int]:
        """Return the ids of what stands between two control tokens, without any in it.

        They are those that the text would have there, were its control texts ordinary words.
        """
        text = _WORD.sub(lambda word: self._texts[int(word[1])], hidden)
        entries = self._tokenizer.added_tokens_decoder
        if before is not None and entries[self._tokens[before]].rstrip:
            text = text.lstrip()
        if after is not None and entries[self._tokens[after]].lstrip:
            text = text.rstrip()
        ids = self._without_control(text, at_start=before is None)
        if not self._controls.isdisjoint(ids):
            raise InputError(
                "the base's tokenizer has no way to write its control tokens as ordinary text, "
                f"but this text holds some: {text[:200]!r}; leave them out"
            )
        return ids

    def _without_control(self, text: str, *, at_start: bool) -> list[int]:
        plain = self._plain_tokenizer
        if plain is None:
            tokens = self._tokenizer.tokenize(text, split_special_tokens=True)
            ids: Any = self._tokenizer.convert_tokens_to_ids(tokens)
            return list(ids)
        if at_start:
            return list(plain.encode(text, add_special_tokens=False).ids)
        # After another token a text is read otherwise than at the start: no space is put before it.
        return list(plain.encode(_BOUNDARY + text, add_special_tokens=False).ids[1:])

    @cached_property
    def _plain_tokenizer(self) -> Tokenizer | None:
        """A copy of the tokenizer that reads control tokens as text; None for a slow tokenizer.

        A copy, since the switch is one of the whole tokenizer, which other threads use meanwhile.
        """
        if not self._tokenizer.is_fast:
            return None
        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for entry in state["added_tokens"]:
            entry["special"] = entry["content"] in self._tokens
        plain = Tokenizer.from_str(json.dumps(state))
        plain.no_truncation()
        plain.no_padding()
        plain.add_tokens([AddedToken(_BOUNDARY, normalized=False)])
        plain.encode_special_tokens = True
        return plain


def _is_control(entry: AddedToken, template: str) -> bool:
    """Return whether a token means something else than its text.

    Special tokens do, and of the others those that the template writes or that look like one; not
    the words and runs of spaces that some tokenizers keep beside their vocabulary.
    """
    text = entry.content
    if not text.strip():
        return False
    if entry.special or text in _MARKS or _LOOKS_LIKE_CONTROL.fullmatch(text):
        return True
    return text in template and re.search(r"[^\w\s]", text) is not None


def _any_of(texts: list[str]) -> "re.Pattern[str]":
    """Return a pattern of all `texts`, of which the longest is found first."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
