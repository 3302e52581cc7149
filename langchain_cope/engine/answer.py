"""What comes back: tokens turned into parts of a reply and delivered to the reader in their order.

`ActiveRequest` is a request on its way: its state in the batch, and the sink that its reader's
events go to. `Piece` and `Completion` are those events, `Stream` is the reader's end.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from langchain_cope.engine import forks
from langchain_cope.engine.adapter import Adapter
from langchain_cope.engine.adapter_slots import Lease
from langchain_cope.engine.base.base import Base
from langchain_cope.engine.base.reply_format import ANSWER
from langchain_cope.engine.decoding.adaptive import AdaptiveContrast
from langchain_cope.engine.decoding.speculation import PromptLookup
from langchain_cope.engine.decoding.text import Detokenizer
from langchain_cope.engine.decoding.token_bytes import token_bytes
from langchain_cope.engine.grammar.constraint import Constraint, compile_grammar
from langchain_cope.engine.reply import Part, ReplyReader, TextPart
from langchain_cope.engine.request import Request
from langchain_cope.engine.rows import Row
from langchain_cope.errors import Cancelled, InputError, ModelError

_STOP_INTERVAL = 0.05  # seconds between two calls of `should_stop` while no piece comes


@dataclass(frozen=True)
class NextToken:
    """The token by which an answer grows."""

    token: int
    changed: bool
    """True where the contrast's likeliest token is not the personal model's own."""
    contrasted: bool = False
    """True where α acted."""
    divergence: float = 0.0
    """Of the two rows, in nats, where the contrast adapts to it."""
    logprobs: tuple[float, float] | None = None
    """(log p_user, log p_base) in nats, where the request asks for it."""
    no_number: Literal["", "personal", "base"] = ""
    """Whose logits hold NaN or infinity, so that nothing can be chosen; empty: nobody's."""


@dataclass(frozen=True)
class TokenLogprobs:
    """How one token came about, in nats."""

    token_id: int
    text: str
    log_p_user: float
    log_p_base: float
    reward: float
    """log p_user − α · log p_base, the paper's implicit reward."""
    data: bytes = b""
    """Its bytes, which may be a part of a character."""


