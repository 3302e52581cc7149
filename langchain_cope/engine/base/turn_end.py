"""What ends the assistant's turn, read from the chat template.

A checkpoint's `eos_token` is often another token than the one its template closes turns with; a
model that was trained on the template writes the latter. A base that never saw a template writes on
as the next speaker instead: what starts the next turn ends the answer too.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from langchain_cope.engine.base.chat_template import PLAIN_TEMPLATE

_ANSWER, _NEXT = "Zebra4711", "Quince0815"  # texts that no template holds
_NEXT_ROLES = ("user", "system", "assistant")


@dataclass(frozen=True)
class TurnEnd:
    """What ends an answer."""

    ids: frozenset[int] = frozenset()
    """Tokens that close the assistant's turn."""
    texts: tuple[str, ...] = ()
    """Texts that start the next turn, where no token closes a turn."""


def turn_end_of(tokenizer: PreTrainedTokenizerBase) -> TurnEnd:
    """Return what ends the assistant's turn; nothing where the template does not tell."""
    closing = _after_answer(tokenizer, ())
    following = [_after_answer(tokenizer, (role,)) for role in _NEXT_ROLES]
    if tokenizer.chat_template == PLAIN_TEMPLATE:  # no base was trained on its end token
        return TurnEnd(_first_token(tokenizer, closing), _starts(tokenizer, following))
    for text in (closing, *following):
        ids = _first_token(tokenizer, text)
        if ids:
            return TurnEnd(ids)
    return TurnEnd(texts=_starts(tokenizer, following))


def _after_answer(tokenizer: PreTrainedTokenizerBase, next_roles: Sequence[str]) -> str:
    """Return the template's text after an answer, up to that of the next turn if there is one."""
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _ANSWER}]
    turns += [{"role": role, "content": _NEXT} for role in next_roles]
    try:
        text: Any = tokenizer.apply_chat_template(turns, tokenize=False)
    except (TemplateError, TypeError, ValueError):  # what it refuses it does not start either
        return ""
    _, found, after = str(text).rpartition(_ANSWER)
    return after.partition(_NEXT)[0] if found else ""


def _first_token(tokenizer: PreTrainedTokenizerBase, text: str) -> frozenset[int]:
    """Return the first control token in `text`, as a set; empty where it holds none."""
    ids = {entry.content: token for token, entry in tokenizer.added_tokens_decoder.items()}
    ids |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    controls = [content for content in ids if content.strip()]
    if not controls:
        return frozenset()
    longest_first = sorted(controls, key=len, reverse=True)
    found = re.search("|".join(map(re.escape, longest_first)), text)
    return frozenset() if found is None else frozenset([ids[found[0]]])


def _starts(tokenizer: PreTrainedTokenizerBase, following: Sequence[str]) -> tuple[str, ...]:
    """Return what starts the next turn in `following`, without the tokens that close this one."""
    starts = set()
    for text in following:
        for token in tokenizer.all_special_tokens:
            text = text.replace(token, "")
        start = text.strip()
        if len(start) > 1:
            starts.add(f"\n{start}" if "\n" in text[: text.index(start)] else start)
    return tuple(sorted(starts))
