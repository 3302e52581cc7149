"""One engine a base: requests of any users and lengths are decoded in the same step.

Callers submit requests and read their streams; a thread of the engine's own runs `Scheduler.step`
as long as there is work. Requests join and leave at any step. The engine knows no LangChain and no
store; it is handed token ids and folders.
"""

import asyncio
import atexit
import gc
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from langchain_cope._collector import collector_paused
from langchain_cope.engine import forks, scoring
from langchain_cope.engine.adapter import Adapter, low_rank_dtype, read_adapter
from langchain_cope.engine.adapter_slots import AdapterSlots
from langchain_cope.engine.answer import (
    ActiveRequest,
    Completion,
    Event,
    Piece,
    Stream,
    seconds_until,
)
from langchain_cope.engine.base.base import Base
from langchain_cope.engine.base.loading import unload_base
from langchain_cope.engine.batch import Batch
from langchain_cope.engine.checks import check_option, is_whole
from langchain_cope.engine.device import give_back, release_thread_pool
from langchain_cope.engine.free_cores import FreeCores
from langchain_cope.engine.options import Contrast, EngineOptions
from langchain_cope.engine.request import Request
from langchain_cope.engine.scheduler import Scheduler, model_error
from langchain_cope.errors import Cancelled, ContextOverflow, EngineClosed, InputError, ModelError

_LINE = 16  # requests on their way, in `max_rows`, that `generate_each` has at most

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
    """Tokens of prompts, a row each, that were copied: from the prefix cache or another row."""
    prompt_tokens: int
    """Tokens of prompts that were admitted, a row each; those reused are among them."""
    answers: int
    """Answers that got a token at least and are over."""
    queue_seconds: float
    """Seconds that these waited for room and adapters, together."""
    first_token_seconds: float
    """Seconds until these had their first token, together."""
    kv_bytes: int
    """Bytes of keys and values now, the beginnings that are kept among them."""
    max_kv_bytes: int
    """Bytes of keys and values that requests may take."""
    adapters_loaded: int
    """Adapters that were loaded into a slot."""
    adapters_evicted: int
    """Adapters that made room for another."""
    adapters_in_use: int
    """Slots that a request holds now."""
    rows: int
    """Rows in the batch now."""
    running: int
    """Requests in the batch now."""
    waiting: int
    """Requests that wait for room or for their adapter now."""


