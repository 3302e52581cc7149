"""Our engine as the benchmarks run it: requests in, pieces of text out.

Served by a `worker.Worker`. Once the engine runs, the calling thread leaves torch's parallel
regions alone: see `worker`.
"""

import gc
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from roofline import Work
from safetensors.torch import load_file
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from worker import Setting, peak_memory

from adapter_store import AdapterStore
from langchain_cope.engine import (
    ADAPTER_ALONE,
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
from langchain_cope.engine import batch as engine_batch
from langchain_cope.engine.adapter_slots import AdapterSlots
from langchain_cope.engine.forward.llama import LlamaForward
from langchain_cope.engine.forward.lora_rows import LoraRows
from langchain_cope.engine.forward.products import Product

CONTRAST = Contrast(0.1, 0.1)
# Prompts are not timed: they may delay answers, and are read once for all rounds.
OPTIONS = EngineOptions(speculation=False, max_rows=64, prefill_pause=3600.0, prefix_cache=2 << 30)
# Asked for beyond those that are timed, so that no answer ends while another is timed.
SPARE_TOKENS = 64
_POLL = 0.005  # seconds between two looks at the engine
_PATIENCE = 900.0  # seconds until an answer is taken for a failed one

# Adapters, and their stacks of three dimensions.
_ADAPTER_MODULES = {Adapter.__module__, LoraRows.__module__}

SAMPLING, ELEMENTWISE = "sampling", "norms and elementwise"
REST = "Python, views, waiting and recording"
# Operations by what they are for; all others are elementwise.
_OPERATIONS = {
    "products with the weights": ("linear", "mm", "addmm", "_weight_int4pack_mm_for_cpu"),
    "low-rank products": ("bmm", "baddbmm", "baddbmm_"),
    "attention": ("scaled_dot_product_attention",),
    ELEMENTWISE: (),
    "copies and casts": (
        *("to", "copy_", "contiguous", "clone", "reshape", "cat", "stack", "flip", "repeat"),
        *("embedding", "index", "index_put_", "index_select"),
    ),
    SAMPLING: (),
    REST: ("slice", "select", "view", "transpose", "t", "expand", "unsqueeze", "flatten"),
}
_KINDS = {f"aten::{name}": kind for kind, names in _OPERATIONS.items() for name in names}
_KINDS["mkldnn::_linear_pointwise"] = "products with the weights"
_KINDS[SAMPLING] = SAMPLING


def prepare(setting: Setting) -> None:
    """Write a random adapter a user of the base that `setting` names."""
    from peers import write_adapters  # it imports what no measured process should hold

    base = load_base(setting.base, device=setting.device, dtype=torch.bfloat16)
    write_adapters(base.skeleton(), setting)


class Ours:
    """One engine, and an adapter ready for each user.

    `packed` lets it compute with the 4-bit blocks of a GGUF file where that is faster.
    """

    def __init__(self, setting: Setting, num_users: int, packed: bool = True) -> None:
        self._setting = setting
        self._base = load_base(setting.base, device=setting.device, dtype=torch.bfloat16)
        type(self._base).eos_ids = frozenset()  # no answer stops early
        self._engine = Engine.of(self._base, replace(OPTIONS, packed_weights=packed))
        self._adapters = [
            self._engine.load_adapter(folder) for folder in setting.adapters[:num_users]
        ]

    def rate(self, num_users: int, prompt_tokens: int, num_tokens: int) -> float:
        """Return tokens/s of all users together."""
        streams = self._start(num_users, prompt_tokens, num_tokens)
        _read(streams, 1)
        seconds = _read(streams, num_tokens - 1)
        _close(streams)
        return num_users * (num_tokens - 1) / seconds

    def step_milliseconds(
        self, num_users: int, prompt_tokens: int, num_tokens: int, contrast: bool = True
    ) -> float:
        """Return the time of a decoding step, on the engine's thread.

        A user has two rows in it, or one without `contrast`.
        """
        streams = self._start(num_users, prompt_tokens, num_tokens, contrast)
        start, first = self._engine._call(self._now)
        self._wait_for_step(first + num_tokens - 1)
        end, last = self._engine._call(self._now)
        self._finish(streams)
        return 1000 * (end - start) / (last - first)

    def profile(self, num_users: int, prompt_tokens: int, num_tokens: int) -> dict[str, float]:
        """Return the milliseconds of a recorded step by kind of operation.

        What they leave is Python, views, waiting and recording; sampling has its own Python in it.
        """
        on_gpu = self._setting.device != "cpu"
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        profiler = profile(activities=kinds, acc_events=True)

        def start() -> tuple[float, int]:
            profiler.start()  # a profiler sees the thread that starts it
            return self._now()

        def stop() -> tuple[float, int]:
            end = self._now()
            profiler.stop()
            return end

        with patch.object(engine_batch, "choose", record_function(SAMPLING)(engine_batch.choose)):
            streams = self._start(num_users, prompt_tokens, num_tokens)
            started, first = self._engine._call(start)
            self._wait_for_step(first + num_tokens - 1)
            ended, last = self._engine._call(stop)
            self._finish(streams)
        spent = dict.fromkeys(_OPERATIONS, 0.0)
        for event in profiler.events():
            is_kernel = event.device_type != DeviceType.CPU  # the operation's time includes it
            if event.cpu_parent is None and not is_kernel:  # else its parent's time includes it
                microseconds = event.device_time_total if on_gpu else event.cpu_time_total
                spent[_KINDS.get(event.name, ELEMENTWISE)] += microseconds / 1e6
        spent[REST] += ended - started - sum(spent.values())
        return {kind: 1000 * part / (last - first) for kind, part in spent.items()}

    def work(self, num_rows: int, packed: bool = True) -> Work:
        """Return what a step of so many rows has to do: products with all weights of the base.

        The kernel for packed ones multiplies in float32. Without `packed` all are in bfloat16.
        """
        num_bytes, flops = 0, {"bfloat16": 0.0, "float32": 0.0}
        for product in products(self._engine):
            is_packed = packed and num_rows <= product.packed_rows
            read = vars(product.packed).values() if is_packed else [product.weight]
            num_bytes += sum(part.nbytes for part in read if isinstance(part, torch.Tensor))
            dtype = "float32" if is_packed else "bfloat16"
            flops[dtype] += 2.0 * num_rows * product.weight.numel()
        return Work(num_bytes, flops)

    def packed_rows(self) -> tuple[int, ...]:
        """Return up to how many rows the blocks are used: in the layers, in the output head."""
        return self._engine._batch.forward.packed_rows

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
        reordered = [tensor for tensor in tensors if tensor.is_mkldnn]  # they have no storage
        storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_mkldnn]
        held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        held += sum(tensor.nbytes for tensor in {id(each): each for each in reordered}.values())
        adapter = load_file(self._setting.adapters[0] / WEIGHTS)
        least = self._base.num_parameters + sum(tensor.numel() for tensor in adapter.values())
        return held, least * self._base.dtype.itemsize

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

    def _start(
        self, num_users: int, prompt_tokens: int, num_tokens: int, contrast: bool = True
    ) -> list[Stream]:
        """Return streams of users who all have their first token; those before them have left."""
        batch = self._engine._batch
        _wait_until(lambda: not batch.requests)
        sampling = Sampling(max_tokens=num_tokens + SPARE_TOKENS)
        requests = [
            Request(
                self._setting.prompt(user, prompt_tokens),
                self._adapters[user],
                CONTRAST if contrast else ADAPTER_ALONE,
                sampling,
            )
            for user in range(num_users)
        ]
        streams = self._engine.stream_all(requests)
        _wait_until(lambda: len(batch.decoding) == num_users)
        return streams

    def _now(self) -> tuple[float, int]:
        """Return the time and the number of steps; the engine's thread calls it, between two."""
        return time.perf_counter(), self._engine._batch.num_steps

    def _wait_for_step(self, number: int) -> None:
        _wait_until(lambda: self._engine._batch.num_steps >= number)

    def _finish(self, streams: Sequence[Stream]) -> None:
        """End the answers. None may have ended before: fewer would have been timed."""
        assert len(self._engine._batch.decoding) == len(streams)
        _close(streams)


def products(engine: Engine) -> list[Product]:
    """Return the products with weights of a forward, the output head last."""
    forward = engine._batch.forward
    assert isinstance(forward, LlamaForward), "the base is built in another way than Llama"
    return [product for alike in forward._alike for product in alike]


def _wait_until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + _PATIENCE
    while not reached():
        if time.monotonic() > end:
            raise RuntimeError("the engine is not answering, or some answers have failed")
        time.sleep(_POLL)


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
