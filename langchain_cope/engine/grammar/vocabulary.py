"""What a base's tokens are to a grammar: llguidance's tokenizer, and what closing JSON needs.

Made once for a base, by `Base.vocabulary`; every `Constraint` of that base shares it.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from langchain_cope.engine.grammar.closing import TokenRanks
from langchain_cope.engine.grammar.schema import CALL_BEGIN, CALL_END, Grammar, llguidance
from langchain_cope.engine.grammar.shortest import shortest_texts
from langchain_cope.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_RESERVES = 256


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of one base as grammars see them."""

    tokenizer: Any
    """llguidance's tokenizer."""
    ranks: TokenRanks
    """How far each token leads from the end of JSON."""
    eos_ids: frozenset[int]
    """Tokens that end an answer."""
    special: frozenset[str]
    """Marks of calls that are special tokens, which a grammar names in another way than text."""
    markers: tuple[int, ...]
    """Special tokens that free text may hold, those of calls left out."""
    _reserves: dict[Grammar, int] = field(default_factory=dict, repr=False)

    def reserve(self, grammar: Grammar) -> int:
        """Return the number of tokens of the largest thing that an answer may open."""
        if grammar not in self._reserves:
            if len(self._reserves) >= _MOST_RESERVES:
                self._reserves.clear()
            value, call = self._longest(_values(grammar)), self._longest(_empty_calls(grammar))
            self._reserves[grammar] = value + call
        return self._reserves[grammar]

    def _longest(self, texts: Iterable[str]) -> int:
        return max((len(self.tokenizer.tokenize_str(text)) for text in texts), default=0)


def make_vocabulary(
    tokenizer: "PreTrainedTokenizerBase",
    *,
    model: str,
    size: int,
    eos_ids: frozenset[int],
    markers: frozenset[int],
) -> Vocabulary:
    """Return what the tokens of a base are to a grammar; this takes up to a second.

    Args:
        tokenizer: the base's.
        model: name of the base, for messages.
        size: number of entries of a row of logits.
        eos_ids: tokens that end an answer.
        markers: special tokens that mark a call or a thought.

    Raises:
        InputError: llguidance is not installed.
        ModelError: the tokenizer is a slow one.
    """
    llguidance()
    from llguidance.hf import from_tokenizer
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"the base {model!r} has a slow tokenizer: "
            "tools and structured output need one with tokenizer.json"
        )
    own = from_tokenizer(tokenizer, n_vocab=size, eos_token=sorted(eos_ids))
    ids = tokenizer.get_vocab()
    special = {
        mark for mark in (CALL_BEGIN, CALL_END) if mark in ids and own.is_special_token(ids[mark])
    }
    others = markers - {ids[mark] for mark in special}
    return Vocabulary(
        tokenizer=own,
        ranks=TokenRanks(own, eos_ids),
        eos_ids=eos_ids,
        special=frozenset(special),
        markers=tuple(sorted(token for token in others if own.is_special_token(token))),
    )


def _values(grammar: Grammar) -> Iterator[str]:
    """Yield a short value of every schema in the grammar."""
    schemas = [schema for _, schema in grammar.calls]
    if grammar.answer is not None:
        schemas.append(grammar.answer)
    for schema in schemas:
        yield from shortest_texts(json.loads(schema))


def _empty_calls(grammar: Grammar) -> Iterator[str]:
    """Yield a call of every tool, without its arguments."""
    for name, _ in grammar.calls:
        yield f'{CALL_BEGIN}\n{{"name": "{name}", "arguments": }}\n{CALL_END}'
