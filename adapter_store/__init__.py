"""Versioned adapters of many users: users, versions, bytes; no model, no torch, no LangChain.

Read `store.py` first (the whole interface), then `layout.py` (what lies where), `log.py` (the log
that is the truth), one of the `operations` and one of the `backends`. `errors.py` draws the tree of
what can go wrong. `conformance.py` tests a backend of your own.
"""

from adapter_store.backends.local import LocalBackend
from adapter_store.backends.memory import MemoryBackend
from adapter_store.backends.protocol import Backend
from adapter_store.cache import AdapterCache
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
    UserErasedError,
)
from adapter_store.facts import (
    UNSET,
    AdapterVersion,
    FileFacts,
    HistoryEntry,
    Limits,
    StoredFile,
    UserHead,
)
from adapter_store.keys import EnvironmentKeys, FileKeys, KeyProvider, KmsClient, KmsKeys
from adapter_store.operations.gc import Collected
from adapter_store.operations.verifying import UserReport, Verified
from adapter_store.store import AdapterStore

__all__ = [
    "UNSET",
    "AdapterCache",
    "AdapterNotFoundError",
    "AdapterStore",
    "AdapterStoreError",
    "AdapterVersion",
    "Backend",
    "BackendError",
    "BaseModelMismatchError",
    "Collected",
    "EnvironmentKeys",
    "FileFacts",
    "FileKeys",
    "FormatVersionError",
    "HistoryEntry",
    "IntegrityError",
    "InvalidAdapterError",
    "KeyMismatchError",
    "KeyProvider",
    "KmsClient",
    "KmsKeys",
    "Limits",
    "LocalBackend",
    "MemoryBackend",
    "PublishConflictError",
    "StoredFile",
    "UserErasedError",
    "UserHead",
    "UserReport",
    "Verified",
]
