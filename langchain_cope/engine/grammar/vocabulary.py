"""What a base's tokens are to a grammar.

Made once for a base, by `Base.vocabulary`; every `Constraint` of that base shares it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from langchain_cope.engine.grammar.schema import CALL_BEGIN, CALL_END, llguidance
from langchain_cope.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of one base as grammars see them."""

    tokenizer: Any
    """llguidance's tokenizer."""
    eos_ids: frozenset[int]
    """Tokens that end an answer."""
    special: frozenset[str]
    """Marks of calls that are special tokens, which a grammar names in another way than text."""
    markers: tuple[int, ...]
    """Special tokens that free text may hold, those of calls left out."""


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
        eos_ids=eos_ids,
        special=frozenset(special),
        markers=tuple(sorted(token for token in others if own.is_special_token(token))),
    )
