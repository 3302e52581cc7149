"""Answers in OpenAI's form: the engine's pieces as chunks, or all of them as one completion."""

import math
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from langchain_cope.engine import THOUGHT, TextPart

if TYPE_CHECKING:
    from langchain_cope.chat.call import Call
    from langchain_cope.engine import Completion, Part, Piece, TokenLogprobs

_LEAST = -9999.0  # OpenAI's own, for what JSON has no number for
_EXTENSION = (
    "adapter_version", "alpha", "tau", "contrast", "adapter_scale", "contrast_changed",
    "contrast_active_share", "relevance",
)  # fmt: skip


@dataclass(frozen=True)
class Heading:
    """What every chunk of an answer repeats."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str
    fingerprint: str
    """Base and adapter version, by their digests."""

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return a chunk of a stream."""
        return {**self._fields("chat.completion.chunk"), "choices": choices, **more}

    def completion(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return a whole answer."""
        return {**self._fields("chat.completion"), "choices": choices, **more}

    def _fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def new_id() -> str:
    """Return the id of a new answer."""
    return f"chatcmpl-{uuid.uuid4().hex}"


def first_choice(index: int) -> dict[str, Any]:
    """Return the choice of a stream's first chunk: who speaks."""
    return _choice(index, {"role": "assistant", "content": ""})


def piece_choices(index: int, piece: "Piece") -> Iterable[dict[str, Any]]:
    """Yield the choices of the chunks that a piece becomes: one for each of its parts."""
    logprobs = _logprobs(piece.logprobs)
    for part in piece.parts:
        yield _choice(index, _delta(part), logprobs)
        logprobs = None
    if logprobs is not None:  # of tokens whose text is not known yet, or not shown
        yield _choice(index, {"content": ""}, logprobs)


def last_choice(index: int, call: "Call", answer: "Completion") -> dict[str, Any]:
    """Return the choice of a stream's last chunk: why it ended."""
    return {**_choice(index, {}), "finish_reason": call.metadata(answer)["finish_reason"]}


def whole_choice(
    index: int, call: "Call", pieces: Sequence["Piece"], answer: "Completion"
) -> dict[str, Any]:
    """Return the choice of an answer that is not streamed."""
    texts: dict[str, list[str]] = {"content": [], "reasoning_content": []}
    calls: list[dict[str, Any]] = []
    for piece in pieces:
        for part in piece.parts:
            delta = _delta(part)
            for name in texts.keys() & delta.keys():
                texts[name].append(delta[name])
            for new in delta.get("tool_calls", ()):
                _add_call(calls, new)
    content = "".join(texts["content"])
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if calls and not content else content,
        "refusal": None,
    }
    if calls:
        message["tool_calls"] = calls
    if texts["reasoning_content"]:
        message["reasoning_content"] = "".join(texts["reasoning_content"])
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(answer.logprobs) if call.request.logprobs else None,
        "finish_reason": call.metadata(answer)["finish_reason"],
    }


def usage(call: "Call", answers: Sequence["Completion"]) -> dict[str, int]:
    """Return the tokens read and written; a prompt counts once, however many answers it has."""
    read = len(call.request.prompt)
    written = sum(len(answer.token_ids) for answer in answers)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def extension(call: "Call", answers: Sequence["Completion"]) -> dict[str, Any]:
    """Return our own part of an answer: who spoke, and how far that changed the words."""
    described = [call.metadata(answer) for answer in answers]
    own = {name: described[0][name] for name in _EXTENSION}
    for share in ("contrast_changed", "contrast_active_share"):
        own[share] = sum(metadata[share] for metadata in described) / len(described)
    if not call.request.personal:
        own["adapter_version"] = None  # its scale is 0: the base alone has spoken
    return own


def _choice(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _delta(part: "Part") -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"reasoning_content" if part.field == THOUGHT else "content": part.text}
    function: dict[str, Any] = {"arguments": part.arguments}
    call: dict[str, Any] = {"index": part.index, "function": function}
    if part.is_first:
        call |= {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
        function["name"] = part.name or ""
    return {"tool_calls": [call]}


def _add_call(calls: list[dict[str, Any]], new: dict[str, Any]) -> None:
    """Add a piece of a call to the calls so far."""
    if "id" in new:
        calls.append({name: new[name] for name in ("id", "type", "function")})
    else:
        calls[-1]["function"]["arguments"] += new["function"]["arguments"]


def _logprobs(tokens: Sequence["TokenLogprobs"]) -> dict[str, Any] | None:
    if not tokens:
        return None
    return {"content": [_token(token) for token in tokens], "refusal": None}


def _token(token: "TokenLogprobs") -> dict[str, Any]:
    return {
        "token": token.text,
        "bytes": list(token.data),
        "logprob": _number(token.log_p_user),
        "top_logprobs": [],
        "log_p_base": _number(token.log_p_base),
        "reward": _number(token.reward),
    }


def _number(value: float) -> float:
    return value if math.isfinite(value) else _LEAST
