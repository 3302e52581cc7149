"""Models that Ollama has pulled: which GGUF file belongs to a name. Asks no server.

Ollama keeps a manifest for every name and tag, JSON that lists layers by digest, and the layers
as files named after their digests:

    <models>/manifests/<host>/<namespace>/<model>/<tag>
    <models>/blobs/sha256-<hex>
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from langchain_cope.errors import ModelError, ModelNotFound

PREFIX = "ollama:"
"""What a name of a model begins with that Ollama has pulled."""
_MODEL_LAYER = "application/vnd.ollama.image.model"
_ADAPTER_LAYER = "application/vnd.ollama.image.adapter"
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]+)?")
_USUAL = ("registry.ollama.ai", "library")
_SERVICE = Path("/usr/share/ollama/.ollama/models")  # of Ollama where Linux runs it as a service


def ollama_file(name: str) -> Path:
    """Return the GGUF file of the model `[[HOST/]NAMESPACE/]NAME[:TAG]` that Ollama has pulled.

    Raises:
        ModelNotFound: Ollama has not pulled it, or the name is none.
        ModelError: what Ollama keeps cannot be read, or is no GGUF model alone.
    """
    models, manifest, text = _manifest(name)
    file = models / "blobs" / f"sha256-{_model_digest(name, manifest, text)}"
    if not file.is_file():
        raise ModelNotFound(
            f"Ollama lists the model {name!r}, but its file {file} is not there: "
            f"`ollama pull {name}` brings it again"
        )
    return file


def _manifest(name: str) -> tuple[Path, Path, bytes]:
    """Return the folder of models that has the name, its manifest, and what that says."""
    path, folders = _manifest_path(name), _models_folders()
    for models in folders:
        manifest = models / "manifests" / path
        try:
            return models, manifest, manifest.read_bytes()
        except PermissionError as error:
            raise ModelError(
                f"{manifest} may not be read by this user: be in Ollama's group, or name another "
                "folder with OLLAMA_MODELS"
            ) from error
        except OSError:
            continue
    raise ModelNotFound(
        f"Ollama has no model {name!r} in {' or '.join(map(str, folders))}: "
        f"`ollama pull {name}` brings it; OLLAMA_MODELS names another folder"
    )


def _models_folders() -> list[Path]:
    given = os.environ.get("OLLAMA_MODELS")
    return [Path(given).expanduser()] if given else [Path.home() / ".ollama" / "models", _SERVICE]


def _manifest_path(name: str) -> Path:
    *where, last = name.split("/")
    model, colon, tag = last.partition(":")
    if len(where) > 2 or (colon and not tag):
        raise _no_name(name)
    host, namespace = (*_USUAL[: 2 - len(where)], *where)
    parts = (namespace, model, tag or "latest")
    if not _HOST.fullmatch(host) or not all(_PART.fullmatch(part) for part in parts):
        raise _no_name(name)
    return Path(host, *parts)


def _no_name(name: str) -> ModelNotFound:
    return ModelNotFound(f"{name!r} is no name of a model of Ollama: give ollama:NAME[:TAG]")


def _model_digest(name: str, manifest: Path, text: bytes) -> str:
    """Return the digest of the one layer with the model."""
    try:
        layers: list[dict[str, Any]] = json.loads(text)["layers"]
        kinds = [layer["mediaType"] for layer in layers]
        digests = [_DIGEST.fullmatch(layer["digest"]) for layer in layers]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"Ollama's manifest {manifest} cannot be read: `ollama pull {name}` writes it anew"
        ) from error
    if _ADAPTER_LAYER in kinds:
        raise ModelError(
            f"Ollama's model {name!r} is a base with an adapter on top: give the base by its name"
        )
    found = [digest for kind, digest in zip(kinds, digests, strict=True) if kind == _MODEL_LAYER]
    if len(found) != 1 or found[0] is None:
        raise ModelError(f"Ollama's model {name!r} is not one GGUF file (see {manifest})")
    return found[0][1]
