"""One answer held to its grammar: before every token, which tokens may come next.

The engine masks the personal model's logits with that before anything else, so that the plausibility head of the contrast is chosen
among what is allowed and is never empty.
"""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from langchain_cope.engine.grammar.closing import Closing, TokenRanks
from langchain_cope.engine.grammar.schema import (
    CALL_BEGIN,
    CALL_END,
    Grammar,
    first_line,
    llguidance,
)
from langchain_cope.engine.grammar.shortest import shortest_texts
from langchain_cope.errors import InputError, ModelError

if TYPE_CHECKING:
    from langchain_cope.engine.base.base import Base

_vocabularies: "WeakKeyDictionary[Base, _Vocabulary]" = WeakKeyDictionary()
_lock = threading.Lock()
_MOST_RESERVES = 256


class Constraint:
    """Where one answer stands in its grammar. The engine's thread owns it."""

    def __init__(
        self, matcher: Any, vocabulary: "_Vocabulary", grammar: Grammar, room: int
    ) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._stuck = False
        reserve = vocabulary.reserve(grammar)
        self._closing = Closing(
            vocabulary.ranks, room, reserve, marked=grammar.text, begin=CALL_BEGIN, end=CALL_END
        )
        self._closing.look_ahead(matcher)

    @property
    def done(self) -> bool:
        """Nothing but the end may follow."""
        return bool(self._matcher.is_stopped()) and not self.error

    @property
    def error(self) -> str:
        """Why the parser gave up (a schema too complex, say); empty where it did not."""
        if self._matcher.is_error():
            return str(self._matcher.get_error())
        return "nothing fits the schema" if self._stuck else ""

    @property
    def in_json(self) -> bool:
        """Whether the answer so far ends within JSON, where stop strings are no stops."""
        return self._closing.in_json

    def mask(self, drafted: Sequence[int] = ()) -> Tensor:
        """Which tokens may come next, after ``drafted``: bool ``(V,)`` on the CPU, at least one of them true."""
        if drafted:
            self._matcher.consume_tokens(list(drafted))
        allowed = torch.frombuffer(
            bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8
        ).bool()
        if drafted:
            self._matcher.rollback(len(drafted))
        if self.error or not bool(allowed.any()):
            self._stuck = True
            allowed = torch.zeros_like(allowed)
            allowed[list(self._vocabulary.eos_ids)] = True
            return allowed
        return self._closing.narrowed(allowed, self._matcher)

    def push(self, token: int) -> None:
        """The answer went on with ``token``."""
        if token in self._vocabulary.eos_ids:
            return
        self._matcher.consume_token(token)
        if not self.error:
            self._closing.push(token)
            self._closing.look_ahead(self._matcher)

    def possible(self, draft: list[int]) -> list[int]:
        """The beginning of ``draft`` that may come next, as far as is known now."""
        draft = self._closing.foreseeable(draft)
        return draft[: self._matcher.validate_tokens(draft)] if draft else draft


@dataclass(frozen=True, eq=False)
class _Vocabulary:
    """What a base's tokens are to a grammar."""

    tokenizer: Any
    ranks: TokenRanks
    eos_ids: frozenset[int]
    special: frozenset[str]
    """Marks of calls that are special tokens, which a grammar names in another way than text."""
    markers: tuple[int, ...]
    """Special tokens that free text may hold."""
    reserves: dict[Grammar, int] = field(default_factory=dict)

    def reserve(self, grammar: Grammar) -> int:
        """Tokens of the largest thing that an answer may open."""
        if grammar not in self.reserves:
            if len(self.reserves) >= _MOST_RESERVES:
                self.reserves.clear()
            texts = [
                text for _, schema in grammar.calls for text in shortest_texts(json.loads(schema))
            ]
            names = [
                f'{CALL_BEGIN}\n{{"name": "{name}", "arguments": }}\n{CALL_END}'
                for name, _ in grammar.calls
            ]
            if grammar.answer is not None:
                texts += shortest_texts(json.loads(grammar.answer))
            longest = [
                max((self._size(text) for text in several), default=0) for several in (texts, names)
            ]
            self.reserves[grammar] = sum(longest)
        return self.reserves[grammar]

    def _size(self, text: str) -> int:
        return len(self.tokenizer.tokenize_str(text))