class Engine:
    """Decodes for all users who share `base`. Use `Engine.of`: one engine a base."""

    @collector_paused()
    def __init__(self, base: Base, options: EngineOptions | None = None) -> None:
        """Raises ModelError, with the model's class, for an architecture that cannot be served."""
        self.base = base
        self.options = options or EngineOptions()
        source = base.block_source() if self.options.packed_weights else None
        self._batch = Batch(base.skeleton(), base.context, self.options, source)
        self._slots = AdapterSlots(self.options.adapter_slots, self._read_adapter, self._notify)
        self._wake = threading.Condition()
        """Held while the waiting line or the calls change; notified where there is work."""
        self._scheduler = Scheduler(self._batch, self._slots, self.options, base.device, self._wake)
        self._calls: deque[tuple[Callable[[], object], Future[Any]]] = deque()
        self._holders: WeakValueDictionary[int, object] = WeakValueDictionary()
        """By their ids: chats and trainings need not be hashable."""
        self._closed = False
        self._thread: threading.Thread | None = None

    @classmethod
    def of(
        cls, base: Base, options: EngineOptions | None = None, holder: object = None
    ) -> "Engine":
        """Return the engine of this base, the same one for every caller; after `close` a new one.

        Args:
            base: the base that it decodes with.
            options: of a new engine, or those that the present one must have; None: the defaults,
                or the present one as it is.
            holder: keeps base and engine in memory while it lives, until it is released.

        Raises:
            ModelError: for an architecture that cannot be served, with the model's class.
            InputError: where the present engine has other options than those given.
            EngineClosed: the base was unloaded, or this process was forked from one that had it.
        """
        forks.check()
        with _engines_lock:
            if base.unloaded:
                raise EngineClosed(f"the base {base.name!r} was unloaded: load it again")
            engine = _engines.get(id(base))
            if engine is None or engine._closed:
                engine = _engines[id(base)] = cls(base, options)
            elif options is not None and options != engine.options:
                raise InputError(
                    f"the engine of {base.name!r} already runs with {engine.options}, "
                    f"not with {options}: give the same options everywhere, or close it first"
                )
            if holder is not None:
                engine._holders[id(holder)] = holder
            return engine

    @classmethod
    def running(cls) -> list["Engine"]:
        """Return the engines of this process that are not closed.

        Raises EngineClosed in a process that was forked from one with a base.
        """
        forks.check()
        with _engines_lock:
            return [engine for engine in _engines.values() if not engine._closed]

    @staticmethod
    def release(holder: object) -> None:
        """End every request of `holder` with EngineClosed, and its hold on engines.

        An engine that nobody else holds is closed, and its base unloaded: the memory is free once
        the last reference is gone.
        """
        if forks.is_child():
            return
        with _engines_lock:
            held = [each for each in _engines.values() if id(holder) in each._holders]
            for engine in held:
                del engine._holders[id(holder)]
            unheld = [engine for engine in held if not engine._holders]
            for engine in unheld:
                del _engines[id(engine.base)]
                unload_base(engine.base)
        for engine in held:
            if engine in unheld:
                engine.close()
            else:
                engine._end_requests_of(holder)
        devices = {engine.base.device for engine in unheld}
        held.clear()
        unheld.clear()
        if devices:
            del engine
            gc.collect()  # module trees are full of cycles
        for device in devices:
            give_back(device)

    @property
    def num_exits(self) -> int:
        """Layers after which a base's row can be read out (`Request.early_exit`); 0: after none."""
        return self._batch.forward.num_layers

    def load_adapter(self, folder: str | Path) -> Adapter:
        """Read a peft LoRA folder for requests.

        It is kept in memory by its holders; an `AdapterSource` uses the engine's slots instead.
        Raises ModelError, by name, for what the engine cannot serve.
        """
        return self._read_adapter(Path(folder), None)

    def statistics(self) -> Statistics:
        """Return counts since the start, and what is held now."""
        batch = self._batch
        return Statistics(
            steps=batch.num_steps,
            prefills=batch.num_prefills,
            tokens=batch.num_tokens,
            drafted=batch.num_drafted,
            accepted=batch.num_accepted,
            prefix_tokens_reused=batch.num_reused,
            prompt_tokens=batch.num_prompt_tokens,
            answers=self._scheduler.num_answers,
            queue_seconds=self._scheduler.queue_seconds,
            first_token_seconds=self._scheduler.first_token_seconds,
            kv_bytes=batch.held_bytes,
            max_kv_bytes=batch.kv_bytes,
            adapters_loaded=self._slots.num_loaded,
            adapters_evicted=self._slots.num_evicted,
            adapters_in_use=self._slots.num_in_use,
            rows=batch.num_rows,
            running=len(batch.requests),
            waiting=self._scheduler.num_waiting,
        )

    def stream(self, request: Request) -> Stream:
        """Submit `request` and return an iterator over its pieces; the last item is the completion.

        Raises:
            ContextOverflow: for a prompt that leaves no room for an answer.
            InputError: for a request that cannot be answered, or never fits the memory.
            EngineBusy: where as many wait as may.
            EngineClosed: after `close`.

        The stream itself raises ModelError (with its cause), TimeoutError, EngineClosed, and what
        the request's `AdapterSource` raised.
        """
        events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        return Stream(self._submit(request, events.put), events)

    def stream_all(self, requests: Sequence[Request]) -> list[Stream]:
        """Return `stream` of each of `requests`.

        Their prompts are read together, as far as the bounds on rows allow.
        """
        forks.check()
        with self._wake:  # held, so that the engine's thread sees all of them or none
            return [self.stream(request) for request in requests]

    async def astream(self, request: Request) -> AsyncGenerator[Piece | Completion]:
        """Iterate as `stream` does, without blocking the event loop.

        A cancelled task stops the request within one token.
        """
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def sink(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed, and with it the reader gone
                loop.call_soon_threadsafe(events.put_nowait, event)

        if request.grammar is None:
            active = self._submit(request, sink)
        else:
            active = await self._submit_in_thread(request, sink)
        try:
            while not isinstance(event := await _next_event(events, active), Completion):
                if isinstance(event, BaseException):
                    raise event
                yield event
            yield event
        finally:
            active.cancelled = True

    def generate(
        self, requests: Sequence[Request], should_stop: Callable[[], bool] | None = None
    ) -> list[Completion]:
        """Answer all `requests`, decoded together, and return the completions in their order.

        Raises what `stream` raises, at the first request that fails. Soon after `should_stop`
        returns True it raises Cancelled, and the engine lets go of the requests within one step.
        """
        streams: list[Stream] = []
        try:
            streams = self.stream_all(requests)
            return [stream.completion(should_stop) for stream in streams]
        finally:
            for stream in streams:
                stream.close()

    def generate_each(
        self, requests: Iterable[Request], should_stop: Callable[[], bool] | None = None
    ) -> Generator[Completion, None, None]:
        """Yield the completions of `requests` in their order, decoded together.

        Raises as `generate` does. Requests are taken when the waiting line gets short, so that any
        number of them needs little memory. Closing the iterator stops those that are on their way.
        """
        requests = iter(requests)
        most = _LINE * self.options.max_rows
        streams: deque[Stream] = deque()
        try:
            while True:
                if len(streams) <= most // 2:
                    streams += self.stream_all(list(islice(requests, most - len(streams))))
                if not streams:
                    return
                yield streams[0].completion(should_stop)
                streams.popleft()
        finally:
            for stream in streams:
                stream.close()

    def score(
        self,
        sequences: scoring.Sequences,
        adapter: Adapter | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Tensor]:
        """Return the log-probability, in nats, of each completion token under base or adapter.

        Completions of the same prompt are best scored in one call, which reads the prompt once.

        Args:
            sequences: (prompt ids, completion ids), neither empty, together within the context.
            adapter: None: the base alone.
            should_stop: asked between forwards; where it returns True, Cancelled is raised.

        Returns:
            Per sequence a float32 tensor `(len(completion),)` on the CPU, in the order given.
        """
        return self._scored(scoring.log_probs, sequences, [adapter], should_stop)

    def score_contrasted(
        self,
        sequences: scoring.Sequences,
        adapter: Adapter,
        contrasts: Sequence[Contrast],
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Tensor]:
        """Return the log-probability, in nats, of each completion token under each contrast.

        Args are those of `score`. The plausible head keeps the adapter's probability of it, shared
        out by the contrast; other tokens keep their own: so every text has a likelihood.

        Returns:
            Per sequence a float32 tensor `(len(contrasts), len(completion))` on the CPU.
        """
        together = partial(scoring.contrasted_log_probs, contrasts=contrasts)
        return self._scored(together, sequences, [adapter, None], should_stop)

    def _scored(
        self,
        score_together: Callable[..., list[Tensor]],
        sequences: scoring.Sequences,
        adapters: Sequence[Adapter | None],
        should_stop: Callable[[], bool] | None,
    ) -> list[Tensor]:
        """Return what `score_together` finds for each sequence, one group after the other.

        It is called with a group and with what the base under each of `adapters` has read.
        """
        for prompt, completion in sequences:
            if not prompt or not completion:
                raise InputError(
                    "a sequence to score needs at least one prompt token and one completion token"
                )
            if len(prompt) + len(completion) > self.base.context:
                raise ContextOverflow(len(prompt) + len(completion), self.base.context)
        scores: list[Tensor] = [torch.empty(0)] * len(sequences)

        def call(function: Callable[[], T]) -> T:
            if should_stop is not None and should_stop():
                raise Cancelled("stopped on request while the model was scoring")
            return self._call(function)

        forward, new_rows = self._batch.forward, self._batch.new_rows
        read = [scoring.Beginnings(forward, new_rows, adapter) for adapter in adapters]
        if beginning := scoring.common_beginning(sequences):
            read = [call(partial(unread.continued, [beginning])) for unread in read]
        for group in scoring.groups(sequences, self.base.vocabulary_size, self.options.max_rows):
            together = [sequences[index] for index in group]
            group_scores = call(partial(score_together, together, *read))
            for index, score in zip(group, group_scores, strict=True):
                scores[index] = score
        return scores

    def drop_caches(self) -> None:
        """Drop the adapters that no request holds, and the beginnings of all prompts.

        Prompts of any user may be among them, the base's own too. Requests go on undisturbed.
        """

        def drop() -> None:
            self._slots.drop_idle()
            self._batch.prefixes.clear()

        # Between two steps: an answered request lets go of its adapter in its own.
        with suppress(EngineClosed):
            self._call(drop)

    def close(self) -> None:
        """End every request with EngineClosed and stop the thread. Safe to call twice."""
        if forks.is_child():  # the thread is not there, and the lock perhaps held for good
            self._closed = True
            return
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
        unserved = sorted(adapter.pairs.keys() - self._batch.forward.sites.keys())
        if unserved:
            raise ModelError(
                f"the adapter in {folder} changes {unserved[0]!r}, which is not served: "
                "leave it out of its targets"
            )
        return adapter

    def _end_requests_of(self, holder: object) -> None:
        error = EngineClosed("the chat that asked was closed before the answer was done")
        with suppress(EngineClosed):  # it has ended them all
            self._call(partial(self._scheduler.end_of, holder, error))

    def _submit(self, request: Request, sink: Callable[[Event], None]) -> ActiveRequest:
        forks.check()
        for prompt in request.prompts:
            self._check_prompt(prompt)
        if isinstance(request.adapter, Adapter):
            self._check_adapter(request.adapter)
        if request.early_exit is not None:
            self._check_exit(request.early_exit)
        active = ActiveRequest(request, self.base, sink)
        self._scheduler.check_size(active)
        self._hand_over(partial(self._scheduler.submit, active))
        return active

    async def _submit_in_thread(
        self, request: Request, sink: Callable[[Event], None]
    ) -> ActiveRequest:
        """Submit without blocking the event loop: a grammar takes its time to compile."""
        submitted = asyncio.get_running_loop().run_in_executor(None, self._submit, request, sink)
        try:
            return await asyncio.shield(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(_cancel)
            raise

    def _check_prompt(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise InputError("the prompt has no tokens: give at least one")
        if not 0 <= min(prompt) <= max(prompt) < self.base.vocabulary_size:
            raise InputError(
                f"the prompt holds token ids outside 0 to {self.base.vocabulary_size - 1}, "
                "the base's vocabulary"
            )
        if len(prompt) >= self.base.context:
            raise ContextOverflow(len(prompt), self.base.context)

    def _check_adapter(self, adapter: Adapter) -> None:
        if not adapter.pairs.keys() <= self._batch.forward.sites.keys():
            raise InputError(
                f"the adapter was loaded for another base than {self.base.name!r}: "
                "load it with this engine"
            )

    def _check_exit(self, layers: int) -> None:
        most = self.num_exits
        if not most:
            name = type(self.base.model).__name__
            raise ModelError(f"{name} is served as it is, and cannot be read out early")
        fits = is_whole(layers, least=1) and layers <= most
        check_option("early_exit", layers, f"a number of layers from 1 to {most}", fits)

    def _call(self, function: Callable[[], T]) -> T:
        """Run `function` on the engine's thread between two steps and return what it returns."""
        future: Future[T] = Future()
        self._hand_over(partial(self._calls.append, (function, future)))
        return future.result()

    def _hand_over(self, add_work: Callable[[], object]) -> None:
        """Add work for the engine's thread, which starts with the first of it."""
        forks.check()
        with self._wake:
            if self._closed:
                raise EngineClosed(f"the engine of {self.base.name!r} is closed")
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name=f"cope-engine-{self.base.name}", daemon=True
                )
                self._thread.start()
            add_work()
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            release_thread_pool()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    # What follows is run by the engine's thread.

    def _run(self) -> None:
        end = EngineClosed(f"the engine of {self.base.name!r} was closed")
        try:
            cores = FreeCores()
            with torch.inference_mode():
                while self._wait_for_work():
                    if self._scheduler.has_readers():
                        cores.take_free()
                    else:  # of training and evaluation, where a busy machine changes no result
                        cores.take_all()
                    self._answer_calls()
                    self._scheduler.step()
        # Outside a forward: rows that no longer fit the device's memory, say.
        except Exception as error:
            _log.exception("the engine of %r stopped", self.base.name)
            end = EngineClosed(
                f"the engine of {self.base.name!r} stopped: {type(error).__name__}: {error}"
            )
            end.__cause__ = error
        with self._wake:
            self._closed = True
        self._scheduler.end(end)
        while self._calls:
            _, future = self._calls.popleft()
            future.set_exception(end)

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; return False once the engine is closed."""
        with self._wake:
            while not (self._closed or self._calls or self._scheduler.has_work()):
                self._wake.wait(self._scheduler.seconds_to_deadline())
            return not self._closed

    def _answer_calls(self) -> None:
        while self._calls:
            function, future = self._calls.popleft()
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(model_error("the model failed while scoring", error))


async def _next_event(events: "asyncio.Queue[Event]", active: ActiveRequest) -> Event:
    """Return the next event; where none comes by the deadline, TimeoutError."""
    forks.check()
    deadline = active.request.deadline
    if deadline is None:
        return await events.get()
    try:
        async with asyncio.timeout(seconds_until(deadline)):
            return await events.get()
    except TimeoutError:
        return active.timeout_error()


def _cancel(submitted: "asyncio.Future[ActiveRequest]") -> None:
    """Give up a request whose caller has gone."""
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancelled = True


@atexit.register
def _close_all() -> None:
    for engine in list(_engines.values()):
        engine.close()
