"""One call of the model: messages and keywords become a request, its pieces become chunks.

`ChatCoPe._prepare` makes a `Call` with the functions below; `Call.chunks` is the way back.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from langchain_core.exceptions import ContextOverflowError, ModelNotFoundError
from langchain_core.messages import AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGenerationChunk

from langchain_cope.chat.messages import template_messages
from langchain_cope.chat.reply import message_chunk
from langchain_cope.chat.tools import TOOL_OPTIONS, ToolUse
from langchain_cope.chat.user import PINNED, USER_OPTIONS, PinnedUser
from langchain_cope.engine import Contrast, ContrastRule
from langchain_cope.errors import ContextOverflow, InputError, ModelNotFound

if TYPE_CHECKING:
    from langchain_cope.engine import (
        Base,
        Completion,
        Engine,
        Piece,
        ReplyParts,
        Request,
        TokenLogprobs,
    )

SAMPLING_OPTIONS = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed",
)  # fmt: skip
CALL_OPTIONS = (
    *SAMPLING_OPTIONS,
    *USER_OPTIONS,
    *TOOL_OPTIONS,
    "alpha",
    "tau",
    "contrast",
    "adapter_scale",
    "retrieve",
    "model",
    "logprobs",
    "timeout",
)
"""The keywords that a call takes beside `stop`."""
# LangChain's own, of no meaning here.
_CORE_OPTIONS = ("stream", "ls_structured_output_format", "structured_output_format")
_NO_THOUGHT = "\n</think>\n\n"


class ChatContextOverflow(ContextOverflow, ContextOverflowError):  # noqa: N818
    """A prompt longer than the context; also core's error, on which middleware summarises."""


class ChatModelNotFound(ModelNotFound, ModelNotFoundError):  # noqa: N818
    """A base that is not there; also core's error, on which fallbacks act."""


@dataclass(frozen=True)
class Call:
    """One call, ready to run."""

    user: PinnedUser
    engine: "Engine"
    request: "Request"
    num_retrieved: int = 0
    """Items of the user's that the user's row reads."""
    relevance: float | None = None
    """How much the conversation is like the history, 0 to 1; None where nothing goes by it."""

    def chunks(self, piece: "Piece | Completion") -> Iterator[ChatGenerationChunk]:
        """Yield what a piece adds to the message.

        The completion adds the empty chunk that carries usage and metadata.
        """
        from langchain_cope.engine import Piece

        if isinstance(piece, Piece):
            for part in piece.parts:
                yield ChatGenerationChunk(message=message_chunk(part))
        else:
            yield self._last_chunk(piece)

    def _last_chunk(self, answer: "Completion") -> ChatGenerationChunk:
        num_read, num_written = len(self.request.prompt), len(answer.token_ids)
        usage = UsageMetadata(
            input_tokens=num_read,
            output_tokens=num_written,
            total_tokens=num_read + num_written,
        )
        message = AIMessageChunk(
            content="",
            response_metadata=self.metadata(answer),
            usage_metadata=usage,
            chunk_position="last",
        )
        return ChatGenerationChunk(message=message)

    def metadata(self, answer: "Completion") -> dict[str, Any]:
        """Return the metadata of the message."""
        made_calls = answer.finish_reason == "stop" and answer.num_calls > 0
        metadata: dict[str, Any] = {
            "model_name": self.engine.base.name,
            "model_provider": "cope",
            "user_id": self.user.shown,
            "adapter_version": self.user.version_id,
            "adapter_digest": self.user.digest,
            "alpha": self.request.contrast.alpha,
            "tau": self.request.contrast.tau,
            "contrast": self.request.contrast.rule,
            "adapter_scale": self.request.adapter_scale,
            "relevance": self.relevance,
            "finish_reason": "tool_calls" if made_calls else answer.finish_reason,
            "contrast_changed": answer.contrast_changed,
            "contrast_active_share": answer.contrast_active_share,
            "mean_divergence": answer.mean_divergence,
            "retrieved": self.num_retrieved,
        }
        if self.request.logprobs:
            metadata["logprobs"] = [_token_metadata(token) for token in answer.logprobs]
        return metadata