def compile_grammar(grammar: Grammar, base: "Base", room: int) -> Constraint:
    """``grammar`` for one answer of ``room`` tokens at most.

    Raises ``InputError`` for a schema that cannot be held to, by the keyword, and where llguidance is not installed.
    """
    vocabulary = vocabulary_of(base)
    matcher = llguidance().LLMatcher(vocabulary.tokenizer, _lark(grammar, vocabulary), log_level=0)
    if matcher.is_error():
        raise InputError(
            f"no grammar can be made of this schema: {first_line(matcher.get_error())}"
        )
    return Constraint(matcher, vocabulary, grammar, room)


def vocabulary_of(base: "Base") -> _Vocabulary:
    """What the base's tokens are to a grammar; made at first use, which takes up to a second."""
    with _lock:
        if base not in _vocabularies:
            _vocabularies[base] = _make_vocabulary(base)
        return _vocabularies[base]


def _make_vocabulary(base: "Base") -> _Vocabulary:
    from llguidance.hf import from_tokenizer
    from transformers import PreTrainedTokenizerFast

    if not isinstance(base.tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"the base {base.name!r} has a slow tokenizer: tools and structured output need one with tokenizer.json"
        )
    eos_ids = base.eos_ids
    tokenizer = from_tokenizer(
        base.tokenizer, n_vocab=base.vocabulary_size, eos_token=sorted(eos_ids)
    )
    known = base.tokenizer.get_vocab()
    special = {
        mark
        for mark in (CALL_BEGIN, CALL_END)
        if mark in known and tokenizer.is_special_token(known[mark])
    }
    calls = {known[mark] for mark in special}
    markers = tuple(sorted(i for i in base.markers - calls if tokenizer.is_special_token(i)))
    return _Vocabulary(
        tokenizer, TokenRanks(tokenizer, eos_ids), eos_ids, frozenset(special), markers
    )


def _lark(grammar: Grammar, vocabulary: _Vocabulary) -> str:
    """The grammar in llguidance's dialect of Lark."""
    begin, end = (
        mark if mark in vocabulary.special else _literal(mark) for mark in (CALL_BEGIN, CALL_END)
    )
    lines = ["%llguidance {}"]
    if grammar.text:
        pieces = ["tag"] if grammar.calls and grammar.several else []
        if vocabulary.markers:
            pieces.append("marker")
            lines.append(f"marker: TEXT <[{','.join(map(str, vocabulary.markers))}]>")
        ends = ["tail", *(["tag BLANK"] if grammar.calls and not grammar.several else [])]
        before = f"({' | '.join(pieces)})* " if pieces else ""
        lines += [
            f"start: {before}({' | '.join(ends)})",
            "tail: TEXT",
            r"TEXT: /(.|\n)*/",
            r"BLANK: /\s*/",
        ]
        if begin == CALL_BEGIN:
            lines.append(f'tag: TEXT {begin} "\\n" call "\\n" {end}')
        else:
            lines += [f"opened[lazy]: TEXT {begin}", f'tag: opened "\\n" call "\\n" {end}']
    else:
        calls = ['tag ("\\n" tag)*' if grammar.several else "tag"] if grammar.calls else []
        answer = ["answer"] if grammar.answer is not None else []
        lines += [
            f"start: {' | '.join(calls + answer)}",
            f'tag: {begin} "\\n" call "\\n" {end}' if calls else "",
        ]
    if grammar.calls:
        lines.append(f"call: {' | '.join(f'call_{i}' for i in range(len(grammar.calls)))}")
    for index, (name, schema) in enumerate(grammar.calls):
        head = '{"name": ' + json.dumps(name, ensure_ascii=False) + ', "arguments": '
        lines += [
            f'call_{index}: {_literal(head)} arguments_{index} "}}"',
            f"arguments_{index}: %json {schema}",
        ]
    if grammar.answer is not None:
        lines.append(f"answer: %json {grammar.answer}")
    return "\n".join(lines)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
