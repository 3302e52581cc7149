"""One engine a base: requests of any users and lengths are decoded in the same step.

The engine's thread turns on `Engine._turn`: admit, step, deliver. It knows no LangChain and no store; it is handed token ids and
a folder. Requests that arrive while others are running join at the next step, in the order of arrival.
"""

import asyncio
import atexit
import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from langchain_cope.engine.batch import Batch, Request, Running, TokenLogprobs
from langchain_cope.engine.lora import Adapter, read_adapter
from langchain_cope.engine.model import Base
from langchain_cope.engine.sampling import Sampling
from langchain_cope.engine.text import Detokenizer, StopStrings
from langchain_cope.errors import ContextOverflow, EngineClosed, InputError, ModelError

__all__ = ["Adapter", "Completion", "Engine", "Piece", "Request", "Sampling", "TokenLogprobs"]

MAX_ROWS = 64  # rows decoded together; further requests wait
MAX_PROMPT_TOKENS = 16_384  # prompt tokens, padding included, processed in one forward
MAX_ADAPTERS = 64  # adapters kept ready, the least recently used dropped first
MAX_SCORE_LOGITS = 1 << 26  # float32 entries of one scoring forward: 256 MB

T = TypeVar("T")
_log = logging.getLogger(__name__)
_engines: dict[int, "Engine"] = {}
_engines_lock = threading.Lock()


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


_Event = Piece | Completion | BaseException


class _Job(Running):
    """A request on its way through the engine."""

    def __init__(self, request: Request, base: Base, sink: Callable[[_Event], None]) -> None:
        super().__init__(request)
        self.cancelled = False
        self._base = base
        self._sink = sink
        self._detokenizer = Detokenizer(base.tokenizer)
        self._stops = StopStrings(request.sampling.stop)
        self._text: list[str] = []
        self._tokens: list[TokenLogprobs] = []
        self._max_tokens = min(request.sampling.max_tokens, base.context - len(request.prompt))

    def deliver(self) -> bool:
        """Pass on what the newest token adds; True when the answer has ended."""
        token = self.ids[-1]
        ended = token in self._base.eos_ids
        piece = "" if ended else self._detokenizer.push(token)
        full = len(self.ids) >= self._max_tokens
        if ended or full:
            piece += self._detokenizer.flush()
        text = self._stops.push(piece)
        if (ended or full) and not self._stops.stopped:
            text += self._stops.flush()
        self._send(text)
        if ended or full or self._stops.stopped:
            self._sink(self._completion("stop" if ended or self._stops.stopped else "length"))
            return True
        return False

    def expire(self) -> bool:
        """Fail where the deadline is over; True where it is."""
        deadline = self.request.deadline
        if deadline is None or time.monotonic() < deadline:
            return False
        self.fail(TimeoutError("the answer was not done in time; it was stopped"))
        return True

    def fail(self, error: BaseException) -> None:
        self._sink(error)

    def _send(self, text: str) -> None:
        tokens = self._new_logprobs()
        if text or tokens:
            self._text.append(text)
            self._sink(Piece(text, tokens))

    def _new_logprobs(self) -> tuple[TokenLogprobs, ...]:
        if not self.request.logprobs:
            return ()
        user, base = self.logprobs[-1]
        text = str(self._base.tokenizer.decode([self.ids[-1]]))
        self._tokens.append(TokenLogprobs(self.ids[-1], text, user, base, user - self.request.alpha * base))
        return (self._tokens[-1],)

    def _completion(self, reason: Literal["stop", "length"]) -> Completion:
        share = self.num_changed / len(self.ids)
        return Completion("".join(self._text), tuple(self.ids), reason, share, tuple(self._tokens))


class Stream(Iterator[Piece | Completion]):
    """Pieces of one answer as they come, the `Completion` last. Closing or dropping it cancels the request."""

    def __init__(self, job: _Job, events: "queue.SimpleQueue[_Event]") -> None:
        self._job = job
        self._events = events
        self._ended = False

    def __next__(self) -> Piece | Completion:
        if self._ended:
            raise StopIteration
        event = self._events.get()
        self._ended = not isinstance(event, Piece)
        if isinstance(event, BaseException):
            raise event
        return event

    def completion(self) -> Completion:
        """The whole answer, once it is there."""
        return next(event for event in self if isinstance(event, Completion))

    def close(self) -> None:
        """Stop the request within one token. Nothing more comes; harmless after the end."""
        self._ended = self._job.cancelled = True

    def __del__(self) -> None:
        self._job.cancelled = True


