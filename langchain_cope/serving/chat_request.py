"""A request for chat completions: what it may hold, and what of it is refused by name.

A field that cannot change the answer is ignored; one that would, and that is not supported, is
refused: nobody shall take an answer for what it is not.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from langchain_cope.engine import LARGEST_STRENGTH, ContrastRule
from langchain_cope.serving.errors import ApiError

# Fields of OpenAI's that never change an answer.
_IGNORED = {
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
}
# Fields of OpenAI's that would change it, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("none", "auto"),
}
_Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
_INT64 = 1 << 63


class CopeOptions(BaseModel):
    """Our own part of a request: how strongly the user's manner acts."""

    model_config = ConfigDict(extra="forbid")

    alpha: Annotated[_Number, Field(ge=0, le=LARGEST_STRENGTH)] | None = None
    """α, the weight of the base that is contrasted away; None: what the version recommends."""
    tau: Annotated[_Number, Field(gt=0, le=1)] | None = None
    """τ; None: what the version recommends."""
    contrast: ContrastRule | None = None
    adapter_scale: Annotated[_Number, Field(ge=0, le=LARGEST_STRENGTH)] | None = None
    """What the adapter's changes are multiplied with; 0: the base alone."""
    adapter_version: StrictStr | None = None
    """None: the active one."""
    on_missing: Literal["base", "error"] = "base"
    """What a user without an adapter gets."""


class StreamOptions(BaseModel):
    """What a stream brings beside the answer."""

    model_config = ConfigDict(extra="ignore")

    include_usage: StrictBool = False


class ChatRequest(BaseModel):
    """The body of a request; `check` refuses what is left over."""

    model_config = ConfigDict(extra="allow")

    model: StrictStr
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    user: Any = None
    """Whose voice; absent: the key's only user, else the base alone."""
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[_Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[_Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0)] | None = None
    min_p: Annotated[_Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[_Number, Field(gt=0)] | None = None
    n: Annotated[StrictInt, Field(ge=1)] | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=16)] | None = None
    seed: Annotated[StrictInt, Field(ge=-_INT64, lt=_INT64)] | None = None
    logprobs: StrictBool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: StrictStr | dict[str, Any] | None = None
    parallel_tool_calls: StrictBool | None = None
    response_format: dict[str, Any] | None = None
    cope: CopeOptions = CopeOptions()

    def check(self, max_choices: int) -> None:
        """Raise ApiError (400) for a field that would change the answer and is not supported."""
        for name, value in (self.model_extra or {}).items():
            if value is None or name in _IGNORED or value in _NEUTRAL.get(name, ()):
                continue
            raise ApiError(
                400,
                "unsupported_parameter",
                f"{name[:80]!r} is not supported with that value: leave it out",
                param=name[:80],
            )
        if self.num_choices > max_choices:
            message = f"n is {self.n}; this server gives {max_choices} answers at most"
            raise ApiError(400, "invalid_value", message, param="n")
        if self.stream_options is not None and not self.stream:
            message = "stream_options goes with `stream: true` only"
            raise ApiError(400, "invalid_value", message, param="stream_options")

    @property
    def num_choices(self) -> int:
        """Answers to the prompt."""
        return self.n or 1

    @property
    def stops(self) -> list[str] | None:
        """What ends the answer; an empty string asks for nothing."""
        if self.stop is None:
            return None
        texts = [self.stop] if isinstance(self.stop, str) else self.stop
        return [text for text in texts if text]

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of a call of `ChatCoPe`."""
        named = (
            "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "logprobs",
            "tools", "tool_choice", "parallel_tool_calls", "response_format",
        )  # fmt: skip
        values = {name: getattr(self, name) for name in named}
        values["max_tokens"] = self.max_completion_tokens or self.max_tokens
        own = ("alpha", "tau", "contrast", "adapter_scale", "adapter_version")
        values |= {name: getattr(self.cope, name) for name in own}
        return {name: value for name, value in values.items() if value is not None}


def split_model(name: str, served: str) -> str | None:
    """Return the user whom a model's name ends with, `served:user`; None where it names none.

    Raises ApiError (404) for another model.
    """
    if name == served:
        return None
    if name.startswith(f"{served}:"):
        return name[len(served) + 1 :]
    raise ApiError(
        404,
        "model_not_found",
        f"there is no such model; this server has {served!r}, and {served + ':USER'!r}",
        param="model",
    )
