"""An answer on its way to its reader: from tokens to pieces of text, in the order in which they are shown."""

import queue
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from langchain_cope.engine.adapter_slots import Lease
from langchain_cope.engine.base.base import Base
from langchain_cope.engine.decoding.text import Detokenizer, StopStrings
from langchain_cope.engine.grammar.constraint import compile_grammar
from langchain_cope.engine.request import Chosen, Request, Running, TokenLogprobs
from langchain_cope.errors import Cancelled, ModelError

STOP_SECONDS = 0.05  # between two looks at whether to stop, where no piece comes meanwhile


@dataclass(frozen=True)
class Piece:
    """New text of an answer, with its tokens where log-probabilities were asked for."""

    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    """Every token chosen, an end-of-turn token included."""
    finish_reason: Literal["stop", "length"]
    """``length``: the budget or the context ended it."""
    contrast_changed: float
    """Share of steps whose contrastive argmax is not the personal model's own, before warpers."""
    logprobs: tuple[TokenLogprobs, ...] = ()


Event = Piece | Completion | BaseException


class Job(Running):
    """A request on its way through the engine."""

    def __init__(self, request: Request, base: Base, sink: Callable[[Event], None]) -> None:
        super().__init__(
            request, min(len(request.prompt) + request.sampling.max_tokens, base.context)
        )
        self.cancelled = False
        self.lease: Lease | None = None
        self._base = base
        self._sink = sink
        if request.grammar is not None:
            self.constraint = compile_grammar(
                request.grammar, base.vocabulary, self.limit - len(request.prompt)
            )
        self._detokenizer = Detokenizer(base.tokenizer, base.hidden_ids)
        self._stops = StopStrings(request.sampling.stop)
        self._text: list[str] = []
        self._logprobs: list[TokenLogprobs] = []

    @property
    def ready(self) -> bool:
        """Whether its adapter is there, or will never be."""
        return self.lease is None or self.lease.settled

    def take(self, chosen: Chosen) -> bool:
        """Append a token and pass on what it adds; False where it ends the answer."""
        full = not super().take(chosen)
        eos = chosen.token in self._base.eos_ids
        piece = "" if eos else self._detokenizer.push(chosen.token)
        ended = eos or (self.constraint is not None and self.constraint.done)
        if ended or full:
            piece += self._detokenizer.flush()
        held = (
            self.constraint is not None and self.constraint.in_json
        )  # where stop strings would break what is held
        text = self._stops.flush() + piece if held else self._stops.push(piece)
        if (ended or full) and not self._stops.stopped:
            text += self._stops.flush()
        self._send(text, chosen)
        if self.constraint is not None and self.constraint.error:
            self.fail(
                ModelError(
                    f"the grammar of this answer became too complex: {self.constraint.error}"
                )
            )
            return False
        if not (ended or full or self._stops.stopped):
            return True
        self._sink(self._completion("stop" if ended or self._stops.stopped else "length"))
        return False

    def expire(self) -> bool:
        """Fail where the deadline is over; True where it is."""
        deadline = self.request.deadline
        if deadline is None or time.monotonic() < deadline:
            return False
        self.fail(TimeoutError("the answer was not done in time; it was stopped"))
        return True

    def fail(self, error: BaseException) -> None:
        """Tell the reader that nothing more comes, and why."""
        self._sink(error)

    def _send(self, text: str, chosen: Chosen) -> None:
        tokens = self._new_logprobs(chosen)
        if text or tokens:
            self._text.append(text)
            self._sink(Piece(text, tokens))

    def _new_logprobs(self, chosen: Chosen) -> tuple[TokenLogprobs, ...]:
        if chosen.logprobs is None:
            return ()
        user, base = chosen.logprobs
        text = str(self._base.tokenizer.decode([chosen.token]))
        self._logprobs.append(
            TokenLogprobs(chosen.token, text, user, base, user - self.request.contrast.alpha * base)
        )
        return (self._logprobs[-1],)

    def _completion(self, reason: Literal["stop", "length"]) -> Completion:
        share = self.num_changed / len(self.ids)
        return Completion(
            "".join(self._text), tuple(self.ids), reason, share, tuple(self._logprobs)
        )


class Stream(Iterator[Piece | Completion]):
    """Pieces of one answer as they come, the `Completion` last. Closing or dropping it cancels the request."""

    def __init__(self, job: Job, events: "queue.SimpleQueue[Event | None]") -> None:
        self._job = job
        self._events = events
        self._ended = False

    def __next__(self) -> Piece | Completion:
        return self._next()

    def completion(self, should_stop: Callable[[], bool] | None = None) -> Completion:
        """The whole answer, once it is there. Raises ``Cancelled`` soon after ``should_stop`` says so; close it then."""
        while should_stop is None or not should_stop():
            with suppress(queue.Empty):
                event = self._next(None if should_stop is None else STOP_SECONDS)
                if isinstance(event, Completion):
                    return event
        raise Cancelled("stopped on request while the model was answering")

    def _next(self, timeout: float | None = None) -> Piece | Completion:
        if self._ended:
            raise StopIteration
        event = self._events.get(timeout=timeout)
        if event is None:  # closed by another thread
            raise StopIteration
        self._ended = not isinstance(event, Piece)
        if isinstance(event, BaseException):
            raise event
        return event

    def close(self) -> None:
        """Stop the request within one token. Nothing more comes, nor to a thread that waits; harmless after the end."""
        self._ended = self._job.cancelled = True
        self._events.put(None)

    def __del__(self) -> None:
        self._job.cancelled = True