class Engine:
    """Decodes for everyone who shares ``base``. Use `Engine.of`: one engine a base."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self._batch = Batch(base.skeleton())
        self._waiting: deque[_Job] = deque()
        self._calls: deque[tuple[Callable[[], object], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()
        self._adapters_lock = threading.Lock()

    @classmethod
    def of(cls, base: Base) -> "Engine":
        """The engine of this base: the same one for whoever asks, a new one after `close`.

        Raises ``ModelError`` for an architecture that it cannot serve, by name.
        """
        with _engines_lock:
            engine = _engines.get(id(base))
            if engine is None or engine._closed:
                engine = _engines[id(base)] = cls(base)
            return engine

    def find_adapter(self, name: str) -> Adapter | None:
        """The adapter kept under ``name``, if it is still there."""
        with self._adapters_lock:
            if name in self._adapters:
                self._adapters.move_to_end(name)
            return self._adapters.get(name)

    def load_adapter(self, folder: str | Path, name: str | None = None) -> Adapter:
        """A peft LoRA folder, ready for requests.

        With a ``name`` the adapter is kept and found again under it, so a name must never stand for two adapters.
        Raises ``ModelError`` for what the engine cannot serve, by name.
        """
        if name is not None and (kept := self.find_adapter(name)):
            return kept
        adapter = read_adapter(Path(folder), name or str(folder), self.base.model, self.base.dtype, self.base.device)
        if name is not None:
            with self._adapters_lock:
                self._adapters[name] = adapter
                while len(self._adapters) > MAX_ADAPTERS:
                    self._adapters.popitem(last=False)
        return adapter

    def stream(self, request: Request) -> "Stream":
        """Submit ``request`` and iterate over the pieces of its answer; the last item is the `Completion`.

        Raises ``ContextOverflow``, ``InputError`` or ``EngineClosed`` here; later ``ModelError`` (cause chained), ``TimeoutError``.
        """
        events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        return Stream(self._submit(request, events.put), events)

    def stream_all(self, requests: Sequence[Request]) -> list["Stream"]:
        """`stream` for each of ``requests``; their prompts are processed together, as far as the bounds on rows allow."""
        with self._wake:  # held, so that the engine's thread sees all of them or none
            return [self.stream(request) for request in requests]

    async def astream(self, request: Request) -> AsyncGenerator[Piece | Completion]:
        """`stream` for an event loop: nothing blocks, and a cancelled task stops the request within one token."""
        events: asyncio.Queue[_Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def sink(event: _Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = self._submit(request, sink)
        try:
            while not isinstance(event := await events.get(), Completion):
                if isinstance(event, BaseException):
                    raise event
                yield event
            yield event
        finally:
            job.cancelled = True

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer all ``requests``, decoded together; in their order. Raises what `stream` raises, at the first that fails."""
        streams: list[Stream] = []
        try:
            streams = self.stream_all(requests)
            return [stream.completion() for stream in streams]
        finally:
            for stream in streams:
                stream.close()

    def score(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], adapter: Adapter | None = None
    ) -> list[Tensor]:
        """Log-probability, in nats, of each completion token under base or adapter.

        Args:
            sequences: (prompt ids, completion ids), neither empty, together within the context.
            adapter: None: the base alone.

        Returns:
            Per sequence a float32 tensor ``(len(completion),)`` on the CPU, in the order given.
        """
        for prompt, completion in sequences:
            if not prompt or not completion:
                raise InputError("a sequence to score needs at least one prompt token and one completion token")
            if len(prompt) + len(completion) > self.base.context:
                raise ContextOverflow(len(prompt) + len(completion), self.base.context)
        scores: list[Tensor] = [torch.empty(0)] * len(sequences)
        for group in self._score_groups(sequences):
            chosen = self._call(partial(self._batch.log_probs, [sequences[i] for i in group], adapter))
            for index, row in zip(group, chosen, strict=True):
                scores[index] = row
        return scores

    def close(self) -> None:
        """End every request with ``EngineClosed`` and stop the thread. Safe to call twice."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with _engines_lock:
            if _engines.get(id(self.base)) is self:
                del _engines[id(self.base)]
        with self._adapters_lock:
            self._adapters.clear()

    def _submit(self, request: Request, sink: Callable[[_Event], None]) -> _Job:
        if not request.prompt:
            raise InputError("the prompt has no tokens: give at least one")
        if not 0 <= min(request.prompt) <= max(request.prompt) < self.base.vocabulary_size:
            raise InputError(
                f"the prompt holds token ids outside 0 to {self.base.vocabulary_size - 1}, the base's vocabulary"
            )
        if len(request.prompt) >= self.base.context:
            raise ContextOverflow(len(request.prompt), self.base.context)
        job = _Job(request, self.base, sink)
        self._enqueue(self._waiting, job)
        return job

    def _call(self, function: Callable[[], T]) -> T:
        """Run ``function`` on the engine's thread between two steps and return what it returns."""
        future: Future[T] = Future()
        self._enqueue(self._calls, (function, future))
        return future.result()

    def _enqueue(self, line: deque[Any], entry: Any) -> None:
        with self._wake:
            if self._closed:
                raise EngineClosed(f"the engine of {self.base.name!r} is closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"cope-engine-{self.base.name}", daemon=True)
                self._thread.start()
            line.append(entry)
            self._wake.notify()

    def _run(self) -> None:
        end = EngineClosed(f"the engine of {self.base.name!r} was closed")
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._turn()
        except Exception as error:  # outside a forward: rows that no longer fit the device's memory, say
            _log.exception("the engine of %r stopped", self.base.name)
            end = EngineClosed(f"the engine of {self.base.name!r} stopped: {type(error).__name__}: {error}")
            end.__cause__ = error
        with self._wake:
            self._closed = True
        self._end_everything(end)

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False once the engine is closed."""
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._waiting or self._calls or self._batch.running)
            return not self._closed

    def _turn(self) -> None:
        """Calls between steps, a token for everyone, leavers, then newcomers, who get their first."""
        while self._calls:
            self._answer(*self._calls.popleft())
        if self._batch.running:
            self._guard(self._batch.step, self._batch.running)
        if admitted := self._admit():
            self._guard(lambda: self._batch.join(admitted), admitted)

    def _guard(self, forward: Callable[[], None], jobs: Sequence[Running]) -> None:
        """Run one forward for ``jobs`` and pass its tokens on; if it raises, they fail and the others go on."""
        moved = [job for job in jobs if isinstance(job, _Job)]
        try:
            forward()
            gone = [job for job in moved if job.cancelled or job.expire() or job.deliver()]
        except Exception as error:
            _log.debug("a forward failed", exc_info=True)
            for job in moved:
                failure = ModelError(f"the model failed while answering: {type(error).__name__}: {error}")
                failure.__cause__ = error
                job.fail(failure)
            gone = moved
        present = [job for job in gone if job in self._batch.running]
        if present:
            self._batch.drop(present)

    def _admit(self) -> list[_Job]:
        """Those who come next, first come first served, within the bounds on rows and prompt tokens."""
        admitted: list[_Job] = []
        rows, longest = 0, 0
        while self._waiting:
            job = self._waiting[0]
            if job.cancelled or job.expire():
                self._waiting.popleft()
                continue
            rows, longest = rows + job.request.num_rows, max(longest, job.length)
            too_many = self._batch.num_rows + rows > MAX_ROWS or (admitted and rows * longest > MAX_PROMPT_TOKENS)
            if too_many:
                break
            admitted.append(self._waiting.popleft())
        return admitted

    def _answer(self, function: Callable[[], object], future: "Future[Any]") -> None:
        try:
            future.set_result(function())
        except Exception as error:
            failure = ModelError(f"the model failed while scoring: {type(error).__name__}: {error}")
            failure.__cause__ = error
            future.set_exception(failure)

    def _end_everything(self, error: EngineClosed) -> None:
        for job in [*self._batch.running, *self._waiting]:
            if isinstance(job, _Job):
                job.fail(error)
        for _, future in self._calls:
            future.set_exception(error)
        self._batch.clear()
        self._waiting.clear()
        self._calls.clear()

    def _score_groups(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[list[int]]:
        """Indices of sequences of like length, as many as one forward may hold."""
        vocabulary = self.base.vocabulary_size
        group: list[int] = []
        kept = 0
        for index in sorted(range(len(sequences)), key=lambda i: sum(map(len, sequences[i])), reverse=True):
            longest = sum(map(len, sequences[group[0] if group else index]))
            kept = max(kept, len(sequences[index][1]) + 1)
            rows = len(group) + 1
            if group and (
                rows * kept * vocabulary > MAX_SCORE_LOGITS or rows * longest > MAX_PROMPT_TOKENS or rows > MAX_ROWS
            ):
                yield group
                group, kept = [], len(sequences[index][1]) + 1
            group.append(index)
        if group:
            yield group


@atexit.register
def _close_all() -> None:
    for engine in list(_engines.values()):
        engine.close()
