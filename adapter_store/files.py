"""The two files of an adapter: read from a folder or memory, checked, written as a folder."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from adapter_store.errors import BackendError, InvalidAdapterError
from adapter_store.facts import Limits
from adapter_store.layout import ADAPTER_FILES, CONFIG, WEIGHTS
from adapter_store.plain_lora import check_plain_lora
from adapter_store.safetensors_check import check_finite, check_safetensors
from adapter_store.text import parse_json_object, shorten


def read_adapter(
    source: str | os.PathLike[str] | Mapping[str, bytes], limits: Limits
) -> dict[str, bytes]:
    """Return the checked content of both adapter files, by name.

    Of a folder only these two are read; a mapping must hold these two and nothing else.
    InvalidAdapterError where one is missing, too large, or of another format, and where they are
    no plain LoRA or hold a number that is none.
    """
    if isinstance(source, Mapping):
        files = _from_mapping(source)
    else:
        files = _from_folder(source, limits)
    for name, content in files.items():
        if len(content) > limits.bytes_of(name):
            raise InvalidAdapterError(
                f"{name} is larger than the {limits.bytes_of(name)} bytes that this store takes: "
                "publish a smaller adapter, or open the store with larger Limits"
            )
    try:
        tensors = check_safetensors(files[WEIGHTS])
    except ValueError as error:
        raise InvalidAdapterError(
            f"{WEIGHTS} is not a whole safetensors file: {error}; "
            "save the adapter again and publish that"
        ) from None
    try:
        config = parse_json_object(files[CONFIG])
    except ValueError as error:
        raise InvalidAdapterError(
            f"{CONFIG} is not usable: {error}; "
            "expected the JSON object that peft's save_pretrained writes"
        ) from None
    try:
        check_plain_lora(config, tensors)
        check_finite(files[WEIGHTS], tensors)
    except ValueError as error:
        raise InvalidAdapterError(str(error)) from None
    return files


def _from_mapping(files: Mapping[str, bytes]) -> dict[str, bytes]:
    if set(files) != set(ADAPTER_FILES):
        raise InvalidAdapterError(
            f"files {shorten(sorted(map(str, files)), 200)} were given, "
            f"expected exactly {WEIGHTS} and {CONFIG}"
        )
    for name, content in files.items():
        if not isinstance(content, bytes | bytearray | memoryview):
            raise InvalidAdapterError(
                f"{name} is given as {type(content).__name__}, expected its content as bytes"
            )
    return {name: bytes(files[name]) for name in ADAPTER_FILES}


def _from_folder(folder: str | os.PathLike[str], limits: Limits) -> dict[str, bytes]:
    path = Path(folder)
    files = {}
    for name in ADAPTER_FILES:
        try:
            with (path / name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                files[name] = file.read(min(size, limits.bytes_of(name) + 1))
        except FileNotFoundError:
            raise InvalidAdapterError(
                f"there is no {name} in {path}: expected a peft folder, as written by "
                "save_pretrained(folder, safe_serialization=True); pickled weights are never read"
            ) from None
        except (OSError, ValueError) as error:
            raise InvalidAdapterError(
                f"cannot read {path / name} ({error}): expected a readable peft folder"
            ) from None
    return files


def write_new_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` into a new or empty `folder`, all or none.

    BackendError where the folder holds something or cannot be written.
    """
    staged = folder.parent / f".{folder.name[:100]}.{os.urandom(6).hex()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged.mkdir(0o700)
        for name, content in files.items():
            (staged / name).write_bytes(content)
        staged.rename(folder)  # replaces an empty folder, refuses one that is not
    except OSError as error:
        raise BackendError(
            f"cannot write an adapter to {folder} ({error.strerror or error}): "
            "name a new or an empty folder where this user may write"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            remove_tree(staged)


def remove_tree(folder: Path, ignore_errors: bool = False) -> None:
    """Remove a folder and everything in it."""
    import shutil  # slow to import, for the compressions that it knows, and rarely needed

    shutil.rmtree(folder, ignore_errors)
