"""One base model in memory: loaded once a process, shared by chat and training, known by its fingerprint.

`load_base` returns the same `Base` to whoever asks for the same model. The weights are held by one pristine module tree;
engine and training each work on a `skeleton` of it, a tree of their own around the same parameter tensors.
"""

import copy
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from langchain_cope.engine.adapter import CONFIG, WEIGHTS
from langchain_cope.engine.base.chat_template import Message, ensure_chat_template, render
from langchain_cope.engine.base.context import context_of
from langchain_cope.engine.base.fingerprint import fingerprint_of
from langchain_cope.engine.base.reply_format import ReplyFormat, reply_format_of
from langchain_cope.engine.forward.fused_weights import fuse_weights
from langchain_cope.errors import InputError, ModelError, ModelNotFound

STARTER = Path(__file__).parents[2] / "starter"
LARGE_CHECKPOINT = 1 << 30  # bytes; above it a CPU computes in bfloat16 where it can
_log = logging.getLogger(__name__)
_loaded: dict[tuple[Any, ...], "Base"] = {}
_locks: dict[tuple[Any, ...], threading.Lock] = {}
_registry = threading.Lock()


@dataclass(eq=False)
class Base:
    """A base model in memory. Made by `load_base`."""

    name: str
    """As asked for: ``starter``, a Hugging Face id or a path."""
    source: str
    """Where the files are: an absolute folder, or the Hugging Face id."""
    revision: str | None
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    """The pristine tree: never wrapped, never trained, never cast."""
    context: int
    """Tokens that prompt and answer may have together."""
    task_adapter: Path | None = None
    """Folder of the adapter that was merged into the weights."""
    quantization: str | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _fingerprint: dict[str, str] | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return self.model.dtype

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends an answer: those of ``generation_config`` and the tokenizer's own."""
        ids = self.model.generation_config.eos_token_id if self.model.generation_config else None
        listed = ids if isinstance(ids, list) else [ids]
        return frozenset(i for i in [*listed, self.tokenizer.eos_token_id] if i is not None)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are no text."""
        added = (
            token for token, entry in self.tokenizer.added_tokens_decoder.items() if entry.special
        )
        return frozenset([*added, *self.tokenizer.all_special_ids])

    @cached_property
    def reply_format(self) -> ReplyFormat:
        """How thoughts and calls are told apart from the answer."""
        return reply_format_of(self.tokenizer)

    @cached_property
    def markers(self) -> frozenset[int]:
        """Special tokens that mark a part of an answer, a call or a thought: they are shown, the other special ones are not."""
        tokens = {
            token: str(self.tokenizer.convert_ids_to_tokens(token))
            for token in self.special_ids - self.eos_ids
        }
        return frozenset(token for token, text in tokens.items() if self.reply_format.uses(text))

    @cached_property
    def hidden_ids(self) -> frozenset[int]:
        """Tokens that are not shown: the special ones but those that mark a part of an answer."""
        return self.special_ids - self.markers

    @property
    def vocabulary_size(self) -> int:
        """Entries of a row of logits."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def num_parameters(self) -> int:
        """Parameters, tied ones counted once."""
        return sum(p.numel() for p in self.model.parameters())

    def fingerprint(self) -> dict[str, str]:
        """What an adapter is bound to, part by part (`fingerprint.py`). Computed at first use."""
        with self._lock:
            if self._fingerprint is None:
                self._fingerprint = fingerprint_of(self)
            return dict(self._fingerprint)

    def skeleton(self) -> PreTrainedModel:
        """A fresh module tree around the same parameter tensors, none of which requires a gradient.

        What is added to it (LoRA layers, hooks) stays in it. Never cast or move it: that would convert the shared tensors.
        """
        shared: dict[int, Any] = {id(parameter): parameter for parameter in self.model.parameters()}
        return copy.deepcopy(self.model, shared)

    def prompt_ids(
        self, messages: list[Message], tools: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        """Token ids of a conversation that the assistant is to continue, in the base's chat template."""
        return render(self.tokenizer, messages, add_generation_prompt=True, tools=tools)

    def conversation_ids(self, messages: list[Message]) -> list[int]:
        """Token ids of a whole conversation, end of the last turn included."""
        return render(self.tokenizer, messages, add_generation_prompt=False)


def load_base(
    model: str | Path = "starter",
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    task_adapter: str | Path | None = None,
    quantization_config: Any = None,
) -> Base:
    """The base model of that name, loaded at the first call and shared by every later one with the same arguments.

    Args:
        model: ``starter`` (bundled), a Hugging Face id of a causal language model, or a local path.
        revision: of a Hugging Face id.
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; None takes the best there is. One base lies on one device.
        dtype: None takes float32 on a CPU (bfloat16 where the CPU has it and the checkpoint exceeds 1 GB), else the checkpoint's.
        task_adapter: a shared peft LoRA, a folder or a Hugging Face id (the paper's TAM), merged into the weights once, here.
        quantization_config: handed to ``from_pretrained`` as it is.

    Raises:
        ModelNotFound: nothing of that name or at that path.
        InputError: device or dtype that this machine cannot compute with.
        ModelError: the files are there but cannot be used.
    """
    chosen_device = _choose_device(device)
    named_dtype = _named_dtype(dtype, chosen_device)
    folder = STARTER if str(model) == "starter" else Path(model).expanduser()
    source = folder.resolve() if _exists(folder) else model
    key = (
        str(source),
        revision,
        chosen_device,
        named_dtype,
        str(task_adapter),
        repr(quantization_config),
    )
    with _registry:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        if key not in _loaded:
            _loaded[key] = _load(
                str(model),
                str(source),
                revision,
                chosen_device,
                named_dtype,
                task_adapter,
                quantization_config,
            )
        return _loaded[key]


def _load(
    name: str,
    source: str,
    revision: str | None,
    device: str,
    dtype: torch.dtype | None,
    task_adapter: str | Path | None,
    quantization_config: Any,
) -> Base:
    with (
        _quiet_transformers(),
        torch.inference_mode(False),
    ):  # inference tensors could never be trained through
        try:
            config = AutoConfig.from_pretrained(source, revision=revision)
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
            quantization = quantization_config or getattr(config, "quantization_config", None)
            model: Any = AutoModelForCausalLM.from_pretrained(
                source,
                revision=revision,
                dtype=_choose_dtype(dtype, device, source, config),
                quantization_config=quantization_config,
                # Quantized weights cannot be moved once they are loaded: they are loaded where they belong.
                device_map=None if quantization is None else {"": device},
            )
            model = model if quantization is not None else model.to(device)
        except Exception as error:  # damaged files make any of a dozen kinds
            raise _explain(name, source, error) from error
        adapter_folder = None if task_adapter is None else _adapter_folder(str(task_adapter))
        if adapter_folder is not None:
            model = _merge(model, adapter_folder, quantization)
    model.eval().requires_grad_(False)
    if quantization is None:
        fuse_weights(model)
    # A prompt that is too long is refused by us, with the numbers; the tokenizer need not warn as well.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    if ensure_chat_template(tokenizer):
        _log.warning(
            "%s has no chat template; the plain one is used (System/User/Assistant lines, see the README). "
            "For another, set `chat_template` in its tokenizer_config.json.",
            name,
        )
    recorded = (
        None
        if quantization is None
        else str(getattr(quantization, "to_dict", lambda: quantization)())
    )
    context = context_of(config.get_text_config().to_dict(), tokenizer.model_max_length) or 10**6
    return Base(name, source, revision, tokenizer, model, context, adapter_folder, recorded)


def _choose_device(device: str | torch.device | None) -> str:
    if device is None:
        return (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise InputError(
            f"device must be cpu, cuda, cuda:N or mps (one device a base), not {str(device)!r}"
        ) from error
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(wanted.type, True):
        raise InputError(
            f"device {str(device)!r} was asked for, but torch {torch.__version__} finds none here: use device='cpu'"
        )
    return str(wanted)


def _named_dtype(dtype: str | torch.dtype | None, device: str) -> torch.dtype | None:
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise InputError(f"dtype must be float32, bfloat16 or float16, not {str(dtype)!r}")
    if named == torch.float16 and device == "cpu":
        raise InputError(
            "float16 on a CPU is an order of magnitude slower than float32: use dtype='float32' or 'bfloat16'"
        )
    return named


def _choose_dtype(
    dtype: torch.dtype | None, device: str, source: str, config: Any
) -> torch.dtype | str:
    if dtype is not None:
        return dtype
    if device != "cpu":
        return "auto"
    large = _checkpoint_bytes(source, config) > LARGE_CHECKPOINT
    return torch.bfloat16 if large and _cpu_has_bfloat16() else torch.float32


def _checkpoint_bytes(source: str, config: Any) -> int:
    """Size of the weights: of the files where they are local, else estimated from the configuration."""
    if Path(source).is_dir():
        return sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
    text = config.get_text_config()
    hidden, layers = getattr(text, "hidden_size", 0), getattr(text, "num_hidden_layers", 0)
    return int(2 * (12 * layers * hidden * hidden + getattr(text, "vocab_size", 0) * hidden))


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "bf16" in flags  # avx512_bf16 and amx_bf16 of x86, bf16 of Arm


def _adapter_folder(task_adapter: str) -> Path:
    """The folder of a task adapter: a local one as it is, a Hugging Face id from the cache or the hub."""
    folder = Path(task_adapter).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(task_adapter, allow_patterns=[CONFIG, WEIGHTS]))
        except (OSError, ValueError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise ModelNotFound(
                f"no task adapter {task_adapter!r}, neither a folder nor on the hub ({first_line})"
            ) from error
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:  # peft would fall back to pickled weights
        raise ModelNotFound(
            f"no task adapter in {folder}: {' and '.join(missing)} missing; a peft LoRA folder is needed"
        )
    return folder


def _merge(model: Any, task_adapter: Path, quantization: Any) -> Any:
    if quantization is not None:
        raise InputError(
            "a task adapter cannot be merged into quantized weights: merge it first, then quantize"
        )
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, task_adapter).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"the task adapter {str(task_adapter)!r} cannot be merged into this base: {error}"
        ) from error


def _explain(name: str, source: str, error: Exception) -> Exception:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    is_there = _exists(Path(source))
    looks_like_path = is_there or source.startswith((".", "/", "~"))
    if (is_there or isinstance(error, OSError)) and not _exists(Path(source) / "config.json"):
        where = (
            f"no model at the path {name!r}"
            if looks_like_path
            else f"no base model {name!r} here or on the hub"
        )
        return ModelNotFound(
            f"{where} ({first_line}); give 'starter', a Hugging Face id or a folder with config.json and weights"
        )
    return ModelError(f"the base model {name!r} cannot be loaded: {first_line}")


def _exists(path: Path) -> bool:
    """Whether there is such a path; a name that no file system takes is none."""
    try:
        return path.exists()
    except OSError:
        return False


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars of the loader: progress is ours to show."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
