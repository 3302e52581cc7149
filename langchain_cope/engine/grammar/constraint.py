"""One answer under its grammar: before every token, which tokens may come next.

The engine masks the personal model's logits with that before anything else, so that the contrast's
V_head is chosen among the allowed tokens and is never empty. Nothing hurries an answer: one that
its budget ends is the beginning of the whole one.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from langchain_cope.engine.grammar.lark import to_lark
from langchain_cope.engine.grammar.schema import Grammar, first_line, llguidance
from langchain_cope.engine.grammar.vocabulary import Vocabulary
from langchain_cope.errors import InputError


class Constraint:
    """Where one answer stands in its grammar. The engine's thread owns it."""

    def __init__(self, matcher: Any, vocabulary: Vocabulary) -> None:
        """Constrain an answer by `matcher`, llguidance's parser of tokens of `vocabulary`."""
        self._matcher = matcher
        self._tokenizer = vocabulary.tokenizer
        self._eos_ids = vocabulary.eos_ids
        self._stuck = False

    @property
    def done(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped()) and not self.error

    @property
    def error(self) -> str:
        """Why the parser gave up (a schema too complex, say); empty where it did not."""
        if self._matcher.is_error():
            return first_line(self._matcher.get_error())  # the others hold the answer's text
        return "nothing fits the schema" if self._stuck else ""

    def mask(self, drafted: Sequence[int] = ()) -> Tensor:
        """Return which tokens may come next, after `drafted`.

        Bool `(V,)` on the CPU, at least one of them true.
        """
        if drafted:
            self._matcher.consume_tokens(list(drafted))
        bias = bytearray(self._matcher.compute_logit_bias())
        allowed = torch.frombuffer(bias, dtype=torch.uint8).bool()
        if int(allowed.sum()) == 1:
            allowed = self._spelled(allowed)
        if drafted:
            self._matcher.rollback(len(drafted))
        if self.error or not bool(allowed.any()):
            self._stuck = True
            allowed = torch.zeros_like(allowed)
            allowed[list(self._eos_ids)] = True
        return allowed

    def _spelled(self, allowed: Tensor) -> Tensor:
        """Return the one allowed token, or the first of the text that it stands for.

        llguidance has the base's tokenizer read text without an alternative (an enum's value, a
        name), which makes control tokens of what spells them.
        """
        token = int(allowed.int().argmax())
        if not self._tokenizer.is_special_token(token):
            return allowed
        text = self._matcher.compute_ff_bytes().decode(errors="ignore")
        if not text.startswith(self._tokenizer.decode_str([token])):
            return allowed
        spelled = torch.zeros_like(allowed)
        spelled[self._tokenizer.greedy_tokenize(text)[0]] = True
        return spelled

    def push(self, token: int) -> None:
        """Go on with `token`, the answer's next one."""
        if token not in self._eos_ids:
            self._matcher.consume_token(token)

    def possible(self, draft: list[int]) -> list[int]:
        """Return the beginning of `draft` that may come next."""
        return draft[: self._matcher.validate_tokens(draft)] if draft else draft


def compile_grammar(
    grammar: Grammar, vocabulary: Vocabulary, stop_ids: Collection[int] = ()
) -> Constraint:
    """Return `grammar` made ready for one answer.

    Args:
        grammar: what the answer may be.
        vocabulary: `Base.vocabulary`.
        stop_ids: special tokens that free text may hold, because they end it.

    Raises:
        InputError: no answer can be constrained to a schema; the message names the keyword.
    """
    rules = to_lark(grammar, vocabulary, stop_ids)
    matcher = llguidance().LLMatcher(vocabulary.tokenizer, rules, log_level=0)
    if matcher.is_error():
        reason = first_line(matcher.get_error())
        raise InputError(f"no grammar can be made of this schema: {reason}")
    return Constraint(matcher, vocabulary)
