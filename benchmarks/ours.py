"""Our engine as the decoding benchmarks run it: requests in, pieces of text out.

Served by a `worker.Worker`. Once the engine runs, the calling thread leaves torch's parallel
regions alone: see `worker`.
"""

import gc
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile
from worker import Setting, peak_memory

from adapter_store import AdapterStore
from langchain_cope.engine import (
    WEIGHTS,
    Adapter,
    AdapterSource,
    Contrast,
    Engine,
    EngineOptions,
    Piece,
    Request,
    Sampling,
    Stream,
    load_base,
)
from langchain_cope.engine.adapter_slots import AdapterSlots
from langchain_cope.engine.forward.lora_rows import LoraRows

CONTRAST = Contrast(0.1, 0.1)
# Prompts are not timed: they may delay answers, and are read once for all rounds.
OPTIONS = EngineOptions(speculation=False, max_rows=64, prefill_pause=3600.0, prefix_cache=2 << 30)
# Asked for beyond those that are timed, so that no answer ends while another is timed.
SPARE_TOKENS = 64

# Adapters, and their stacks of three dimensions.
_ADAPTER_MODULES = {Adapter.__module__, LoraRows.__module__}

_LINEAR = ("aten::linear", "aten::mm", "aten::addmm")
_LOW_RANK = ("aten::bmm", "aten::baddbmm", "aten::baddbmm_")


