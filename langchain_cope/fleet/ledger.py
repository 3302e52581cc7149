"""What is done, in a file that outlives the run: one line of JSON an event, appended and synced.

    {"event": "started", "settings": {NAME: DIGEST}}    a fleet, or the same one going on
    {"event": "begun", "user": KEY, "data_seq": 3}      handed to a worker
    {"event": "settled", "user": KEY, "outcome": {…}}   what came of it
    {"event": "finished"}                               all is decided: what follows is a new fleet

Users are named by the store's keyed hash, and no text of theirs is here. The driver alone writes,
under a lock. A line that a crash cut short is dropped when the file is opened, one that a full disk
cut short at once.
"""

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from langchain_cope.errors import InputError
from langchain_cope.fleet.tasks import Outcome, State

TRIES = 2  # of one user


class Ledger:
    """The state of a fleet, on disk and in memory."""

    def __init__(self, file: Path) -> None:
        """Open the ledger, and read what earlier runs wrote. Raises InputError if it is in use."""
        self._file = file
        self._begun: dict[str, int] = {}
        self._failures: dict[str, int] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._known: dict[str, set[str]] = {}
        self._settings: dict[str, str] = {}
        self._descriptor = _locked(file)
        try:
            self._replay()
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)  # which unlocks it

    def data_seq(self, user_key: str) -> int | None:
        """Return where the store's log was when this fleet first took up the user."""
        return self._begun.get(user_key)

    def outcome(self, user_key: str) -> Outcome | None:
        """Return what came of the user in this fleet; None where there is something to do yet."""
        return self._outcomes.get(user_key)

    def known(self, user_key: str) -> frozenset[str]:
        """Return the keys of trainings that earlier fleets refused."""
        return frozenset(self._known.get(user_key, ()))

    def start(self, settings: Mapping[str, str | None]) -> None:
        """Note by what a fleet is told from others.

        Raises InputError where the file has users of an unfinished fleet with other settings: they
        would be taken for users of this one.
        """
        digests = {name: _digest(value) for name, value in settings.items()}
        before = {**digests, **self._settings}
        others = [name for name in digests if before[name] != digests[name]]
        if others and self._outcomes:
            named = " and another ".join(others)
            raise InputError(
                f"{self._file} is of an unfinished fleet with another {named}: finish that one, "
                "name another folder (--work), or delete the file to begin anew"
            )
        self._append({"event": "started", "settings": digests})

    def begin(self, user_key: str, data_seq: int) -> None:
        """Note that a worker takes up the user; the first time counts."""
        self._append({"event": "begun", "user": user_key, "data_seq": data_seq})

    def settle(self, user_key: str, outcome: Outcome) -> bool:
        """Note what came of the user, and return whether that is the end of it.

        A failure is not before its second time.
        """
        self._append({"event": "settled", "user": user_key, "outcome": asdict(outcome)})
        return user_key in self._outcomes

    def finish(self) -> None:
        """Note that verdicts are out: whoever is trained from now on belongs to another fleet."""
        self._append({"event": "finished"})

    def _append(self, event: dict[str, Any]) -> None:
        line = (json.dumps(event) + "\n").encode()
        end = os.fstat(self._descriptor).st_size
        try:
            if os.write(self._descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._file))
            os.fsync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, end)  # the next line shall not go on from half a one
            raise
        self._apply(event)

    def _replay(self) -> None:
        data = self._file.read_bytes()
        whole = data.rfind(b"\n") + 1
        os.ftruncate(self._descriptor, whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                self._apply(json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise InputError(
                    f"{self._file}:{number}: not a line of a fleet's ledger: name another folder "
                    "(--work), or delete the file to begin anew, which trains nobody twice whose "
                    "version is in the store"
                ) from error

    def _apply(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "started":
                self._settings = dict(event["settings"])
            case "begun":
                self._begun.setdefault(event["user"], event["data_seq"])
            case "settled":
                fields = event["outcome"]
                outcome = Outcome(**{**fields, "state": State(fields["state"])})
                self._take(event["user"], outcome)
            case "finished":
                for user, outcome in self._outcomes.items():
                    if outcome.key and outcome.state in (State.REFUSED, State.UNSURE):
                        self._known.setdefault(user, set()).add(outcome.key)
                for state in (self._begun, self._failures, self._outcomes):
                    state.clear()
            case other:
                raise ValueError(f"an event {other!r}")

    def _take(self, user: str, outcome: Outcome) -> None:
        if outcome.state in (State.STOPPED, State.UNAVAILABLE):
            return
        if outcome.state is State.FAILED:
            self._failures[user] = self._failures.get(user, 0) + 1
            if self._failures[user] < TRIES:
                return
        self._outcomes[user] = outcome


def _digest(value: str | None) -> str:
    """Return what tells values apart: that of a store may hold a secret."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _locked(file: Path) -> int:
    import fcntl  # POSIX alone has it

    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InputError(
            f"cannot use {file} ({error.strerror}): name a folder that can be written (--work)"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(
            f"another run of this fleet works in {file.parent}: wait for it, or name another "
            "folder (--work)"
        ) from None
    return descriptor
