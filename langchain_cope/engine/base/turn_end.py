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
    """Tokens that close the assistant's turn, or start the next where none closes it."""
    texts: tuple[str, ...] = ()
    """Texts that close the assistant's turn or start the next, where no token does."""


def turn_end_of(tokenizer: PreTrainedTokenizerBase) -> TurnEnd:
    """Return what ends the assistant's turn; nothing where the template does not tell."""
    closing = _after_answer(tokenizer, ())
    following = [_after_answer(tokenizer, (role,)) for role in _NEXT_ROLES]
    closes = _first_token(tokenizer, closing)
    if tokenizer.chat_template == PLAIN_TEMPLATE:  # no base was trained on its end token
        return TurnEnd(closes, _starts(tokenizer, following))
    starts = frozenset[int]().union(
        *(_first_token(tokenizer, text, at_start=True) for text in following)
    )
    # What closes the last turn of all may also be what starts the next, whoever speaks then.
    ids = closes | starts if closes <= starts else closes
    return TurnEnd(ids) if ids else TurnEnd(texts=_starts(tokenizer, [closing, *following]))


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


def _first_token(
    tokenizer: PreTrainedTokenizerBase, text: str, *, at_start: bool = False
) -> frozenset[int]:
    """Return the first control token in `text`, as a set; empty where it holds none.

    `at_start`: only one that nothing but white space comes before.
    """
    ids = {entry.content: token for token, entry in tokenizer.added_tokens_decoder.items()}
    ids |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    controls = [content for content in ids if content.strip()]
    if not controls:
        return frozenset()
    longest_first = sorted(controls, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    found = pattern.match(text.lstrip()) if at_start else pattern.search(text)
    return frozenset() if found is None else frozenset([ids[found[0]]])


def _starts(tokenizer: PreTrainedTokenizerBase, following: Sequence[str]) -> tuple[str, ...]:
    """Return the text that ends this turn or starts the next in `following`, without tokens.

    Of two texts of which one holds the other, the shorter.
    """
    starts = set()
    for text in following:
        for token in tokenizer.all_special_tokens:
            text = text.replace(token, "")
        start = text.strip()
        if len(start) > 1:
            starts.add(f"\n{start}" if "\n" in text[: text.index(start)] else start)
    return tuple(sorted(one for one in starts if not any(two in one for two in starts - {one})))