@dataclass(frozen=True)
class Piece:
    """What is new in a reply, with its tokens where log-probabilities were asked for."""

    parts: tuple[Part, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def text(self) -> str:
        """The answer's text in it."""
        texts = [part for part in self.parts if isinstance(part, TextPart)]
        return "".join(part.text for part in texts if part.field == ANSWER)


@dataclass(frozen=True)
class Completion:
    """A whole reply."""

    text: str
    """The answer's, without thoughts and calls where the request tells them apart."""
    token_ids: tuple[int, ...]
    """Every token chosen, an end-of-turn token included."""
    finish_reason: Literal["stop", "length"]
    """`length`: the budget or the context ended it, perhaps in the middle of a call."""
    contrast_changed: float
    """Share of steps whose contrastive argmax is not the personal model's own, before warpers."""
    contrast_active_share: float = 0.0
    """Share of steps in which α acted."""
    mean_divergence: float | None = None
    """Of adapter and base, in nats a token; None where the contrast is not adaptive."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of `token_ids`, and of `Request.closing` where the end of the turn was chosen."""
    num_calls: int = 0
    """How many tool calls are whole."""
    queue_seconds: float = field(default=0.0, compare=False)
    """From the request to its admission: for room and for its adapter."""
    first_token_seconds: float = field(default=0.0, compare=False)
    """From the request to the first token."""


Event = Piece | Completion | BaseException
"""What a reader gets: pieces, then a completion or an error, which is the last."""


class ActiveRequest:
    """A request on its way through the engine: its tokens so far and the text made of them."""

    def __init__(self, request: Request, base: Base, sink: Callable[[Event], None]) -> None:
        """Raises InputError for a grammar that cannot be held to."""
        self.request = request
        longest = max(map(len, request.prompts))
        self._room = min(request.sampling.max_tokens, base.context - longest)
        """Tokens of the answer, at most."""
        self.limit = min(longest + self._room + len(request.closing), base.context)
        """Tokens of the longest prompt, the answer, and what closes it, at most."""
        self.tokens = list(request.prompt)
        """Prompt and answer."""
        self.base_tokens = self.tokens
        """The same as the base's row reads them."""
        if request.num_rows == 2 and request.base_prompt is not None:
            self.base_tokens = list(request.base_prompt)
        self.answer_ids: list[int] = []
        """Tokens of the answer alone."""
        self.adapter: Adapter | None = None
        """The adapter at the request's scale; one from a slot comes before the request's turn."""
        if isinstance(request.adapter, Adapter):
            self.use(request.adapter)
        self.lease: Lease | None = None
        """Its hold on a slot, where its adapter comes from one."""
        self.rows: tuple[Row, ...] = ()
        """In the batch: the personal row, then the base's where the request has two."""
        self.lookup: PromptLookup | None = None
        """Where speculation looks for what comes next."""
        self.constraint: Constraint | None = None
        """What may come next, where the request has a grammar."""
        self.forced: int | None = None
        """The next token, where it is given: one of `Request.closing`."""
        self.finished = False
        """True once the answer is whole, or has failed over its grammar or its logits."""
        self.is_number = True
        """False once logits of it were none: what was computed for it is of no use."""
        self.cancelled = False
        """True once its reader has gone. Any thread may set it."""
        self.adaptive: AdaptiveContrast | None = None
        """When the contrast acts, where that is not everywhere."""
        if request.contrastive and request.contrast.rule == "adaptive":
            prompt = base.tokenizer.decode(list(request.prompts[-1]), skip_special_tokens=True)
            self.adaptive = AdaptiveContrast(
                request.contrast.min_divergence, str(prompt), base.token_text
            )
        self.queue_seconds = self.first_token_seconds = 0.0
        """From its submission to its admission, and to its first token; 0 before that."""
        self._submitted = time.monotonic()
        self._num_changed = self._num_contrasted = 0
        self._base = base
        self._sink = sink
        self._detokenizer = Detokenizer(base.tokenizer, base.hidden_ids)
        grammar = request.grammar
        is_json = grammar is not None and not grammar.text  # which a stop string would break
        stops = () if is_json else request.sampling.stop
        turn_ends = () if is_json else base.turn_end.texts
        self._eos_ids = base.eos_ids
        self._stop_ids = base.stop_ids(stops) if stops else frozenset()
        template = base.reply_format.template
        self._reply = ReplyReader(template, request.parts, [*stops, *turn_ends])
        self._text: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        if grammar is not None:
            self.constraint = compile_grammar(
                grammar, base.vocabulary, self._stop_ids - self._eos_ids
            )

    @property
    def length(self) -> int:
        """Tokens of its longest row so far."""
        return max(len(self.tokens), len(self.base_tokens))

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end the answer."""
        return self._eos_ids

    @property
    def ready(self) -> bool:
        """True once its adapter is there, or has failed to load."""
        return self.lease is None or self.lease.done

    @property
    def overdue(self) -> bool:
        """True once its deadline is over."""
        deadline = self.request.deadline
        return deadline is not None and not time.monotonic() < deadline  # NaN is over, too

    def use(self, adapter: Adapter) -> None:
        """Answer with `adapter`, as strongly as the request has it: at scale 0 not at all."""
        if self.request.personal:
            self.adapter = adapter.scaled(self.request.adapter_scale)

    def note_admission(self) -> None:
        """Note how long it has waited, where it is admitted for the first time."""
        self.queue_seconds = self.queue_seconds or time.monotonic() - self._submitted

    def push(self, chosen: NextToken) -> None:
        """Append a token and send what it adds; `finished` tells whether it was the last one."""
        if chosen.no_number:
            self._fail_over_logits(chosen.no_number)
            return
        token = chosen.token
        self.tokens.append(token)
        if self.base_tokens is not self.tokens:
            self.base_tokens.append(token)
        if self.forced is not None:
            self._new_logprobs(chosen)
            self._close_turn()
            return
        if not self.answer_ids:
            self.first_token_seconds = time.monotonic() - self._submitted
        self.answer_ids.append(token)
        self._num_changed += chosen.changed
        self._num_contrasted += chosen.contrasted
        if self.adaptive is not None:
            self.adaptive.push(token, chosen.divergence)
        if self.lookup is not None:
            self.lookup.push(token)
        if self.constraint is not None:
            self.constraint.push(token)

        hidden = token in self._eos_ids or (token in self._stop_ids and self._reply.in_answer)
        ended = hidden or (self.constraint is not None and self.constraint.done)
        full = len(self.answer_ids) >= self._room
        text = "" if hidden else self._detokenizer.push(token)
        if ended or full:
            text += self._detokenizer.flush()
        parts = self._reply.push(text)
        if ended or full:
            parts += self._reply.finish(cut=not ended)
        logprobs = self._new_logprobs(chosen)
        if parts or logprobs:
            piece = Piece(tuple(parts), logprobs)
            self._text.append(piece.text)
            self._sink(piece)

        if self.constraint is not None and self.constraint.error:
            self.fail(
                InputError(
                    "no answer could be held to its schema or its tools any further: "
                    f"{self.constraint.error}; make them simpler"
                )
            )
            self.finished = True
        elif hidden and self.constraint is None:
            self._close_turn()
        elif ended or self._reply.ended:
            self._complete("stop")
        elif full:
            self._complete("length")

    def _close_turn(self) -> None:
        """Go on with what the template puts after the end of the turn, or complete the answer."""
        num_read = len(self.tokens) - len(self.request.prompt) - len(self.answer_ids)
        left = self.request.closing[num_read:]
        if left and self.length < self.limit:
            self.forced = left[0]
        else:
            self._complete("stop")

    def _fail_over_logits(self, whose: str) -> None:
        label = "the base" if whose == "base" else self.request.model_label
        what = "try another prompt or dtype" if label == "the base" else "activate another version"
        self.fail(
            ModelError(
                f"{label} gives NaN or infinite logits after {len(self.tokens)} tokens: its "
                f"numbers overflow there, and no token can be chosen; {what}"
            )
        )
        self.finished, self.is_number = True, False

    def fail(self, error: BaseException) -> None:
        """Tell the reader that nothing more comes, and why."""
        self._sink(error)

    def fail_if_overdue(self) -> bool:
        """Fail where the deadline is over; tell whether it is."""
        if self.overdue:
            self.fail(self.timeout_error())
            return True
        return False

    def timeout_error(self) -> TimeoutError:
        """Return what a reader is told once the deadline is over."""
        return TimeoutError("the answer was not done in time; it was stopped")

    def _new_logprobs(self, chosen: NextToken) -> tuple[TokenLogprobs, ...]:
        if chosen.logprobs is None:
            return ()
        user, base = chosen.logprobs
        text = str(self._base.tokenizer.decode([chosen.token]))
        reward = user - self.request.contrast.alpha * base
        data = token_bytes(self._base.tokenizer, chosen.token)
        self._logprobs.append(TokenLogprobs(chosen.token, text, user, base, reward, data))
        return (self._logprobs[-1],)

    def _complete(self, reason: Literal["stop", "length"]) -> None:
        self._sink(
            Completion(
                text="".join(self._text),
                token_ids=tuple(self.answer_ids),
                finish_reason=reason,
                contrast_changed=self._num_changed / len(self.answer_ids),
                contrast_active_share=self._num_contrasted / len(self.answer_ids),
                mean_divergence=self.adaptive.mean_divergence if self.adaptive else None,
                logprobs=tuple(self._logprobs),
                num_calls=self._reply.num_calls,
                queue_seconds=self.queue_seconds,
                first_token_seconds=self.first_token_seconds,
            )
        )
        self.finished = True


def seconds_until(deadline: float) -> float:
    """Return how long a wait until `deadline`, by `time.monotonic()`, may take; NaN is over."""
    return min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)


class Stream(Iterator[Piece | Completion]):
    """Pieces of one answer as they come, the `Completion` last.

    Closing or dropping it cancels the request. It keeps the request's deadline by itself: whatever
    the engine's thread is busy with, its reader waits no longer.
    """

    def __init__(self, active: ActiveRequest, events: "queue.SimpleQueue[Event | None]") -> None:
        self._active = active
        self._events = events
        self._ended = False

    def __next__(self) -> Piece | Completion:
        return self._next()

    def completion(self, should_stop: Callable[[], bool] | None = None) -> Completion:
        """Return the whole answer, once it is there.

        Raises Cancelled soon after `should_stop` returns True; close the stream then.
        """
        timeout = None if should_stop is None else _STOP_INTERVAL
        while should_stop is None or not should_stop():
            with suppress(queue.Empty):
                event = self._next(timeout)
                if isinstance(event, Completion):
                    return event
        raise Cancelled("stopped on request while the model was answering")

    def close(self) -> None:
        """Stop the request within one token; harmless after the end.

        Nothing more comes, and a thread that waits for a piece wakes up.
        """
        self._ended = self._active.cancelled = True
        self._events.put(None)

    def __del__(self) -> None:
        self._active.cancelled = True

    def _next(self, timeout: float | None = None) -> Piece | Completion:
        if self._ended:
            raise StopIteration
        forks.check()
        event = self._wait(timeout)
        if event is None:  # closed by another thread
            raise StopIteration
        self._ended = not isinstance(event, Piece)
        if isinstance(event, BaseException):
            raise event
        return event

    def _wait(self, timeout: float | None) -> Event | None:
        """Return the next event; raise queue.Empty after `timeout` seconds."""
        deadline = self._active.request.deadline
        if deadline is None:
            return self._events.get(timeout=timeout)
        left = seconds_until(deadline)
        try:
            return self._events.get(timeout=left if timeout is None else min(left, timeout))
        except queue.Empty:
            if not self._active.overdue:
                raise
            self.close()
            raise self._active.timeout_error() from None
