"""Ray, imported where it is needed."""

import os
from typing import Any

from langchain_cope.errors import InputError


def import_ray() -> Any:
    """Return the module, which calls nobody home. Raises InputError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise InputError("--ray needs ray: pip install 'langchain-cope[ray]'") from None
    return ray
