"""Forgetting a person: one act over adapters, history, job folders and this process's memory.

The adapters go first: their erasure fences off trainings that are under way, so that none of them
can publish afterwards. Each part is done whatever becomes of the others, and the receipt says what
was removed, what failed, and what cannot be reached from here.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from adapter_store.errors import FormatVersionError, IntegrityError
from langchain_cope.errors import InputError
from langchain_cope.history.chroma import ChromaHistory
from langchain_cope.history.rows import checked_id
from langchain_cope.stores import open_store
from langchain_cope.text import count

if TYPE_CHECKING:
    from adapter_store import AdapterStore
    from langchain_cope.history.recorded import RecordedChatHistory


class ForgetReceipt(BaseModel):
    """What became of forgetting a user. Printed, it is a page for people."""

    model_config = ConfigDict(frozen=True)

    user_id: str
    at: datetime
    removed: list[str]
    """What was removed, and from where; what was not there is said, too."""
    failed: list[str]
    """What is still there, and why: mend that and forget the user again."""
    not_reached: list[str]
    """Where something of the user may be that this act knows no way to."""

    @property
    def is_complete(self) -> bool:
        """Whether no part failed."""
        return not self.failed

    def __str__(self) -> str:
        parts = {"removed": self.removed, "failed": self.failed, "not reached": self.not_reached}
        lines = [f"forgetting {self.user_id!r:.80}, {self.at:%Y-%m-%d %H:%M:%S} UTC"]
        for name, entries in parts.items():
            if entries:
                lines += [f"{name}:", *(f"  - {entry}" for entry in entries)]
        return "\n".join(lines)


def forget(
    user_id: str,
    *,
    store: "str | PathLike[str] | AdapterStore | None" = None,
    history: "ChromaHistory | RecordedChatHistory | Sequence[Any] | None" = None,
    jobs: "str | PathLike[str] | Sequence[str | PathLike[str]] | None" = None,
) -> ForgetReceipt:
    """Remove all that is kept of a user, known or not, and return what came of it.

    A second call finds less and does no harm. What the user has in training cannot be published
    afterwards.

    Args:
        user_id: The user, as everywhere.
        store: As for `ChatCoPe`; None: the default store.
        history: The `ChromaHistory` or `RecordedChatHistory`, or several. Of a recorded chat the
            messages go, too.
        jobs: The `job_dir` of trainings, or several.

    Raises:
        InputError: The user has no name, or something else than a history was given, or the chat
            of another user; nothing was removed then. What fails later is in the receipt.
    """
    user_id = checked_id("user", user_id)
    histories = _listed(history)
    for one in histories:
        _check_history(one, user_id)
    job_dirs = _listed(jobs)
    acts: list[tuple[str, Callable[[], str]]] = [
        ("adapters", partial(_erase_adapters, store, user_id))
    ]
    for one in histories:
        if not isinstance(one, ChromaHistory):
            acts.append(("chat", partial(_clear_chat, one)))
            one = one.history
        acts.append(("history", partial(_delete_items, one, user_id)))
    acts += [("job folder", partial(_remove_job, one, user_id)) for one in job_dirs]
    acts += [("memory", _clear_engines)]
    removed, failed = [], []
    for name, act in acts:
        try:
            removed.append(f"{name}: {act()}")
        except Exception as error:  # of the storage, of Chroma, of the system
            failed.append(f"{name}: {error}")
    return ForgetReceipt(
        user_id=user_id,
        at=datetime.now(UTC),
        removed=removed,
        failed=failed,
        not_reached=_not_reached(histories, job_dirs),
    )


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _check_history(history: Any, user_id: str) -> None:
    if isinstance(history, ChromaHistory):
        return
    owner = getattr(history, "user_id", None)
    if not isinstance(getattr(history, "history", None), ChromaHistory):
        raise InputError(
            f"history is {history!r:.80}; expected a ChromaHistory or a RecordedChatHistory"
        )
    if owner != user_id:
        raise InputError(
            f"the recorded chat is of the user {owner!r:.80}, not of {user_id!r:.80}: "
            "give that user's chats"
        )


def _erase_adapters(place: Any, user_id: str) -> str:
    store = open_store(place)
    if not store.exists():
        return f"none, as no store is at {store.url}"
    versions = "versions that cannot be read"
    with suppress(IntegrityError, FormatVersionError):  # damaged users are erased too
        versions = count(len(store.versions(user_id)), "version")
    store.erase_user(user_id)
    return f"{versions}, with history and keys, from {store.url} and its cache on this machine"


def _clear_chat(chat: "RecordedChatHistory") -> str:
    chat.clear()
    return f"the messages of the chat {chat.session_id!r:.80}"


def _delete_items(history: ChromaHistory, user_id: str) -> str:
    num_items = history.delete_user(user_id)
    if num_items == 0:  # a mistyped collection is told from one without the user
        return history.history(user_id).notes[0]
    return f"{count(num_items, 'item')} from {history!r}"


def _remove_job(job_dir: str | PathLike[str], user_id: str) -> str:
    from langchain_cope.personalization.job_folder import remove_job

    what = "an unfinished training" if remove_job(job_dir, user_id) else "none"
    return f"{what} in {job_dir}"


def _clear_engines() -> str:
    """Drop what engines of this process keep between requests, of all users."""
    if "langchain_cope.engine.engine" not in sys.modules:
        return "no base is loaded in this process"
    from langchain_cope.engine import Engine

    engines = Engine.running()
    for engine in engines:
        engine.drop_caches()
    return f"adapters and prompts that {count(len(engines), 'engine')} of this process kept"


def _not_reached(histories: Sequence[Any], job_dirs: Sequence[Any]) -> list[str]:
    places = [
        "other adapter stores",
        "other histories" if histories else "the history: none was given",
        "other job folders" if job_dirs else "job folders of unfinished trainings: none was given",
        "backups, and archives and folders that were exported",
        "the files that the user's texts were read from, and the app's own records",
        "traces and logs",
        "caches of other machines, which drop the adapters at their next access",
        "the memory of other processes, and answers and trainings that are under way; "
        "the trainings cannot publish any more",
        f"temporary folders (cope-… in {tempfile.gettempdir()}) of trainings that were killed and "
        "had no job folder",
    ]
    if histories:
        places.append("the bytes of deleted items in Chroma's own files, until it purges its log")
    return places
