"""Who is answered when: the waiting line, the batch, the adapters' slots and the memory.

Read `Scheduler.step` first: a token for every answer, newcomers admitted, a piece of their prompts.
Requests are admitted first come first served, offline ones after all others; one that waits for its
adapter holds up no other. Where memory runs out, or a reader comes while offline requests take all
the room, the newest go back to the line with the tokens they have.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from langchain_cope.engine.adapter_slots import AdapterSlots
from langchain_cope.engine.answer import ActiveRequest, seconds_until
from langchain_cope.engine.batch import MIN_COLUMNS, Batch
from langchain_cope.engine.device import give_back, is_out_of_memory
from langchain_cope.engine.options import EngineOptions
from langchain_cope.engine.request import AdapterSource
from langchain_cope.errors import EngineBusy, InputError, ModelError
from langchain_cope.text import count

MAX_PROMPT_TOKENS = 4096  # of prompts, padding included, in one forward
# Times as many rows as `max_rows` are decoded together where nobody waits for any of their tokens:
# a step of more rows takes longer, but far less than in proportion.
OFFLINE_ROWS = 2
FIRST_RATE = 640.0  # tokens of prompts a second, before it was measured
RATE_SMOOTHING = 0.3  # weight of the newest measurement
RECENT_PROMPT = 512  # newest tokens of a prompt that its user's later answers may quote

_log = logging.getLogger(__name__)


class Scheduler:
    """Takes requests from the line through the batch to their end.

    The engine's thread owns it; other threads may call `check_size` and `submit`, and read
    `num_waiting`.
    """

    def __init__(
        self,
        batch: Batch,
        slots: AdapterSlots,
        options: EngineOptions,
        device: torch.device,
        wake: threading.Condition,
    ) -> None:
        """Start with an empty line; `wake` is held while it changes."""
        self._batch = batch
        self._slots = slots
        self._options = options
        self._device = device
        self._lock = wake
        self._waiting: list[ActiveRequest] = []
        self._prefill_rate = FIRST_RATE
        self._step_seconds = 0.0
        self._reset_bounds()
        self.num_answers = 0
        self.queue_seconds = self.first_token_seconds = 0.0

    @property
    def num_waiting(self) -> int:
        """Requests in the line."""
        return len(self._waiting)

    def has_readers(self) -> bool:
        """Tell whether anybody waits for tokens, in the batch or in the line."""
        with self._lock:
            everyone = [*self._batch.requests, *self._waiting]
        return any(not active.request.offline for active in everyone)

    def check_size(self, active: ActiveRequest) -> None:
        """Raise InputError for a request that would not fit if it were alone."""
        num_rows = active.request.num_rows
        num_bytes, max_bytes = self._batch.num_bytes([active]), self._batch.kv_bytes
        num_tokens, max_tokens = num_rows * active.limit, self._options.max_tokens
        what = f"{count(num_rows, 'row')} of up to {active.limit} tokens"
        if num_bytes > max_bytes:
            raise InputError(
                f"the request needs {num_bytes:,} bytes for keys and values ({what}), "
                f"but the engine may take {max_bytes:,}: "
                "shorten the prompt, lower max_tokens or raise EngineOptions.kv_memory"
            )
        if max_tokens is not None and num_tokens > max_tokens:
            raise InputError(
                f"the request may have {num_tokens} tokens in flight ({what}), "
                f"but the engine's limit is {max_tokens}: "
                "shorten the prompt, lower max_tokens or raise EngineOptions.max_tokens"
            )

    def submit(self, active: ActiveRequest) -> None:
        """Put a request at the end of the line, before offline ones unless it is one of them.

        Where it needs a slot, it asks for one. Raises EngineBusy where as many wait as may.
        """
        with self._lock:  # so that leases are given in the order of the line
            self._check_line(active)
            if active.request.personal and isinstance(active.request.adapter, AdapterSource):
                active.lease = self._slots.lease(active.request.adapter)
            self._waiting.append(active)
            if not active.request.offline:
                self._put_offline_last()

    def _put_offline_last(self) -> None:
        """Nobody reads the offline requests' tokens as they come, so nobody waits for them."""
        self._waiting.sort(key=lambda each: each.request.offline)  # which keeps their order

    def _check_line(self, active: ActiveRequest) -> None:
        most = self._options.max_waiting
        if most is None or active.request.offline:
            return
        num_waiting = sum(not each.request.offline for each in self._waiting)
        if num_waiting >= most:
            raise EngineBusy(
                f"{count(num_waiting, 'request')} of {most} that may wait do so already: "
                "try again later, or raise EngineOptions.max_waiting"
            )

    def has_work(self) -> bool:
        """Tell whether a step would do anything."""
        if self._batch.decoding or self._batch.prefilling:
            return True
        with self._lock:
            return any(each.ready or each.cancelled or each.overdue for each in self._waiting)

    def seconds_to_deadline(self) -> float | None:
        """Return when the first deadline in the line is over; None where none has one."""
        with self._lock:
            deadlines = [each.request.deadline for each in self._waiting]
        dated = [deadline for deadline in deadlines if deadline is not None]
        return seconds_until(min(dated)) if dated else None

    def step(self) -> None:
        """Decode a token for every answer, admit newcomers, prefill a piece of their prompts."""
        self._run(self._decode, self._batch.decoding)
        self._admit()
        self._run(self._prefill, self._batch.prefilling)

    def end_of(self, holder: object, error: BaseException) -> None:
        """Fail the requests of `holder` with `error`; the next step lets go of them."""
        for active in [*self._batch.requests, *self._waiting]:
            if active.request.holder is holder:
                active.cancelled = True
                active.fail(error)

    def end(self, error: BaseException) -> None:
        """Fail every request with `error` and forget them all."""
        self._slots.clear()
        for active in [*self._batch.requests, *self._waiting]:
            if not active.finished:
                active.fail(error)
                self._release(active)
        self._batch.clear()
        self._waiting.clear()

    def _run(self, forward: Callable[[], None], requests: Sequence[ActiveRequest]) -> None:
        """Run one forward of `requests`, if there are any, and let go of everyone who is done.

        If it raises, they fail and the others go on.
        """
        if not requests:
            return
        try:
            forward()
        except Exception as error:
            _log.debug("a forward failed", exc_info=True)
            if not (is_out_of_memory(error) and self._free_memory(requests)):
                unfinished = [active for active in requests if not active.finished]
                self._fail(unfinished, model_error("the model failed while answering", error))
        done = [
            active
            for active in self._batch.requests
            if active.finished or active.cancelled or active.fail_if_overdue()
        ]
        self._finish(done)

    def _decode(self) -> None:
        started = time.perf_counter()
        self._batch.decode()
        self._step_seconds = time.perf_counter() - started

    def _prefill(self) -> None:
        started = time.perf_counter()
        num_tokens = self._batch.prefill(self._prompt_budget())
        if num_tokens:
            rate = num_tokens / (time.perf_counter() - started)
            self._prefill_rate += RATE_SMOOTHING * (rate - self._prefill_rate)

    def _prompt_budget(self) -> int:
        """Return how many tokens of prompts one forward reads: few where readers wait meanwhile."""
        if all(active.request.offline for active in self._batch.decoding):
            return self._max_prompt_tokens
        seconds = max(self._options.prefill_pause, self._step_seconds)
        tokens = int(seconds * self._prefill_rate)
        return min(max(tokens, MIN_COLUMNS), self._max_prompt_tokens)

    def _admit(self) -> None:
        """Admit from the line, in order, as far as the bounds allow.

        Who begins with what is being read for another waits until that is done, the room is kept.
        """
        coming: list[ActiveRequest] = []
        for active in self._ready():
            if not self._has_room([*self._batch.requests, *coming, active]) and not (
                self._make_way([*coming, active])
            ):
                break
            coming.append(active)
        # At once: to enlarge room that is in use is to copy it.
        self._batch.make_room(coming, self._prompt_budget() // MIN_COLUMNS)
        for active in coming:
            # Running out of memory may have lowered the bounds meanwhile.
            if not self._has_room([*self._batch.requests, active]):
                break
            if not self._can_be_read(active):
                break
            if active.lease is not None and active.lease.adapter is not None:
                active.use(active.lease.adapter)
            if not self._batch.is_being_read(active):
                self._admit_one(active)

    def _make_way(self, coming: Sequence[ActiveRequest]) -> bool:
        """Send the newest offline requests back to the line where that makes room for a reader.

        Returns:
            Whether all that are `coming`, of which the last one has no room, have it now.
        """
        if coming[-1].request.offline:
            return False
        staying, leaving = self._batch.requests, []
        for active in reversed(self._batch.requests):
            if active.request.offline:
                staying.remove(active)
                leaving.append(active)
                if self._has_room([*staying, *coming]):
                    self._requeue(leaving[::-1])
                    return True
        return False

    def _ready(self) -> list[ActiveRequest]:
        """Return who could be admitted; drop those who gave up or failed, room or not."""
        with self._lock:
            waiting = list(self._waiting)
        ready = []
        for active in waiting:
            is_ready = active.ready  # asked once: an adapter may arrive, or fail to, at any time
            if active.cancelled or active.fail_if_overdue():
                self._drop_waiting(active)
            elif is_ready and active.lease is not None and active.lease.error is not None:
                active.fail(active.lease.error)
                self._drop_waiting(active)
            elif is_ready:
                ready.append(active)
        return ready

    def _admit_one(self, active: ActiveRequest) -> None:
        with self._lock:
            self._waiting.remove(active)
        active.note_admission()
        try:
            self._batch.admit(active)
        except Exception as error:  # no memory for its rows, say
            others = self._batch.decoding or len(self._batch.prefilling) > 1
            if is_out_of_memory(error) and (others or self._batch.prefixes.num_bytes):
                self._requeue([active])
                self._batch.prefixes.clear()
                self._admit_no_more_rows()
            else:
                self._fail([active], model_error("the request could not be admitted", error))

    def _has_room(self, everyone: Sequence[ActiveRequest]) -> bool:
        """Tell whether there is room for `everyone`, the newest last: rows, tokens, memory."""
        if len(everyone) == 1:
            return True
        if not self._rows_fit(everyone):
            return False
        max_tokens = self._options.max_tokens
        if max_tokens is not None:
            tokens = sum(active.request.num_rows * active.limit for active in everyone)
            if tokens > max_tokens:
                return False
        return self._batch.num_bytes(everyone) <= self._batch.kv_bytes

    def _rows_fit(self, everyone: Sequence[ActiveRequest]) -> bool:
        """Tell whether there are not too many rows.

        Readers may come in while there are as many as offline requests alone may have; these may
        not while there are readers.
        """
        num_rows = sum(active.request.num_rows for active in everyone)
        readers = [active for active in everyone if not active.request.offline]
        if not readers:
            return num_rows <= self._max_offline_rows
        if everyone[-1].request.offline:
            return num_rows <= self._max_rows
        of_readers = sum(active.request.num_rows for active in readers)
        return of_readers <= self._max_rows and num_rows <= self._max_offline_rows

    def _can_be_read(self, active: ActiveRequest) -> bool:
        """Tell whether the next forward has room for one more prompt: for a piece of it.

        Of an offline one for all of it: so a reader's that comes is read whole in the next ones.
        """
        if not self._batch.prefilling:
            return True
        everyone = (*self._batch.prefilling, active)
        columns = (each.length if active.request.offline else MIN_COLUMNS for each in everyone)
        num_tokens = sum(
            each.request.num_rows * width for each, width in zip(everyone, columns, strict=True)
        )
        return num_tokens <= self._prompt_budget()

    def _free_memory(self, requests: Sequence[ActiveRequest]) -> bool:
        """Hold less after a forward of `requests` ran out of memory.

        Returns:
            False where nothing is left to free: to try again would be in vain.
        """
        batch = self._batch
        give_back(self._device)
        if batch.prefixes.num_bytes:
            batch.prefixes.clear()
            return True
        was_decoding = requests is batch.decoding
        if was_decoding and batch.prefilling:
            newest = list(batch.prefilling)
        else:
            newest = list(requests[len(requests) // 2 :]) if len(requests) > 1 else []
        if newest:
            self._requeue(newest)
            self._admit_no_more_rows()
            return True
        if not was_decoding and self._max_prompt_tokens > MIN_COLUMNS:
            self._max_prompt_tokens //= 2
            return True
        return False

    def _reset_bounds(self) -> None:
        """Take the options' bounds again, where running out of memory had lowered them."""
        self._max_prompt_tokens = MAX_PROMPT_TOKENS
        self._set_max_rows(self._options.max_rows, OFFLINE_ROWS * self._options.max_rows)

    def _admit_no_more_rows(self) -> None:
        """Lower the bounds to the rows that are there: for more there was no memory."""
        num_rows = max(self._batch.num_rows, 1)
        self._set_max_rows(num_rows, num_rows)

    def _set_max_rows(self, of_all: int, offline: int) -> None:
        most = self._options.max_rows
        self._max_rows, self._max_offline_rows = (
            min(of_all, most),
            min(offline, OFFLINE_ROWS * most),
        )

    def _requeue(self, requests: Sequence[ActiveRequest]) -> None:
        """Take `requests` out of the batch, to the front of the line, with the tokens they have."""
        self._batch.drop(requests)
        # Without memory to make the caches smaller they stay as they are: large enough.
        with suppress(Exception):
            self._batch.shrink()
        with self._lock:
            self._waiting[:0] = requests
            self._put_offline_last()

    def _fail(self, requests: Sequence[ActiveRequest], error: BaseException) -> None:
        for active in requests:
            active.fail(error)
        self._finish(requests)

    def _finish(self, requests: Sequence[ActiveRequest]) -> None:
        """Let `requests` leave the batch; their readers have been told."""
        if not requests:
            return
        for active in requests:
            if active.finished and active.adapter is not None:
                newest = active.request.prompt[-RECENT_PROMPT:]
                active.adapter.recent.extend([*newest, *active.answer_ids])
            if active.answer_ids:
                self.num_answers += 1
                self.queue_seconds += active.queue_seconds
                self.first_token_seconds += active.first_token_seconds
        self._batch.drop(requests)
        for active in requests:
            self._release(active)
        # What running out of memory took away comes back bit by bit, and at once when none is left.
        if self._batch.requests:
            self._set_max_rows(self._max_rows + 2, self._max_offline_rows + 2)
        else:
            self._reset_bounds()

    def _drop_waiting(self, active: ActiveRequest) -> None:
        """Take a request out of the line whose reader has gone, or has been told."""
        with self._lock:
            self._waiting.remove(active)
        self._release(active)

    def _release(self, active: ActiveRequest) -> None:
        if active.lease is not None:
            self._slots.release(active.lease)


def model_error(what: str, error: Exception) -> ModelError:
    """Return what a reader is told: what happened, and why."""
    told = ModelError(f"{what}: {type(error).__name__}: {error}")
    told.__cause__ = error
    return told
