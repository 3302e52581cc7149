"""Settings that other libraries read once, when they are loaded; what the user has set stays.

Made when `langchain_cope` is imported, so that an app that uses it from Python gets the same as the
command line. A library that is loaded already has read its own: import `langchain_cope` first.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SETTINGS = {
    # Nothing calls home. The trainers' library tells the hub of every trainer that is made.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ANONYMIZED_TELEMETRY": "False",  # Chroma's
    # Torch's threads wait for one another this many turns of a loop before they give the core away:
    # little enough for a busy machine, long enough between two operations.
    "GOMP_SPINCOUNT": "10000",
}


def set_environment() -> None:
    """Set what is not set; switch the hub's telemetry off also where the hub is loaded already."""
    hub = sys.modules.get("huggingface_hub.constants")
    if hub is not None and "HF_HUB_DISABLE_TELEMETRY" not in os.environ:
        vars(hub)["HF_HUB_DISABLE_TELEMETRY"] = True
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


@contextmanager
def a_home() -> Iterator[None]:
    """Give the block a home folder where the process has none: no HOME, and a user without a name.

    For imports of libraries that look for one while they are loaded and refuse without; in the
    block nothing is written there.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = tempfile.gettempdir()
        try:
            yield
        finally:
            del os.environ["HOME"]
    else:
        yield