def check_options(options: Mapping[str, Any]) -> None:
    """Raise InputError for a keyword that a call does not take."""
    unknown = sorted(options.keys() - {PINNED, *CALL_OPTIONS, *_CORE_OPTIONS})
    if unknown:
        raise InputError(
            f"ChatCoPe has no option {', '.join(unknown)}; "
            f"a call takes {', '.join(CALL_OPTIONS)} and stop"
        )


def without_none(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that say something: None is a default, except for the user's own."""
    return {
        name: value for name, value in options.items() if value is not None or name in USER_OPTIONS
    }


def deadline_of(timeout: object) -> float | None:
    """Return when a call of that many seconds ends, by `time.monotonic()`; None: never.

    Raises InputError unless it is a number or None.
    """
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise InputError(f"timeout must be a number of seconds or None, not {timeout!r}")
    return time.monotonic() + timeout


def contrast_of(
    *levels: tuple[float | None, float | None], rule: ContrastRule = "fixed"
) -> Contrast:
    """Return the contrast whose α and τ come from the first level that gives them, else 0.1.

    Args:
        levels: (α, τ) of the call, the model and the version, for example; each may be None.
        rule: when α acts.

    Raises:
        ValueError: the α or τ chosen is out of range, or there is no such rule.
    """
    values: dict[str, float] = {}
    for alpha, tau in levels:
        if alpha is not None:
            values.setdefault("alpha", alpha)
        if tau is not None:
            values.setdefault("tau", tau)
    return Contrast(**values, rule=rule)


def prompt_of(base: "Base", messages: Sequence[BaseMessage], use: ToolUse) -> tuple[list[int], str]:
    """Return (token ids of the prompt, the part of the reply that they already hold).

    That part is the mark of a thought where the chat template opens one, else nothing.
    """
    ids = _prompt_ids(base, messages, use)
    opened = base.thought_opened_by(ids)
    if opened and use.forced:  # what the answer is held to leaves no room for thoughts
        return [*ids, *base.tokenizer.encode(_NO_THOUGHT, add_special_tokens=False)], ""
    return ids, opened


def tokens_in(base: "Base", messages: Sequence[BaseMessage], use: ToolUse) -> int:
    """Return how many tokens a conversation, or any part of one, has as a prompt.

    A part that the chat template refuses is counted between empty turns of the user; one that it
    refuses there too, by its texts. No messages have no tokens.

    Raises:
        InputError: a message holds what no text model can read.
    """
    if not messages:
        return 0
    turns = template_messages(messages)
    texts = [f"{turn['content']}{turn.get('tool_calls', '')}" for turn in turns]
    empty = HumanMessage("")
    parts = (messages, [*messages, empty], [empty, *messages], [empty, *messages, empty])
    for part in parts:
        with suppress(InputError):
            return len(prompt_of(base, part, use)[0])
    return sum(len(base.tokenizer.encode(text, add_special_tokens=False)) for text in texts)


def _prompt_ids(base: "Base", messages: Sequence[BaseMessage], use: ToolUse) -> list[int]:
    native = base.reply_format.native_tools
    instructions = use.instructions(native_tools=native)
    tools = use.tools if native else ()

    def ids(thought_names: Sequence[str]) -> list[int]:
        turns = template_messages(messages, instructions, thought_names=thought_names)
        return base.prompt_ids(turns, tools)

    try:
        return ids(base.reply_format.thought_names)
    except InputError:  # some templates refuse a thought beside text and calls
        return ids(())


def reply_parts(use: ToolUse, opened: str) -> "ReplyParts | None":
    """Return what the reply may hold; `opened` is the part of it that the prompt holds."""
    from langchain_cope.engine import ReplyParts

    if use.forced and not use.tools:  # one JSON value, whatever marks it holds
        return None
    return ReplyParts(
        thoughts=not use.forced, calls=bool(use.tools), text=not use.forced, opened=opened
    )


def _token_metadata(token: "TokenLogprobs") -> dict[str, Any]:
    return {
        "token": token.text,
        "log_p_user": token.log_p_user,
        "log_p_base": token.log_p_base,
        "reward": token.reward,
    }
