"""One engine a base: requests of any users and lengths are decoded in the same step.

The engine's thread turns on `Engine._turn`: a token for everyone, then a piece of the newcomers' prompts. It knows no LangChain and
no store; it is handed token ids and folders. Requests join and leave at any step, first come first served.
"""

import asyncio
import atexit
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from langchain_cope.engine.adapter import Adapter, low_rank_dtype, read_adapter
from langchain_cope.engine.adapter_slots import AdapterSlots
from langchain_cope.engine.answer import Completion, Event, Job, Piece, Stream
from langchain_cope.engine.base.base import Base
from langchain_cope.engine.batch import MIN_COLUMNS, Batch
from langchain_cope.engine.decoding.sampling import Sampling
from langchain_cope.engine.device import give_back, is_out_of_memory
from langchain_cope.engine.options import EngineOptions
from langchain_cope.engine.request import AdapterSource, Request, Running, TokenLogprobs
from langchain_cope.engine.threads import release_pool
from langchain_cope.errors import Cancelled, ContextOverflow, EngineClosed, InputError, ModelError

__all__ = [
    "Adapter",
    "AdapterSource",
    "Completion",
    "Engine",
    "EngineOptions",
    "Piece",
    "Request",
    "Sampling",
    "Statistics",
    "TokenLogprobs",
]

MAX_PROMPT_TOKENS = 4096  # of prompts, padding included, in one forward
FIRST_RATE = 640.0  # tokens of prompts a second, before it was measured
RECENT_PROMPT = 512  # newest tokens of a prompt that its user's later answers may quote
MAX_SCORE_TOKENS = 16_384  # of one scoring forward, padding included
MAX_SCORE_LOGITS = 1 << 26  # float32 entries of one scoring forward: 256 MB

T = TypeVar("T")
_log = logging.getLogger(__name__)
_engines: dict[int, "Engine"] = {}
_engines_lock = threading.Lock()


@dataclass(frozen=True)
class Statistics:
    """What an engine did so far, and what it holds now."""

    steps: int
    """Forwards that gave answers their next tokens."""
    prefills: int
    """Forwards that read prompts."""
    tokens: int
    """Tokens answered."""
    drafted: int
    """Tokens that speculation had checked."""
    accepted: int
    """Those of them that came true."""
    prefix_tokens_reused: int
    """Tokens of prompts, a row each, that were known before."""
    adapters_loaded: int
    adapters_evicted: int
    adapters_in_use: int
    """Slots that a request holds now."""
    rows: int
    """Rows in the batch now."""
    waiting: int
    """Requests that wait for room or for their adapter now."""


