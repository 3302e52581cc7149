"""What can go wrong, as a caller would tell it apart.

    CopeError
    ├── InputError            the call or its input was wrong: correct it (also a ValueError)
    │   ├── HistoryError      a history that cannot be read or is too short
    │   │   └── HistoryUnreachable  the place where it is did not answer: try again later
    │   ├── ModelNotFound     no base model of that name or at that path
    │   └── ContextOverflow   a prompt longer than the model's context
    ├── ModelError            the base or the adapter cannot be used as asked
    ├── EngineClosed          the chat or the engine was closed, or the process forked from theirs
    ├── EngineBusy            as many requests wait as may: try again later
    └── Cancelled             stopped on request; nothing was published

Each message says what was given, what was expected and what to do. Errors of the store are in
`adapter_store.errors`.
"""


class CopeError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(CopeError, ValueError):
    """A call or an input that was wrong."""


class HistoryError(InputError):
    """A history that cannot be read or is too short."""


# Named for what happened, without the suffix that rule N818 asks for.
class HistoryUnreachable(HistoryError):  # noqa: N818
    """A history in a place that did not answer, which says nothing of the history."""


class ModelNotFound(InputError):  # noqa: N818
    """No base model of that name or at that path."""


class ContextOverflow(InputError):  # noqa: N818
    """A prompt that does not fit the model's context."""

    def __init__(self, num_tokens: int, context: int) -> None:
        """Say it with both numbers.

        Args:
            num_tokens: tokens of the prompt.
            context: tokens that prompt and answer may have together.
        """
        self.num_tokens = num_tokens
        self.context = context
        super().__init__(
            f"the prompt has {num_tokens} tokens, but the model's context holds {context} and at "
            "least one must be left for the answer: shorten the prompt or choose a base model with "
            "a longer context"
        )


class ModelError(CopeError):
    """A base model or an adapter that cannot be used as asked."""


class EngineClosed(CopeError):  # noqa: N818
    """A chat or an engine that was closed before the request ended, or left behind by a fork."""


class EngineBusy(CopeError):  # noqa: N818
    """As many requests wait as `EngineOptions.max_waiting` lets."""


class Cancelled(CopeError):  # noqa: N818
    """Stopped on request; nothing was published."""
