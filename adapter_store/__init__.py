"""Versioned adapters of many users: users, versions, bytes. It knows no model, no torch and no LangChain.

Read `store.py` first (the whole interface), then `layout.py` (what lies where), `entry.py` (the log that is the truth)
and one of the backends. `errors.py` draws the tree of what can go wrong.
"""

from adapter_store.backend import Backend
from adapter_store.errors import (
    AdapterNotFoundError,
    AdapterStoreError,
    BackendError,
    BaseModelMismatchError,
    FormatVersionError,
    IntegrityError,
    InvalidAdapterError,
    KeyMismatchError,
    PublishConflictError,
)
from adapter_store.facts import UNSET, AdapterVersion, FileFacts, Limits, UserHead
from adapter_store.local import LocalBackend
from adapter_store.memory import MemoryBackend
from adapter_store.store import AdapterStore

__all__ = [
    "UNSET",
    "AdapterNotFoundError",
    "AdapterStore",
    "AdapterStoreError",
    "AdapterVersion",
    "Backend",
    "BackendError",
    "BaseModelMismatchError",
    "FileFacts",
    "FormatVersionError",
    "IntegrityError",
    "InvalidAdapterError",
    "KeyMismatchError",
    "Limits",
    "LocalBackend",
    "MemoryBackend",
    "PublishConflictError",
    "UserHead",
]