class Ours:
    """One engine, and an adapter ready for each user."""

    def __init__(self, setting: Setting, num_users: int) -> None:
        self._setting = setting
        self._base = load_base(setting.base, device=setting.device, dtype=torch.bfloat16)
        self._base.model.generation_config.eos_token_id = None  # no answer stops early
        self._engine = Engine.of(self._base, OPTIONS)
        self._adapters = [
            self._engine.load_adapter(folder) for folder in setting.adapters[:num_users]
        ]

    def rate(self, num_users: int, prompt_tokens: int, num_tokens: int) -> float:
        """Return tokens/s of all users together."""
        streams = self._start(num_users, prompt_tokens, num_tokens)
        seconds = _read(streams, num_tokens - 1)
        _close(streams)
        return num_users * (num_tokens - 1) / seconds

    def step_milliseconds(self, num_users: int, prompt_tokens: int, num_tokens: int) -> float:
        """Return the time between two tokens of a user."""
        return 1000 * num_users / self.rate(num_users, prompt_tokens, num_tokens)

    def profile(self, prompt_tokens: int, num_tokens: int) -> dict[str, float]:
        """Return the milliseconds of a recorded step, for one user, by kind of operation.

        The rest is Python, waiting and recording.
        """
        on_gpu = self._setting.device != "cpu"
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        profiler = profile(activities=kinds, acc_events=True)

        def start() -> float:
            profiler.start()  # a profiler sees the thread that starts it
            return time.perf_counter()

        def stop() -> float:
            end = time.perf_counter()
            profiler.stop()
            return end

        streams = self._start(1, prompt_tokens, num_tokens)
        started = self._engine._call(start)
        # The first of these was under way at the start, as one more is at the end.
        _read(streams, num_tokens - 1)
        seconds = self._engine._call(stop) - started
        _close(streams)
        spent = {
            "linear layers": 0.0,
            "attention": 0.0,
            "low-rank products": 0.0,
            "other operations": 0.0,
        }
        for event in profiler.events():
            if event.cpu_parent is None:  # else its parent's time includes it
                microseconds = event.device_time_total if on_gpu else event.cpu_time_total
                spent[_kind(event.name)] += microseconds / 1e6
        spent["Python, waiting and recording"] = seconds - sum(spent.values())
        return {kind: 1000 * part / (num_tokens - 1) for kind, part in spent.items()}

    def peak_memory(self) -> int:
        """Return the peak of this process, in bytes."""
        return peak_memory(self._setting.device)

    def held_bytes(self) -> tuple[int, int]:
        """Return (bytes held, bytes of the base and one adapter alone).

        What is held are all matrices, vectors and low-rank pairs alive in this process. Tensors
        that share a storage count once. Keys and values, which have three dimensions or more, do
        not count.
        """
        gc.collect()
        alive = gc.get_objects()
        tensors = [
            thing for thing in alive if issubclass(type(thing), torch.Tensor) and thing.ndim <= 2
        ]
        for thing in alive:
            if type(thing).__module__ in _ADAPTER_MODULES:
                tensors += _held_tensors(thing)
        storages = [tensor.untyped_storage() for tensor in tensors]
        held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        adapter = load_file(self._setting.adapters[0] / WEIGHTS)
        least = self._base.num_parameters + sum(tensor.numel() for tensor in adapter.values())
        return held, least * self._base.dtype.itemsize

    def weight_bytes(self) -> int:
        """Return the bytes of the base's parameters, each of which a step reads once."""
        return self._base.num_parameters * self._base.dtype.itemsize

    def publish(self, store: Path) -> None:
        """Put every user's adapter into a store on the local disk."""
        self._store = AdapterStore(store)
        self._versions = [
            self._store.publish(f"user{user}", folder, base={"weights": "random"})
            for user, folder in enumerate(self._setting.adapters)
        ]

    def switch_milliseconds(self, user: int) -> dict[str, float]:
        """Return the time until a user's adapter is in a slot: from the store, and once more.

        Beside it the time of just reading its file.
        """
        version = self._versions[user]
        folder = self._store.fetch_dir(version)
        source = AdapterSource(version.name, lambda: self._store.fetch_dir(version))
        loaded = threading.Event()
        slots = AdapterSlots(
            self._engine.options.adapter_slots, self._engine._read_adapter, loaded.set
        )

        def switch() -> None:
            if slots.lease(source).adapter is None:
                loaded.wait()

        ways = {"file": lambda: load_file(folder / WEIGHTS), "cold": switch, "hot": switch}
        milliseconds = {name: _milliseconds(way) for name, way in ways.items()}
        slots.clear()
        return milliseconds

    def _start(self, num_users: int, prompt_tokens: int, num_tokens: int) -> list[Stream]:
        """Return streams of users who all have their first token."""
        sampling = Sampling(max_tokens=num_tokens + SPARE_TOKENS)
        requests = [
            Request(
                self._setting.prompt(user, prompt_tokens),
                self._adapters[user],
                CONTRAST,
                sampling,
            )
            for user in range(num_users)
        ]
        streams = self._engine.stream_all(requests)
        _read(streams, 1)
        return streams


def _read(streams: Sequence[Stream], num_pieces: int) -> float:
    """Return the seconds until that many more pieces have come from every stream.

    The stream that had its first token last has nothing waiting then, so that at least as many
    steps lie in this time, each with a token for every user. What others have waiting is not
    counted: the time is on the cautious side.
    """
    start = time.perf_counter()
    for _ in range(num_pieces):
        for stream in streams:
            # A completion would mean that fewer users are decoding.
            assert isinstance(next(stream), Piece)
    return time.perf_counter() - start


def _held_tensors(thing: object) -> list[torch.Tensor]:
    """Return the tensors that an object or a container holds, containers within it included."""
    tensors = []
    for held in gc.get_referents(thing):
        if issubclass(type(held), torch.Tensor):
            tensors.append(held)
        elif type(held) in (dict, list, tuple):
            tensors += _held_tensors(held)
    return tensors


def _close(streams: Sequence[Stream]) -> None:
    for stream in streams:
        stream.close()


def _milliseconds(way: Callable[[], object]) -> float:
    start = time.perf_counter()
    way()
    return 1000 * (time.perf_counter() - start)


def _kind(operation: str) -> str:
    if operation in _LINEAR:
        return "linear layers"
    if "attention" in operation:
        return "attention"
    return "low-rank products" if operation in _LOW_RANK else "other operations"