class Engine:
    """Decodes for everyone who shares ``base``. Use `Engine.of`: one engine a base."""

    def __init__(self, base: Base, options: EngineOptions | None = None) -> None:
        """Raises ``ModelError`` for an architecture that it cannot serve, by name."""
        self.base = base
        self.options = options or EngineOptions()
        self._batch = Batch(base.skeleton(), base.context, self.options)
        self._slots = AdapterSlots(self.options.adapter_slots, self._read_adapter, self._notify)
        self._waiting: deque[Job] = deque()
        self._calls: deque[tuple[Callable[[], object], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._prompt_rate = FIRST_RATE
        self._most_rows, self._most_prompt_tokens = self.options.max_rows, MAX_PROMPT_TOKENS

    @classmethod
    def of(cls, base: Base, options: EngineOptions | None = None) -> "Engine":
        """The engine of this base: the same one for whoever asks; after `close` a new one, with the defaults or ``options``.

        Raises ``ModelError`` for an architecture that it cannot serve, by name; ``InputError`` where the engine that is there has
        other ``options`` than those given (None takes it as it is).
        """
        with _engines_lock:
            engine = _engines.get(id(base))
            if engine is None or engine._closed:
                engine = _engines[id(base)] = cls(base, options)
            elif options is not None and options != engine.options:
                raise InputError(
                    f"the engine of {base.name!r} already runs with {engine.options}, not with {options}: "
                    "give the same options everywhere, or close it first"
                )
            return engine

    def load_adapter(self, folder: str | Path) -> Adapter:
        """A peft LoRA folder, ready for requests; whoever holds it keeps it in memory (an `AdapterSource` uses the slots instead).

        Raises ``ModelError`` for what the engine cannot serve, by name.
        """
        return self._read_adapter(Path(folder), None)

    def statistics(self) -> Statistics:
        """Counts since the start, and what is held now."""
        batch = self._batch
        return Statistics(
            steps=batch.num_steps,
            prefills=batch.num_prompt_forwards,
            tokens=batch.num_tokens,
            drafted=batch.num_drafted,
            accepted=batch.num_accepted,
            prefix_tokens_reused=batch.num_reused,
            adapters_loaded=self._slots.num_loaded,
            adapters_evicted=self._slots.num_evicted,
            adapters_in_use=self._slots.num_in_use,
            rows=batch.num_rows,
            waiting=len(self._waiting),
        )

    def stream(self, request: Request) -> "Stream":
        """Submit ``request`` and iterate over the pieces of its answer; the last item is the `Completion`.

        Raises ``ContextOverflow``, ``InputError`` (also for what can never fit the memory) or ``EngineClosed`` here; later
        ``ModelError`` (cause chained), ``TimeoutError`` and whatever its `AdapterSource` raised.
        """
        events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        return Stream(self._submit(request, events.put), events)

    def stream_all(self, requests: Sequence[Request]) -> list["Stream"]:
        """`stream` for each of ``requests``; their prompts are processed together, as far as the bounds on rows allow."""
        with self._wake:  # held, so that the engine's thread sees all of them or none
            return [self.stream(request) for request in requests]

    async def astream(self, request: Request) -> AsyncGenerator[Piece | Completion]:
        """`stream` for an event loop: nothing blocks, and a cancelled task stops the request within one token."""
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def sink(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = (
            self._submit(request, sink)
            if request.grammar is None
            else await self._submit_elsewhere(request, sink)
        )
        try:
            while not isinstance(event := await events.get(), Completion):
                if isinstance(event, BaseException):
                    raise event
                yield event
            yield event
        finally:
            job.cancelled = True

    async def _submit_elsewhere(self, request: Request, sink: Callable[[Event], None]) -> Job:
        """`_submit` without blocking the event loop: a grammar takes its time to compile."""
        submitted = asyncio.get_running_loop().run_in_executor(None, self._submit, request, sink)
        try:
            return await asyncio.shield(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(_cancel)
            raise

    def generate(
        self, requests: Sequence[Request], should_stop: Callable[[], bool] | None = None
    ) -> list[Completion]:
        """Answer all ``requests``, decoded together; in their order. Raises what `stream` raises, at the first that fails.

        Soon after ``should_stop`` says so: ``Cancelled``, and the engine lets go of them within one step.
        """
        streams: list[Stream] = []
        try:
            streams = self.stream_all(requests)
            return [stream.completion(should_stop) for stream in streams]
        finally:
            for stream in streams:
                stream.close()

    def score(
        self,
        sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
        adapter: Adapter | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Tensor]:
        """Log-probability, in nats, of each completion token under base or adapter.

        Args:
            sequences: (prompt ids, completion ids), neither empty, together within the context.
            adapter: None: the base alone.
            should_stop: asked between forwards; where it says so, ``Cancelled`` is raised.

        Returns:
            Per sequence a float32 tensor ``(len(completion),)`` on the CPU, in the order given.
        """
        for prompt, completion in sequences:
            if not prompt or not completion:
                raise InputError(
                    "a sequence to score needs at least one prompt token and one completion token"
                )
            if len(prompt) + len(completion) > self.base.context:
                raise ContextOverflow(len(prompt) + len(completion), self.base.context)
        scores: list[Tensor] = [torch.empty(0)] * len(sequences)
        for group in self._score_groups(sequences):
            if should_stop is not None and should_stop():
                raise Cancelled("stopped on request while the model was scoring")
            chosen = self._call(
                partial(self._batch.log_probs, [sequences[i] for i in group], adapter)
            )
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
        self._slots.clear()
        with _engines_lock:
            if _engines.get(id(self.base)) is self:
                del _engines[id(self.base)]

    def _read_adapter(self, folder: Path, name: str | None) -> Adapter:
        dtype = low_rank_dtype(self.base.dtype, self.base.device)
        adapter = read_adapter(folder, name, self.base.model, dtype, self.base.device)
        if elsewhere := sorted(adapter.pairs.keys() - self._batch.forward.sites.keys()):
            raise ModelError(
                f"the adapter in {folder} changes {elsewhere[0]!r}, which is not served: leave it out of its targets"
            )
        return adapter

    def _submit(self, request: Request, sink: Callable[[Event], None]) -> Job:
        if not request.prompt:
            raise InputError("the prompt has no tokens: give at least one")
        if not 0 <= min(request.prompt) <= max(request.prompt) < self.base.vocabulary_size:
            raise InputError(
                f"the prompt holds token ids outside 0 to {self.base.vocabulary_size - 1}, the base's vocabulary"
            )
        if len(request.prompt) >= self.base.context:
            raise ContextOverflow(len(request.prompt), self.base.context)
        if (
            isinstance(request.adapter, Adapter)
            and not request.adapter.pairs.keys() <= self._batch.forward.sites.keys()
        ):
            raise InputError(
                f"the adapter was loaded for another base than {self.base.name!r}: load it with this engine"
            )
        job = Job(request, self.base, sink)
        self._refuse_what_never_fits(job)
        with self._wake:  # leases are given in the order of the line
            self._refuse_if_closed()
            if isinstance(request.adapter, AdapterSource):
                job.lease = self._slots.lease(request.adapter)
            self._enqueue(self._waiting, job)
        return job

    def _refuse_what_never_fits(self, job: Job) -> None:
        needed, rows = self._batch.num_bytes([job]), job.request.num_rows
        what = f"{rows} row{'s' if rows > 1 else ''} of up to {job.limit} tokens"
        if needed > self._batch.kv_bytes:
            raise InputError(
                f"the request needs {needed:,} bytes for keys and values ({what}), but the engine may take "
                f"{self._batch.kv_bytes:,}: shorten the prompt, lower max_tokens or raise EngineOptions.kv_memory"
            )
        if self.options.max_tokens is not None and rows * job.limit > self.options.max_tokens:
            raise InputError(
                f"the request may have {rows * job.limit} tokens in flight ({what}), but the engine's limit is "
                f"{self.options.max_tokens}: shorten the prompt, lower max_tokens or raise EngineOptions.max_tokens"
            )

    def _call(self, function: Callable[[], T]) -> T:
        """Run ``function`` on the engine's thread between two steps and return what it returns."""
        future: Future[T] = Future()
        self._enqueue(self._calls, (function, future))
        return future.result()

    def _enqueue(self, line: deque[Any], entry: Any) -> None:
        with self._wake:
            self._refuse_if_closed()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name=f"cope-engine-{self.base.name}", daemon=True
                )
                self._thread.start()
            line.append(entry)
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            release_pool()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise EngineClosed(f"the engine of {self.base.name!r} is closed")

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def _run(self) -> None:
        end = EngineClosed(f"the engine of {self.base.name!r} was closed")
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._turn()
        except (
            Exception
        ) as error:  # outside a forward: rows that no longer fit the device's memory, say
            _log.exception("the engine of %r stopped", self.base.name)
            end = EngineClosed(
                f"the engine of {self.base.name!r} stopped: {type(error).__name__}: {error}"
            )
            end.__cause__ = error
        with self._wake:
            self._closed = True
        self._end_everything(end)

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False once the engine is closed."""
        batch = self._batch
        with self._wake:
            while not (
                self._closed
                or self._calls
                or batch.running
                or batch.arriving
                or self._anyone_ready()
            ):
                deadlines = [
                    job.request.deadline
                    for job in self._waiting
                    if job.request.deadline is not None
                ]
                self._wake.wait(max(0.0, min(deadlines) - time.monotonic()) if deadlines else None)
            return not self._closed

    def _anyone_ready(self) -> bool:
        now = time.monotonic()
        return any(
            job.ready
            or job.cancelled
            or (job.request.deadline is not None and job.request.deadline <= now)
            for job in self._waiting
        )

    def _turn(self) -> None:
        """Calls between steps, a token for everyone, then newcomers: a piece of their prompts, and their first tokens."""
        while self._calls:
            self._answer(*self._calls.popleft())
        if self._batch.running:
            self._guard(self._batch.step, self._batch.running)
        self._admit()
        if self._batch.arriving:
            self._guard(self._read_prompts, self._batch.arriving)

    def _guard(self, forward: Callable[[], None], jobs: Sequence[Running]) -> None:
        """Run one forward for ``jobs``; if it raises, they fail and the others go on. Then let go of whoever is done."""
        try:
            forward()
        except Exception as error:
            _log.debug("a forward failed", exc_info=True)
            if not (is_out_of_memory(error) and self._make_do(jobs)):
                failure = _failure("the model failed while answering", error)
                self._fail(
                    [job for job in jobs if isinstance(job, Job) and not job.finished], failure
                )
        everyone = [
            job for job in (*self._batch.running, *self._batch.arriving) if isinstance(job, Job)
        ]
        self._leave([job for job in everyone if job.finished or job.cancelled or job.expire()])

    def _read_prompts(self) -> None:
        started = time.perf_counter()
        num_tokens = self._batch.read_prompts(self._prompt_budget())
        if num_tokens:
            rate = num_tokens / (time.perf_counter() - started)
            self._prompt_rate += 0.3 * (rate - self._prompt_rate)

    def _prompt_budget(self) -> int:
        """Tokens of prompts to read in one forward: all that fits, or what does not hold up running answers for long."""
        if not self._batch.running:
            return self._most_prompt_tokens
        return min(
            max(int(self.options.stall * self._prompt_rate), MIN_COLUMNS), self._most_prompt_tokens
        )

    def _admit(self) -> None:
        """Take in those who come next, as far as the bounds allow. Who waits for an adapter holds up nobody."""
        with self._wake:
            waiting = list(self._waiting)
        for job in waiting:  # whoever gives up or failed is told, whether or not there is room
            if job.cancelled or job.expire():
                self._settle(job)
            elif job.lease is not None and job.lease.error is not None:
                job.fail(job.lease.error)
                self._settle(job)
        with self._wake:
            ready = [job for job in self._waiting if job.ready]
        for job in ready:
            if self._batch.num_rows >= self._most_rows or not self._fits(job):
                break
            self._take_in(job)

    def _take_in(self, job: Job) -> None:
        if job.lease is not None:
            job.adapter = job.lease.adapter
        with self._wake:
            self._waiting.remove(job)
        try:
            self._batch.admit(job)
        except Exception as error:  # no memory for its rows, say
            others = self._batch.running or len(self._batch.arriving) > 1
            if is_out_of_memory(error) and (others or self._batch.prefixes.num_bytes):
                self._put_back([job])
                self._batch.prefixes.clear()
                self._most_rows = max(self._batch.num_rows, 1)
                return
            self._fail([job], _failure("the request could not be taken in", error))

    def _fits(self, job: Job) -> bool:
        """Whether there is room for one more: rows, tokens in flight, memory, and a piece of its prompt in the next forward."""
        batch = self._batch
        everyone = [*batch.running, *batch.arriving, job]
        if len(everyone) == 1:
            return True
        arriving = sum(other.request.num_rows for other in batch.arriving) + job.request.num_rows
        tokens = sum(other.request.num_rows * other.limit for other in everyone)
        return (
            batch.num_rows + job.request.num_rows <= self._most_rows
            and (self.options.max_tokens is None or tokens <= self.options.max_tokens)
            and batch.num_bytes(everyone) <= self._batch.kv_bytes
            and (not batch.arriving or arriving * MIN_COLUMNS <= self._prompt_budget())
        )

    def _make_do(self, jobs: Sequence[Running]) -> bool:
        """Out of memory: hold less and try again; False where there is nothing left to let go of."""
        give_back(self.base.device)
        if self._batch.prefixes.num_bytes:
            self._batch.prefixes.clear()
            return True
        newest = list(jobs)[len(jobs) // 2 :] if len(jobs) > 1 else []
        if jobs is self._batch.running and self._batch.arriving:
            newest = list(self._batch.arriving)  # who came first goes on
        if newest:
            self._put_back(newest)
            self._most_rows = max(self._batch.num_rows, 1)
            return True
        if jobs is self._batch.arriving and self._most_prompt_tokens > MIN_COLUMNS:
            self._most_prompt_tokens //= 2
            return True
        return False

    def _put_back(self, jobs: Sequence[Running]) -> None:
        """Take ``jobs`` out of the batch and to the head of the line, with the tokens they have, and their memory back."""
        self._batch.drop(jobs)
        with suppress(
            Exception
        ):  # what is there is large enough, if there is no memory to make it smaller
            self._batch.shrink()
        with self._wake:
            self._waiting.extendleft(job for job in reversed(jobs) if isinstance(job, Job))

    def _fail(self, jobs: Sequence[Job], error: BaseException) -> None:
        for job in jobs:
            job.fail(error)
        self._leave(jobs)

    def _leave(self, jobs: Sequence[Job]) -> None:
        """Let ``jobs`` go, whose readers have been told."""
        if not jobs:
            return
        for job in jobs:
            if job.finished and job.adapter is not None:
                job.adapter.recent.extend([*job.request.prompt[-RECENT_PROMPT:], *job.ids])
        self._batch.drop(jobs)
        for job in jobs:
            self._release(job)
        # What running out of memory took away comes back bit by bit, and at once when nobody is left.
        empty = not (self._batch.running or self._batch.arriving)
        self._most_rows = (
            self.options.max_rows if empty else min(self._most_rows + 2, self.options.max_rows)
        )
        self._most_prompt_tokens = MAX_PROMPT_TOKENS if empty else self._most_prompt_tokens

    def _settle(self, job: Job) -> None:
        """Take a job out of the line that its reader has given up, or was told to."""
        with self._wake:
            self._waiting.remove(job)
        self._release(job)

    def _release(self, job: Job) -> None:
        if job.lease is not None:
            self._slots.release(job.lease)

    def _answer(self, function: Callable[[], object], future: "Future[Any]") -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(_failure("the model failed while scoring", error))

    def _end_everything(self, error: EngineClosed) -> None:
        self._slots.clear()
        for job in [*self._batch.running, *self._batch.arriving, *self._waiting]:
            if isinstance(job, Job) and not job.finished:
                job.fail(error)
                self._release(job)
        for _, future in self._calls:
            future.set_exception(error)
        self._batch.clear()
        self._waiting.clear()
        self._calls.clear()

    def _score_groups(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> Iterator[list[int]]:
        """Indices of sequences of like length, as many as one forward may hold."""
        vocabulary = self.base.vocabulary_size
        group: list[int] = []
        for index in sorted(
            range(len(sequences)), key=lambda i: sum(map(len, sequences[i])), reverse=True
        ):
            rows = [sequences[i] for i in (*group, index)]
            longest = sum(map(len, rows[0]))
            kept = longest - min(
                len(prompt) for prompt, _ in rows
            )  # columns whose logits some row wants
            full = (
                len(rows) * kept * vocabulary > MAX_SCORE_LOGITS
                or len(rows) * longest > MAX_SCORE_TOKENS
            )
            if group and (full or len(rows) > self.options.max_rows):
                yield group
                group = []
            group.append(index)
        if group:
            yield group


def _failure(what: str, error: Exception) -> ModelError:
    """What a reader is told, with its cause."""
    failure = ModelError(f"{what}: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _cancel(submitted: "asyncio.Future[Job]") -> None:
    """Give up a job whose caller has gone."""
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancelled = True


@atexit.register
def _close_all() -> None:
    for engine in list(_engines.values()):
        engine.close()
