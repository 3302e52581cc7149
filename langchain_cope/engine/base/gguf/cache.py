"""GGUF files unpacked once into the user's cache, where the loader finds ordinary folders.

    <user cache>/langchain-cope/gguf/<digest of the file>-<version of the unpacking>/
        description/    configuration and tokenizer
        bfloat16/       the same, and the weights in that dtype; float32/ …
        packed-…/       its 4-bit blocks, ready for products on this processor, with this torch

Folders appear whole or not at all. Deleting them costs the time to unpack.
"""

import hashlib
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from langchain_cope.atomic_files import atomic_folder
from langchain_cope.engine.base.digests import cached_digest
from langchain_cope.engine.base.gguf.header import GgufHeader, read_header
from langchain_cope.engine.base.user_cache import cache_folder
from langchain_cope.errors import InputError, ModelError

if TYPE_CHECKING:
    import torch

_VERSION = 2  # of what is written; another one where the same file would be unpacked to other bytes
UNPACKED_WEIGHTS = "model.safetensors"
_PACKED = "blocks.safetensors"
_DESCRIPTION = ("config.json", "tokenizer.json")  # what a folder cannot do without
_SPARE_BYTES = 64 * 1024**2  # room on the disk that is left for others
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file, known by its content."""

    path: Path
    digest: str
    """Hex sha256 of its bytes."""

    @classmethod
    def of(cls, path: Path) -> "GgufFile":
        """Return the file at `path`; its digest is computed once, then remembered.

        Raises ModelError where it cannot be read.
        """
        try:
            return cls(path.resolve(), cached_digest([path], lambda: _sha256(path)))
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error

    @property
    def folder(self) -> Path:
        """Where it is unpacked."""
        return cache_folder() / "gguf" / f"{self.digest}-{_VERSION}"

    @cached_property
    def header(self) -> GgufHeader:
        """What it says of itself. Raises ModelError where it is damaged or no base model."""
        require_gguf()
        header = read_header(self.path)
        _check_is_a_base(self.path, header)
        return header

    def description(self) -> Path:
        """Return the folder with its configuration and its tokenizer.

        Raises ModelError where they cannot be read or written.
        """
        return self._made("description", _DESCRIPTION, self._write_description)

    def unpacked(self, dtype: "torch.dtype", device: "torch.device") -> Path:
        """Return the folder of the whole model in `dtype`, made at the first call.

        Raises ModelError where the file cannot be unpacked, or where memory or disk have no room.
        """
        name = str(dtype).removeprefix("torch.")
        weights = self.folder / name / UNPACKED_WEIGHTS
        if weights.is_file():
            self._check_memory(weights.stat().st_size, dtype, device)
        description = self.description()
        return self._made(
            name,
            (*_DESCRIPTION, UNPACKED_WEIGHTS),
            lambda folder: self._write(folder, description, dtype, device),
        )

    def packed(
        self, processor: str, library: str, num_bytes: float, write: Callable[[Path], None]
    ) -> Path:
        """Return the file of ready-made products, made by `write` at the first call.

        Those for another version of the library, on the same processor, are removed then.

        Args:
            processor: what they are made for.
            library: what computes them.
            num_bytes: the most that they need on the disk.
            write: writes the file of that path.

        Raises:
            ModelError: the file cannot be written, or the disk has no room.
        """
        own, of = (hashlib.sha256(text.encode()).hexdigest()[:16] for text in (library, processor))

        def fill(folder: Path) -> None:
            for other in self.folder.glob(f"packed-{of}-*"):
                shutil.rmtree(other, ignore_errors=True)
            if num_bytes + _SPARE_BYTES > shutil.disk_usage(self.folder).free:
                raise ModelError(f"there is no room for {_megabytes(num_bytes)} in {self.folder}")
            write(folder / _PACKED)

        return self._made(f"packed-{of}-{own}", (_PACKED,), fill) / _PACKED

    def _made(self, name: str, files: Sequence[str], write: Callable[[Path], None]) -> Path:
        """Return the folder `name`, written by `write` unless it is there with these `files`."""
        folder = self.folder / name
        if _has(folder, files):
            return folder
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(self.folder / "lock"):
                if _has(folder, files):  # another process made it meanwhile
                    return folder
                self._remove_unfinished()
                if folder.is_dir():  # what cleans caches took files out of it
                    shutil.rmtree(folder)
                with atomic_folder(folder) as unfinished:
                    write(unfinished)
        except OSError as error:
            raise ModelError(
                f"{self.path} cannot be unpacked into {self.folder}: {error.strerror or error}; "
                "XDG_CACHE_HOME names another place for caches"
            ) from error
        return folder

    def _remove_unfinished(self) -> None:
        """Remove what killed processes left; call it under the lock."""
        for left in self.folder.glob(".*"):
            shutil.rmtree(left, ignore_errors=True)

    def _write_description(self, folder: Path) -> None:
        from langchain_cope.engine.base.gguf.config import save_config_and_tokenizer

        save_config_and_tokenizer(self.path, self.header, folder)

    def _write(
        self, folder: Path, description: Path, dtype: "torch.dtype", device: "torch.device"
    ) -> None:
        from transformers import AutoConfig

        from langchain_cope.engine.base.gguf.tensors import Unpacking, model_without_data

        model = model_without_data(AutoConfig.from_pretrained(description))
        unpacking = Unpacking(self.path, self.header, model)
        num_bytes = unpacking.num_bytes(dtype)
        self._check_memory(num_bytes, dtype, device)
        self._check_disk(num_bytes, dtype)
        _log.info(
            "unpacking %s (%s) into %s: %s as %s",
            *(self.path, self.header.quantizations, folder.parent, _megabytes(num_bytes), dtype),
        )
        for file in description.iterdir():
            shutil.copyfile(file, folder / file.name)
        unpacking.write(folder / UNPACKED_WEIGHTS, dtype)

    def _check_memory(self, num_bytes: int, dtype: "torch.dtype", device: "torch.device") -> None:
        from langchain_cope.engine.device import free_bytes

        free = free_bytes(device)
        if num_bytes > free:
            raise ModelError(
                f"{self._becomes(num_bytes, dtype)}, but {device} has {_megabytes(free)} of free "
                "memory: give a smaller model, or free some memory"
            )

    def _check_disk(self, num_bytes: int, dtype: "torch.dtype") -> None:
        on_disk = shutil.disk_usage(self.folder).free
        if num_bytes + _SPARE_BYTES > on_disk:
            raise ModelError(
                f"{self._becomes(num_bytes, dtype)}, but there are {_megabytes(on_disk)} free in "
                f"{self.folder}: free some space, or name another place with XDG_CACHE_HOME"
            )

    def _becomes(self, num_bytes: int, dtype: "torch.dtype") -> str:
        packed = _megabytes(self.path.stat().st_size)
        return f"{self.path} ({packed}) becomes {_megabytes(num_bytes)} as {dtype}"


def _has(folder: Path, files: Sequence[str]) -> bool:
    return all((folder / file).is_file() for file in files)


def require_gguf() -> None:
    """Raise InputError unless the package gguf is installed."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise InputError(
            "GGUF files are read with the package gguf, which is not installed: "
            "pip install 'langchain-cope[gguf]'"
        ) from error


def _check_is_a_base(path: Path, header: GgufHeader) -> None:
    """Refuse files that hold something else than a whole language model."""
    parts = header.fields.get("split.count") or 0
    if parts > 1:
        raise ModelError(
            f"{path} is one of {parts} parts of a model: join them with "
            f"`llama-gguf-split --merge {path.name} MODEL.gguf`, then give that file"
        )
    kind = header.fields.get("general.type", "model")
    if kind == "adapter" or "adapter.type" in header.fields:
        raise ModelError(f"{path} is an adapter, not a base model: give the model it is for")
    if kind == "mmproj" or header.architecture in {"clip", "mmproj"}:
        raise ModelError(
            f"{path} is the image part of a model (mmproj): give the file of its language model"
        )
    if kind != "model" or not header.tensors:
        raise ModelError(f"{path} holds no model (its type is {kind!r}): give that of a base model")
    if header.own("pooling_type"):
        raise ModelError(f"{path} is a model of embeddings: one that writes text is needed")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
