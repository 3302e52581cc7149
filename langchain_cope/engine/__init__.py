"""The contrastive engine: token ids and a peft folder in, text out.

It knows no LangChain and no store. This is its front door: what lies above imports nothing past it.
Read `engine.py` (who may call), `scheduler.py` (who is in the batch) and `batch.py` (one step)
first, then `next_token.py` and `decoding/contrast.py` (the rule). Names are loaded when first used,
so that importing costs nothing.
"""

from typing import TYPE_CHECKING

from langchain_cope._front_door import lazy_names

if TYPE_CHECKING:
    from langchain_cope.engine.adapter import CONFIG, WEIGHTS, Adapter, read_weights
    from langchain_cope.engine.answer import Completion, Piece, Stream, TokenLogprobs
    from langchain_cope.engine.base.base import Base
    from langchain_cope.engine.base.bundled import (
        SMOLLM2_INSTALL,
        STARTER,
        default_model,
        smollm2_file,
    )
    from langchain_cope.engine.base.context import context_of
    from langchain_cope.engine.base.forms import Message
    from langchain_cope.engine.base.gguf.header import gguf_context
    from langchain_cope.engine.base.gguf.source import gguf_path
    from langchain_cope.engine.base.loading import load_base
    from langchain_cope.engine.base.prompt_profile import PromptProfile, questions_of
    from langchain_cope.engine.base.reply_format import ANSWER, THOUGHT, ReplyFormat
    from langchain_cope.engine.call_text import CallPart
    from langchain_cope.engine.checks import check_option, is_number, is_whole
    from langchain_cope.engine.decoding.sampling import Sampling
    from langchain_cope.engine.device import give_back, limit_own_threads
    from langchain_cope.engine.engine import Engine, Statistics
    from langchain_cope.engine.grammar.schema import (
        CALL_BEGIN,
        CALL_END,
        Grammar,
        can_constrain,
        closed_schema,
    )
    from langchain_cope.engine.options import (
        ADAPTER_ALONE,
        CONTRAST_RULES,
        LARGEST_STRENGTH,
        MOST_ALPHA,
        Contrast,
        ContrastRule,
        EngineOptions,
        check_adapter_scale,
        check_alpha,
        check_tau,
    )
    from langchain_cope.engine.reply import Part, ReplyParts, TextPart
    from langchain_cope.engine.request import AdapterSource, Request

__all__ = [
    "ADAPTER_ALONE",
    "ANSWER",
    "CALL_BEGIN",
    "CALL_END",
    "CONFIG",
    "CONTRAST_RULES",
    "LARGEST_STRENGTH",
    "MOST_ALPHA",
    "SMOLLM2_INSTALL",
    "STARTER",
    "THOUGHT",
    "WEIGHTS",
    "Adapter",
    "AdapterSource",
    "Base",
    "CallPart",
    "Completion",
    "Contrast",
    "ContrastRule",
    "Engine",
    "EngineOptions",
    "Grammar",
    "Message",
    "Part",
    "Piece",
    "PromptProfile",
    "ReplyFormat",
    "ReplyParts",
    "Request",
    "Sampling",
    "Statistics",
    "Stream",
    "TextPart",
    "TokenLogprobs",
    "can_constrain",
    "check_adapter_scale",
    "check_alpha",
    "check_option",
    "check_tau",
    "closed_schema",
    "context_of",
    "default_model",
    "gguf_context",
    "gguf_path",
    "give_back",
    "is_number",
    "is_whole",
    "limit_own_threads",
    "load_base",
    "questions_of",
    "read_weights",
    "smollm2_file",
]

_MODULES = {
    "ADAPTER_ALONE": "options",
    "ANSWER": "base.reply_format",
    "Adapter": "adapter",
    "AdapterSource": "request",
    "Base": "base.base",
    "CALL_BEGIN": "grammar.schema",
    "CALL_END": "grammar.schema",
    "CONFIG": "adapter",
    "CONTRAST_RULES": "options",
    "LARGEST_STRENGTH": "options",
    "MOST_ALPHA": "options",
    "CallPart": "call_text",
    "Completion": "answer",
    "Contrast": "options",
    "ContrastRule": "options",
    "Engine": "engine",
    "EngineOptions": "options",
    "Grammar": "grammar.schema",
    "Message": "base.forms",
    "Part": "reply",
    "Piece": "answer",
    "PromptProfile": "base.prompt_profile",
    "ReplyFormat": "base.reply_format",
    "ReplyParts": "reply",
    "Request": "request",
    "SMOLLM2_INSTALL": "base.bundled",
    "STARTER": "base.bundled",
    "Sampling": "decoding.sampling",
    "Statistics": "engine",
    "Stream": "answer",
    "THOUGHT": "base.reply_format",
    "TextPart": "reply",
    "TokenLogprobs": "answer",
    "WEIGHTS": "adapter",
    "can_constrain": "grammar.schema",
    "check_adapter_scale": "options",
    "check_alpha": "options",
    "check_option": "checks",
    "check_tau": "options",
    "closed_schema": "grammar.schema",
    "context_of": "base.context",
    "default_model": "base.bundled",
    "gguf_context": "base.gguf.header",
    "gguf_path": "base.gguf.source",
    "give_back": "device",
    "limit_own_threads": "device",
    "is_number": "checks",
    "is_whole": "checks",
    "load_base": "base.loading",
    "questions_of": "base.prompt_profile",
    "read_weights": "adapter",
    "smollm2_file": "base.bundled",
}
if not TYPE_CHECKING:  # type checkers read the imports above instead
    __getattr__, __dir__ = lazy_names(__name__, _MODULES)
